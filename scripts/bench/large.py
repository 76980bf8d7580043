"""Takes a large model through every stage: seconds, peak memory, nodes and bytes of each.

    python scripts/bench/large.py [--model clip-vit-large-p14] [--precision fp16 int8 fp8]
                                  [--images 16] [--workspace FOLDER]

The weights are random.  Each stage is the command of clipdeploy, as a process of its own, timed
from start to exit; its peak memory is that of the process.  Engines are TensorRT-RTX's, which are
built without a GPU.  ``build-engine`` includes the graph of its precision: the conversion to FP16,
or the quantisation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace
from exporters.headers import existing_graph

HERE = Path(__file__).resolve()
DIGITS = cards.demo_file("calibration.zip")
PEAK = "peak MB:"
COMMAND = f"""
import atexit
from memory import peak_megabytes
atexit.register(lambda: print("{PEAK}", peak_megabytes()))
from clipdeploy.cli.main import main
main()
"""


@dataclass(frozen=True)
class Stage:
    """A command, its seconds and its peak memory in units of 10 ** 6 bytes."""

    name: str
    seconds: float
    peak: float


def run_stage(name: str, *words: str) -> Stage:
    """Run a command of clipdeploy.

    Raises:
        SystemExit: it failed.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE.parent)])},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {done.stderr}")
    return Stage(name, time.perf_counter() - started, float(done.stdout.rpartition(PEAK)[2]))


def files_of(workspace: Workspace, model: str, stage: str) -> str:
    """The columns of the files that a stage wrote: nodes, megabytes of the graph and the plan."""
    precision = {"export": "fp32"}.get(stage, stage)
    if precision == "calibrate":
        return ""
    graph = existing_graph(workspace.graph(model, precision))  # type: ignore[arg-type]
    engine = workspace.engine(model, precision)  # type: ignore[arg-type]
    if graph is None:
        raise SystemExit(f"{stage} wrote no graph")
    plan = f"{engine.stat().st_size / 1e6:9.0f}" if engine.exists() else ""
    return f"{graph.nodes:7}{graph.bytes / 1e6:9.0f}{plan}"


def main() -> None:
    """Run the stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="clip-vit-large-p14")
    parser.add_argument("--precision", nargs="+", default=["fp16", "int8", "fp8"])
    parser.add_argument("--images", default="16", help="calibration images")
    parser.add_argument("--workspace", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(chosen.workspace or Path(folder))
        common = ("--model", chosen.model, "--workspace", str(workspace.root))
        words = {
            "export": ("export", *common, "--random-init", "0"),
            "calibrate": ("calibrate", *common, "--data", str(DIGITS), "--images", chosen.images),
            **{name: ("build-engine", *common, f"--{name}") for name in chosen.precision},
        }
        card = cards.find(chosen.model)
        print(f"{card.name}, {card.params / 1e6:.0f} M parameters, {os.cpu_count()} cores")
        header = ("stage", "s", "peak MB", "nodes", "graph MB", "plan MB")
        print("{:12}{:>7}{:>9}{:>7}{:>9}{:>9}".format(*header))
        for name, command in words.items():
            stage = run_stage(name, *command)
            row = f"{name:12}{stage.seconds:7.0f}{stage.peak:9.0f}"
            print(row + files_of(workspace, card.name, name), flush=True)


if __name__ == "__main__":
    main()
