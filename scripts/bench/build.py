"""Compares engine builds with ``polygraphy convert``: seconds, bytes, peak memory.

    python scripts/bench/build.py [--model NAME ...] [--precision fp32 ...] [--repeat 1]
                                  [--workspace FOLDER]

Builds every model with random weights as FP32, FP16 and INT8 with TensorRT-RTX, which needs no GPU.
Each build is a separate process, timed from start to exit, on the same graph with the same batches:
``clipdeploy.engines.builder.build_engine`` with hashes, checks, fsync and passport, and
``polygraphy convert`` without these.  (The command ``build-engine`` also checks whether the graph
is current.)

Before each build the graph is in the page cache, no data waits to be written, the target does not
exist, and the machine has been idle for 3 seconds, so that a virtual machine has returned its idle
memory to the host.  Without that pause the build time depends on how much memory must be fetched
again.  Builds run in pairs, in alternating order.

Ratios are clipdeploy / Polygraphy, the median over the pairs, so that varying load affects both;
below 1.00 clipdeploy needs less.  CPU seconds (user and system, all threads) are printed as well:
they predict the wall-clock time on a machine with only one free core.
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
    """One process: wall-clock and CPU seconds, peak resident MB, bytes of the engine."""

    seconds: float
    cpu: float
    megabytes: float
    bytes: int


# A build by clipdeploy and one by Polygraphy.
Pair = tuple[Run, Run]


def run(words: list[str], engine: Path) -> Run:
    """Remove the engine, sync the disks and run a build."""
    engine.unlink(missing_ok=True)
    os.sync()
    time.sleep(REST_SECONDS)
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        child = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
        # Popen.wait does not report memory.
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(words)}: {output.read().decode()}")
    cpu = used.ru_utime + used.ru_stime
    return Run(seconds, cpu, used.ru_maxrss * 1024 / 1e6, engine.stat().st_size)


def prepare(model: str, workspace: Path) -> None:
    """Export, calibrate and quantise if that was not done before."""
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
    """Return the commands of the two builds of a graph."""
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
    """Run the two builds ``repeat`` times in alternating order."""
    made: list[Pair] = []
    for turn in range(repeat):
        order = list(words) if turn % 2 == 0 else list(reversed(words))
        runs = {name: run(words[name], engines[name]) for name in order}
        made.append((runs["clipdeploy"], runs["polygraphy"]))
    return made


def row(made: list[Pair], figure: str) -> tuple[float, float]:
    """Return the medians of clipdeploy's values and of the ratios."""
    values = [(getattr(ours, figure), getattr(theirs, figure)) for ours, theirs in made]
    middle = statistics.median(ours for ours, _ in values)
    return middle, statistics.median(ours / theirs for ours, theirs in values)


def measure(
    model: str, size: int, workspace: Path, precisions: Sequence[str], repeat: int
) -> list[tuple[float, ...]]:
    """Print a row per precision; return the ratios."""
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
    """Return name and image size of the chosen cards, without the demo."""
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
