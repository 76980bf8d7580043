"""Building engines beside ``polygraphy convert``, in one run: seconds, bytes, peak memory.

    python scripts/bench/build.py [--model NAME ...] [--precision fp32 ...] [--repeat 1]
                                  [--workspace FOLDER]

Every card of the zoo, with random weights, as FP32, FP16 and INT8 with TensorRT-RTX, which needs no
GPU.  Each build is a process of its own, from its start to its end, imports included, on the same
graph with the same batches: ``clipdeploy.engines.builder.build_engine`` with its hashes, checks,
fsync and passport, and ``polygraphy convert``, which has none of these.  (The command
``build-engine`` first looks whether the graph is due.)

Both find the graph in the page cache, no bytes of an earlier build waiting to be written, no
engine under the name that they write, in the graph's folder, and a machine that rested for 3
seconds: by then a virtual machine has given its idle memory back to its host.  Right after another
build it is chance how much of it has to be fetched again.  They go in pairs, the first of a pair in
turn.

Ratios are clipdeploy's to Polygraphy's, the median over the pairs, so that a load that comes and
goes meets both: below 1.00 clipdeploy needs less.  Beside the seconds on the clock stand those on
the processor, in user and system code of all threads: they say what the clock will show where other
work leaves a build no second core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = (1, 8, 32)
CALIBRATION_IMAGES = "4"
DIGITS = Path(__file__).resolve().parents[2] / "clipdeploy" / "data" / "demo" / "calibration.zip"
OURS = """
import sys
from pathlib import Path
from clipdeploy.engines.builder import build_engine
build_engine(Path(sys.argv[1]), Path(sys.argv[2]))
"""
FIGURES = ("seconds", "cpu", "megabytes")
BIN = Path(sys.executable).parent
# Before every build; see above.
REST_SECONDS = 3


@dataclass(frozen=True)
class Run:
    """One process: seconds by the clock and of CPU, peak resident MB, bytes of its engine."""

    seconds: float
    cpu: float
    megabytes: float
    bytes: int


# clipdeploy's and Polygraphy's build, one right after the other.
Pair = tuple[Run, Run]


def run(words: list[str], engine: Path) -> Run:
    """Run a build; the engine is not there before it, and nothing waits to be written."""
    engine.unlink(missing_ok=True)
    os.sync()
    time.sleep(REST_SECONDS)
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        child = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
        # Not Popen.wait: it tells no memory.
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(words)}: {output.read().decode()}")
    cpu = used.ru_utime + used.ru_stime
    return Run(seconds, cpu, used.ru_maxrss * 1024 / 1e6, engine.stat().st_size)


def prepare(model: str, workspace: Path) -> None:
    """Export, calibrate and quantise, unless that is done."""
    base = [str(BIN / "clipdeploy")]
    place = ["--model", model, "--workspace", str(workspace), "--quiet"]
    data = ["--data", str(DIGITS), "--images", CALIBRATION_IMAGES]
    for words in (
        ["export", *place, "--random-init", "0"],
        ["calibrate", *place, *data],
        ["quantize", *place],
        ["build-engine", "--fp16", *place],
    ):
        subprocess.run(base + words, check=True, stdout=subprocess.DEVNULL)


def commands(graph: Path, size: int, out: Path) -> dict[str, list[str]]:
    """The two builds of a graph."""
    shapes = [f"image:[{batch},3,{size},{size}]" for batch in BATCHES]
    flags = ("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")
    return {
        "clipdeploy": [sys.executable, "-c", OURS, str(graph), str(graph.with_suffix(".engine"))],
        "polygraphy": [
            *(str(BIN / "polygraphy"), "convert", str(graph), "--strongly-typed"),
            *(word for pair in zip(flags, shapes, strict=True) for word in pair),
            *("-o", str(out)),
        ],
    }


def pairs(words: dict[str, list[str]], engines: dict[str, Path], repeat: int) -> list[Pair]:
    """Run the two builds ``repeat`` times, the first of them in turn."""
    made: list[Pair] = []
    for turn in range(repeat):
        order = list(words) if turn % 2 == 0 else list(reversed(words))
        runs = {name: run(words[name], engines[name]) for name in order}
        made.append((runs["clipdeploy"], runs["polygraphy"]))
    return made


def row(made: list[Pair], figure: str) -> tuple[float, float]:
    """The median of clipdeploy's figure, and of its ratios."""
    values = [(getattr(ours, figure), getattr(theirs, figure)) for ours, theirs in made]
    middle = statistics.median(ours for ours, _ in values)
    return middle, statistics.median(ours / theirs for ours, theirs in values)


def measure(
    model: str, size: int, workspace: Path, precisions: Sequence[str], repeat: int
) -> list[tuple[float, ...]]:
    """Print a line a precision; the ratios of the figures."""
    ratios = []
    for precision in precisions:
        graph = workspace / model / f"{precision}.onnx"
        peer = graph.with_name("polygraphy.engine")
        engines = {"clipdeploy": graph.with_suffix(".engine"), "polygraphy": peer}
        graph.read_bytes()
        made = pairs(commands(graph, size, peer), engines, repeat)
        seconds, cpu, memory = (row(made, figure) for figure in FIGURES)
        ratios.append((seconds[1], cpu[1], memory[1]))
        print(
            f"{model[:55]:55} {precision:5}{seconds[0]:6.1f}{seconds[1]:6.2f}{cpu[0]:6.1f}"
            f"{cpu[1]:6.2f}{memory[0]:7.0f}{memory[1]:6.2f}{made[0][0].bytes / 1e6:7.1f}"
            f"{os.getloadavg()[0]:6.1f}",
            flush=True,
        )
        for engine in engines.values():
            engine.unlink()
    return ratios


def cards(names: list[str]) -> list[tuple[str, int]]:
    """Name and image size of every card that was asked for, the demo left out."""
    words = [str(BIN / "clipdeploy"), "zoo", "list", "--json"]
    listed = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    wanted = [card for card in listed if card["file"] and (not names or card["name"] in names)]
    return [(card["name"], card["image_size"]) for card in wanted]


def main() -> None:
    """Build everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="full name; all if left out")
    parser.add_argument("--precision", action="append", default=[], choices=PRECISIONS)
    parser.add_argument("--repeat", type=int, default=1, help="pairs of builds")
    parser.add_argument("--workspace", type=Path, help="keep the graphs here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = chosen.workspace or Path(folder)
        print(
            f"{os.cpu_count()} cores, no engine executed; {chosen.repeat} pair(s) of builds each; "
            "x: ratio to polygraphy convert; load: runnable processes, a minute's mean"
        )
        print(
            f"{'model':55} {'':5}{'s':>6}{'x':>6}{'CPU s':>6}{'x':>6}{'MB RSS':>7}{'x':>6}"
            f"{'plan':>7}{'load':>6}"
        )
        ratios = []
        for model, size in cards(chosen.model):
            prepare(model, workspace)
            precisions = chosen.precision or PRECISIONS
            ratios += measure(model, size, workspace, precisions, chosen.repeat)
        for name, values in zip(FIGURES, zip(*ratios, strict=True), strict=True):
            print(
                f"{len(values)} rows, {name}: median ratio {statistics.median(values):.2f}, "
                f"worst {max(values):.2f}"
            )


if __name__ == "__main__":
    main()
