"""The fields of what every command prints with ``--json``, as key paths."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from command_cases import CASES, Case, prepare
from command_server import Command, CommandServer
from planted import three_bits

from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

__all__ = ["JSON_CASES", "Fields", "fields_of", "json_fields"]

_MADE = f"artifacts/{cards.DEMO}"
# Few images: what a verdict is does not matter here.
_VERIFY = "verify --data few.zip --images 8 --workers 0 --threads 1"
# The cheapest runs that together print every field; the other commands as in the terminal's tests.
JSON_CASES: dict[str, tuple[Case, ...]] = CASES | {
    "export": (Case("export"),),
    "quantize": (Case("quantize"),),
    "build-engine": (
        Case("build-engine --fp16", engine=True),
        Case("build-engine --int8", engine=True),
    ),
    "verify run": (Case(f"{_VERIFY} --graphs-only"), Case(f"{_VERIFY} foreign.onnx")),
    "bisect": (Case("bisect three-bits.onnx --data few.zip --images 4 --threads 1"),),
    "search": (
        # In the demo's fastest FP8 engine no products share a kernel.
        Case(
            "search --data few.zip --int8 --max-drop 40 --search-images 20 --fixed-plan --threads 1"
        ),
    ),
    "benchmark": (
        Case("benchmark --batch 1 --rounds 3 --warmup 0 --threads 1", engine=True),
        Case(f"benchmark {_MADE}/fp16.onnx --batch 1 --rounds 3 --warmup 0 --threads 1"),
        Case(f"benchmark {_MADE}/fp32.onnx {_MADE}/int8.onnx --estimate L4 --batch 1"),
        Case("benchmark --estimate list"),
    ),
    "inspect": (
        Case("inspect foreign.onnx"),
        Case(f"inspect {_MADE}/fp16.onnx"),
        Case(f"inspect {_MADE}/int8.onnx"),
        Case(f"inspect {_MADE}/fp16.engine", engine=True),
    ),
    "config": (Case("config"), Case("config --init")),
    "deploy": (
        Case(
            "deploy --calibration-data calibration.zip --val-data few.zip --max-drop 40 "
            "--graphs-only --threads 1 --no-benchmark --triton models --cpp program",
            engine=True,
        ),
    ),
    "demo": (Case("demo", engine=True, slow=True),),
}
# Ends of paths.  Objects whose keys are data: packages, Linears, precisions.
_MAPS = (
    *(".versions", "machine.packages", "costs.products", ".int8_left_out", ".gemms", ".attention"),
    "costs.outputs",
    ".kernels",
    ".formats",
    "fastest",
)
# Null or empty on one machine and filled on another; docs/verification.schema.json has the fields
# of the worst images.
_OF_MACHINE = (
    "environment.clocks_before",
    "environment.clocks_after",
    "machine.driver",
    "machine.gpus[]",
    "machine.tensorrt",
    "machine.tensorrt_rtx",
    "rows[].worst[]",
)
# A verdict that did not pass is printed as well.
_PRINTED = (0, 3)

Fields = Callable[[str], list[str]]


def fields_of(printed: Iterable[object]) -> set[str]:
    """Such as ``rows[].top1.agreement``, of all values; ``*`` is a key that is data.

    A value that is null or empty in one place and an object in another counts as the object.
    """
    found = set().union(*(_paths(value, "") for value in printed))
    return {each for each in found if not any(_is_inside(other, each) for other in found)}


def _is_inside(path: str, outer: str) -> bool:
    return path.startswith((f"{outer}.", f"{outer}["))


def _paths(value: object, path: str) -> set[str]:
    if path.endswith(_OF_MACHINE):
        return {path}
    if isinstance(value, dict):
        start = f"{path}." if path else ""
        is_map = path.endswith(_MAPS)
        found = (_paths(each, start + ("*" if is_map else key)) for key, each in value.items())
        return set().union(*found) or {f"{path}.*" if is_map else path}
    if isinstance(value, list):
        return set().union(*(_paths(each, f"{path}[]") for each in value)) or {f"{path}[]"}
    return {path}


def json_fields(commands: CommandServer, made: Workspace, folder: Path) -> Fields:
    """Return a function from a command to its fields, sorted; runs take copies of ``made``.

    No GPU is visible to the commands, so that the fields do not depend on the machine.
    """
    server = commands.with_env(
        {
            "CLIPDEPLOY_OFFLINE": "1",
            "CLIPDEPLOY_HOME": str(folder / "home"),
            "CUDA_VISIBLE_DEVICES": "",
        }
    )

    def run(command: str) -> list[str]:
        cases = JSON_CASES[command]
        return sorted(fields_of([_printed(case, server, made, folder) for case in cases]))

    return run


def _printed(case: Case, server: CommandServer, made: Workspace, folder: Path) -> object:
    with tempfile.TemporaryDirectory(dir=folder) as cwd:
        prepare(made, Path(cwd))
        # In it bisect finds a Linear.
        three_bits(made.graph(cards.DEMO, "int8"), Path(cwd, "three-bits.onnx"), "blocks.0.mlp.fc2")
        out, err = Path(cwd, "out"), Path(cwd, "err")
        words = (*case.words.split(), "--json")
        status = server.run(Command(words, cwd, str(out), str(err)))
        assert status in _PRINTED, f"{case.words}: exit code {status}\n{err.read_text()}"
        return json.loads(out.read_bytes())
