"""Command lines that run each command on the demo model.

Every command in ``CASES`` is tested in a terminal, in a pipe, with ``--json`` and with ``--quiet``.
A test fails if a command has no entry.  A command may have several entries.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from demo_workspaces import EMBEDDER, few_digits

from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

__all__ = ["CASES", "SEARCH", "Case", "every_command", "prepare", "runnable_commands"]


@dataclass(frozen=True)
class Case:
    """``words``: arguments, run in a folder of :func:`prepare`; ``engine``: requires TensorRT-RTX.

    ``slow``: runs only with the slow tests.  ``long``: runs once from the beginning, then again in
    the same folder for every way to look at it; a pattern of what only the first run says on
    standard error.  ``program``: prints a shell script, in lines of any length, and has no
    ``--quiet``.
    """

    words: str
    engine: bool = False
    slow: bool = False
    long: str = ""
    program: bool = False


# Images per class. A search uses 22 of these 50, and confirms a loss below 15 points on the others.
_FEW = 5
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_GRAPH = f"artifacts/{cards.DEMO}"
# Ranges of the largest values are the ones that take least time to find.
SEARCH = "search --data few.zip --search-images 22 --max-drop 15 --fixed-plan --range minmax"
# Repeated calls take most of the time: their number grows with the images.
_VERIFY = "verify --data test.zip --images 12 --max-drop 45 --workers 0"
_BENCHMARK = "benchmark --batch 1,8 --rounds 3 --warmup 0.01"
CASES: dict[str, tuple[Case, ...]] = {
    "zoo": (Case("zoo"),),
    "zoo list": (Case("zoo list"),),
    "zoo clips": (Case("zoo clips"),),
    "zoo show": (Case("zoo show clip-vit-base-p16-384px"), Case("zoo show demo")),
    "export": (Case("export"), Case("export --model demo --force", slow=True)),
    "calibrate": (Case("calibrate --data calibration.zip --images 24"),),
    "calibrate merge": (Case("calibrate merge"),),
    "quantize": (
        Case("quantize"),
        Case("quantize --force", slow=True),
        Case("quantize --cpu --quantize-attention", slow=True),
    ),
    "build-engine": (
        Case("build-engine --fp16", engine=True),
        Case("build-engine --int8", engine=True, slow=True),
    ),
    "verify run": (
        Case(f"{_VERIFY} --graphs-only --output verdict.html"),
        Case(f"{_VERIFY} {_GRAPH}/fp16.onnx foreign.onnx", slow=True),
    ),
    "verify texts": (
        Case(f"verify texts texts.txt --model {EMBEDDER} --max-drop 45 --graphs-only"),
    ),
    "verify merge": (Case("verify merge --max-drop 20"),),
    "predict": (Case("predict digits --top 3"),),
    "bisect": (Case("bisect --data test.zip --images 1"),),
    "search": (Case(SEARCH, slow=True, long=r"quantise clip-vit-demo [^t]"),),
    "benchmark": (
        Case(_BENCHMARK),
        Case(f"{_BENCHMARK} foreign.onnx {_GRAPH}/int8.onnx", slow=True),
    ),
    "inspect": (
        Case(f"inspect {_GRAPH}/int8.onnx"),
        Case(f"inspect {_GRAPH}/fp16.engine", engine=True),
    ),
    "package": (
        Case("package --triton models"),
        Case(f"package {_GRAPH}/int8.onnx --cpp program"),
    ),
    "doctor": (Case("doctor"),),
    "config": (Case("config"),),
    "completion": (Case("completion bash", program=True),),
    "deploy": (
        Case(
            "deploy --calibration-data calibration.zip --val-data test.zip --val-images 12 "
            "--max-drop 45 --graphs-only --no-benchmark",
            engine=True,
            slow=True,
            long=r"build int8\W+done",
        ),
    ),
    "demo": (Case("demo --workspace another", engine=True, slow=True, long="build the "),),
}


def every_command(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield the command and all its subcommands, with their names."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from every_command(below, (*path, name))


def runnable_commands(main: click.Command) -> set[str]:
    """Yield the commands that can be run: no groups, except those with options."""
    return {
        " ".join(path)
        for path, command in every_command(main)
        if not isinstance(command, click.Group) or command.invoke_without_command
    }


def prepare(made: Workspace, folder: Path) -> None:
    """Create a folder with a copy of the workspace, as ``artifacts``, and images."""
    shutil.copytree(made.root, folder / "artifacts")
    for name in ("calibration.zip", "test.zip"):
        shutil.copy(cards.demo_file(name), folder)
    shutil.copy(made.graph(cards.DEMO, "fp32"), folder / "foreign.onnx")
    few_digits(folder / "few.zip", _FEW)
    texts = [place.format(word) for place in ("{}", "the digit {}") for word in _WORDS]
    (folder / "texts.txt").write_text("\n".join(texts))
    with zipfile.ZipFile(few_digits(folder / "digits.zip", 1)) as digits:
        digits.extractall(
            folder / "digits", [name for name in digits.namelist() if name[0] in "37"]
        )
    (folder / "digits.zip").unlink()
