"""What users depend on is that of the snapshots: the Python API, the options, the JSON fields."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator
from copy import deepcopy

import pytest

if sys.platform == "win32":
    pytest.skip("the command server forks", allow_module_level=True)

from api_surface import python_api
from cli_surface import command_line
from command_cases import runnable_commands
from command_server import CommandServer
from demo_workspaces import TENSORRT
from json_surface import JSON_CASES, Fields, fields_of, json_fields
from script_module import load_script

from clipdeploy import pipeline
from clipdeploy.cli.main import main
from clipdeploy.workspace.folder import Workspace

SCRIPT = load_script("public_surface")
ANEW = "if this is on purpose: python scripts/public_surface.py"
# A name with a dot before it, of one of our packages.
MODULE = re.compile(r"\b(clipdeploy|exporters|calibration)\.[a-z]\w*")


def snapshot(name: str) -> str:
    return (SCRIPT.SNAPSHOTS / name).read_text(encoding="utf-8")


def changes(before: str, now: str) -> str:
    """The lines that differ, with the lines around them and how to accept them; empty if none."""
    lines = list(difflib.unified_diff(before.splitlines(), now.splitlines(), "before", "now"))
    return "\n".join(["", *(line.rstrip() for line in lines), ANEW]) if lines else ""


def check(before: str, now: str) -> None:
    if said := changes(before, now):
        pytest.fail(said, pytrace=False)


# --- the Python API -------------------------------------------------------------------------------


def test_the_python_api_is_that_of_the_snapshot() -> None:
    check(snapshot(SCRIPT.API), SCRIPT.api_text())


def test_the_snapshot_of_the_api_names_no_module() -> None:
    assert MODULE.findall(snapshot(SCRIPT.API)) == []
    assert MODULE.search("config: clipdeploy.benchmark.BenchmarkConfig")


def test_every_public_name_is_in_the_snapshot() -> None:
    assert set(json.loads(snapshot(SCRIPT.API))) == set(pipeline.__all__)


# --- the command line -----------------------------------------------------------------------------


def test_the_command_line_is_that_of_the_snapshot() -> None:
    check(snapshot(SCRIPT.CLI), SCRIPT.cli_text())


# --- the JSON fields ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fields(
    commands: CommandServer, complete_demo: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> Fields:
    return json_fields(commands, complete_demo, tmp_path_factory.mktemp("fields"))


def parameters() -> Iterator[object]:
    for command, cases in sorted(JSON_CASES.items()):
        marks = [pytest.mark.slow] if any(case.slow for case in cases) else []
        if any(case.engine for case in cases):
            marks.append(pytest.mark.skipif(not TENSORRT, reason="needs TensorRT-RTX"))
        yield pytest.param(command, id=command.replace(" ", "-"), marks=marks)


@pytest.mark.parametrize("command", list(parameters()))
def test_the_fields_of_a_command_are_those_of_the_snapshot(command: str, fields: Fields) -> None:
    before = json.loads(snapshot(SCRIPT.FIELDS))[command]
    check("\n".join(before), "\n".join(fields(command)))


def test_every_command_has_its_fields() -> None:
    assert set(JSON_CASES) == runnable_commands(main)
    assert set(json.loads(snapshot(SCRIPT.FIELDS))) == set(JSON_CASES)


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ([{"a": 1, "b": {"c": None}}], {"a", "b.c"}),
        ([[{"a": 1}, {"b": []}]], {"[].a", "[].b[]"}),
        ([{"rows": [{"top1": None}, {"top1": {"low": 1}}]}], {"rows[].top1.low"}),
        ([{"rows": []}, {"rows": [[1, 2]]}], {"rows[][]"}),
        ([{"a": {"versions": {"numpy": "2"}}}, {"a": {"versions": {}}}], {"a.versions.*"}),
        ([{"machine": {"driver": {"version": "1"}}}], {"machine.driver"}),
        ([{"top": 1, "top1": {"low": 1}}], {"top", "top1.low"}),
    ],
)
def test_fields(printed: list[object], found: set[str]) -> None:
    assert fields_of(printed) == found


# --- the snapshots see a change -------------------------------------------------------------------


def test_an_option_that_is_gone_is_seen() -> None:
    export = deepcopy(main.commands["export"])
    export.params = [each for each in export.params if each.name != "opset"]
    changed = deepcopy(main)
    changed.commands = main.commands | {"export": export}
    said = changes(snapshot(SCRIPT.CLI), SCRIPT.text(command_line(changed)))
    gone = [line for line in said.splitlines() if re.match(r"[-+] ", line)]
    assert len(gone) == 1
    assert re.match(r'-\s+"--opset: ', gone[0])
    assert ANEW in said


def test_a_parameter_that_is_gone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def inspect_file(path: str) -> None: ...

    monkeypatch.setattr(pipeline, "inspect_file", inspect_file)
    said = changes(snapshot(SCRIPT.API), SCRIPT.text(python_api(pipeline)))
    assert '-   "trust: bool = False"' in said
    assert '+  "returns": "None"' in said


def test_a_field_that_is_gone_is_seen() -> None:
    before = json.loads(snapshot(SCRIPT.FIELDS))["predict"]
    said = changes("\n".join(before), "\n".join(before[1:]))
    assert f"-{before[0]}" in said.splitlines()
