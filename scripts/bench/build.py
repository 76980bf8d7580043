"""Building engines beside ``polygraphy convert``, in one run: seconds, bytes, peak memory.

    python scripts/bench/build.py [--model NAME ...] [--repeat 1] [--workspace FOLDER]

Every card of the zoo, with random weights, as FP32, FP16 and INT8 with TensorRT-RTX, which needs no
GPU.  Each build is a process of its own, the two taking turns on the same graph with the same
batches: ``clipdeploy.engines.builder.build_engine`` with its hashes, checks and passport, and
``polygraphy convert``.  (The command ``build-engine`` first looks whether the graph is due.)
Ratios are clipdeploy's to Polygraphy's: below 1.00 clipdeploy needs less.
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
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Run:
    """One process: seconds, peak resident megabytes, and the bytes of its engine."""

    seconds: float
    megabytes: float
    bytes: int


def run(words: list[str], engine: Path) -> Run:
    """Run a build; the engine is not there before it."""
    engine.unlink(missing_ok=True)
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
    return Run(seconds, used.ru_maxrss * 1024 / 1e6, engine.stat().st_size)


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


def median(runs: list[Run], figure: str) -> float:
    """The middle one of a figure."""
    return statistics.median(getattr(run, figure) for run in runs)


def measure(model: str, size: int, workspace: Path, repeat: int) -> list[tuple[float, float]]:
    """Print a line a precision; the ratios of seconds and memory."""
    ratios = []
    for precision in PRECISIONS:
        graph = workspace / model / f"{model}.{precision}.onnx"
        peer = workspace / "polygraphy.engine"
        engines = {"clipdeploy": graph.with_suffix(".engine"), "polygraphy": peer}
        words = commands(graph, size, peer)
        runs: dict[str, list[Run]] = {name: [] for name in words}
        for _ in range(repeat):
            for name in words:
                runs[name].append(run(words[name], engines[name]))
        ours, theirs = runs["clipdeploy"], runs["polygraphy"]
        ratio = tuple(median(ours, f) / median(theirs, f) for f in ("seconds", "megabytes"))
        ratios.append((ratio[0], ratio[1]))
        print(
            f"{model[:38]:38} {precision:5}{median(ours, 'seconds'):7.1f}{ratio[0]:7.2f}"
            f"{median(ours, 'megabytes'):8.0f}{ratio[1]:7.2f}{ours[0].bytes / 1e6:8.1f}",
            flush=True,
        )
        engines["clipdeploy"].unlink()
        peer.unlink()
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
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--workspace", type=Path, help="keep the graphs here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = chosen.workspace or Path(folder)
        print(f"{os.cpu_count()} cores, no engine executed; ratio to polygraphy convert")
        print(
            "{:38} {:5}{:>7}{:>7}{:>8}{:>7}{:>8}".format(
                "model", "", "s", "ratio", "MB RSS", "ratio", "MB plan"
            )
        )
        ratios = []
        for model, size in cards(chosen.model):
            prepare(model, workspace)
            ratios += measure(model, size, workspace, chosen.repeat)
        for index, figure in enumerate(("seconds", "memory")):
            values = [pair[index] for pair in ratios]
            print(
                f"{len(values)} builds, {figure}: median ratio {statistics.median(values):.2f}, "
                f"worst {max(values):.2f}"
            )


if __name__ == "__main__":
    main()
