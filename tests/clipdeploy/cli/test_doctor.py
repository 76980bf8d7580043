"""``clipdeploy doctor`` as a user types it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import clipdeploy.doctor.machine
from clipdeploy.cli.doctor import doctor
from clipdeploy.doctor import Machine, this_machine


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return this_machine(tmp_path_factory.mktemp("work"))


def test_every_finding_is_a_line_and_json_is_the_same(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipdeploy.doctor, "this_machine", lambda workspace: machine)
    shown = CliRunner().invoke(doctor, ["--quiet"])
    quiet = CliRunner().invoke(doctor, ["--quiet", "--json"])
    read = json.loads(quiet.stdout)
    assert shown.exit_code == quiet.exit_code == (0 if read["can_run"] else 1)
    assert shown.stderr == quiet.stderr == ""
    for finding in read["findings"]:
        assert finding["text"] in shown.stdout
        assert finding["mend"] in shown.stdout
    assert read["machine"]["python"] == list(machine.python)


def test_a_machine_that_cannot_run_the_main_job_exits_with_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(machine, torch=None)
    monkeypatch.setattr(clipdeploy.doctor, "this_machine", lambda workspace: broken)
    result = CliRunner().invoke(doctor, [])
    assert result.exit_code == 1
    assert "ERROR    PyTorch       not installed\n" in result.stdout
    assert "-> pip install torch\n" in result.stdout
    assert "1 to fix before export" in result.stdout


def test_the_workspace_asked_for_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipdeploy.doctor.machine, "probe", lambda name: None)
    (tmp_path / "here").write_text("a file")
    result = CliRunner().invoke(doctor, ["--workspace", str(tmp_path / "here" / "artifacts")])
    assert result.exit_code == 1
    assert "here is a file" in result.stdout


def test_a_doctor_that_lacks_a_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clipdeploy.doctor", None)
    result = CliRunner().invoke(doctor, [])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the package clipdeploy.doctor is not installed")
