"""``clipdeploy package`` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from triton_server import read_config

from clipdeploy.cli.package import package
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(package, [str(word) for word in words])


@pytest.fixture
def artifacts(demo_workspace: Workspace, tmp_path: Path) -> Path:
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    return tmp_path / "artifacts"


def test_the_best_artifact_of_the_last_model_is_packaged(artifacts: Path, tmp_path: Path) -> None:
    result = run("--triton", tmp_path / "models", "--workspace", artifacts)
    assert result.exit_code == 0, result.output
    assert "fp16.onnx" in result.stderr
    assert "clip-vit-demo-fp16: version 1 written, up to 32 images at once" in result.stdout
    again = run("--triton", tmp_path / "models", "--workspace", artifacts)
    assert "version 1 unchanged" in again.stdout


def test_options_reach_the_configuration_and_json_tells_them(
    artifacts: Path, tmp_path: Path
) -> None:
    graph = artifacts / cards.DEMO / "int8.onnx"
    words = ("--max-batch", "4", "--queue-delay", "0", "--instances", "2", "--name", "digits")
    result = run(graph, "--triton", tmp_path / "models", *words, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert (made["name"], made["version"], made["max_batch"]) == ("digits", 1, 4)
    assert "slower than an FP16 graph" in result.stderr
    config = read_config(Path(made["path"]))
    assert (config.name, config.max_batch_size, config.instance_group[0].count) == ("digits", 4, 2)
    forced = run(graph, "--triton", tmp_path / "models", *words, "--force", "--json", "--quiet")
    assert json.loads(forced.stdout)["changed"] is True
    assert forced.stderr == ""


def test_a_program_is_written_with_the_commands_that_build_it(
    artifacts: Path, tmp_path: Path
) -> None:
    graph, folder = artifacts / cards.DEMO / "fp32.onnx", tmp_path / "cpp"
    result = run(graph, "--cpp", folder)
    assert result.exit_code == 0, result.output
    assert f"{folder}: written, for onnxruntime" in result.stdout
    assert f"cmake -S {folder} -B {folder}/build" in result.stdout
    packaged = json.loads(run(graph, "--cpp", folder, "--json").stdout)
    assert (packaged["changed"], packaged["model"]) == (False, str(folder / "model.onnx"))
    other = run("--cpp", folder, "--workspace", artifacts)
    assert other.exit_code == 1
    assert "--force" in other.stderr
    assert run("--cpp", folder, "--workspace", artifacts, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "package takes either --triton DIR or --cpp DIR"),
        (("--triton", "a", "--cpp", "b"), 2, "either --triton DIR or --cpp DIR"),
        (("--triton", "models", "--name", "a/b"), 2, "'a/b' is not a valid"),
        (("--triton", "models", "--max-batch", "0"), 2, "invalid value 0 for --max-batch"),
        (("--cpp", "c", "--name", "digits"), 2, "--name belongs to --triton"),
        (("--cpp", "c", "--queue-delay", "1"), 2, "--queue-delay belongs to --triton"),
        (("notes.txt", "--triton", "models"), 2, "neither .onnx nor .engine"),
        (("gone.onnx", "--triton", "models"), 1, "gone.onnx"),
        (("gone.engine", "--triton", "models"), 1, "has no passport"),
        (("x.onnx", "--model", "demo", "--triton", "models"), 2, "leave out --model"),
        (("--model", "demo", "--triton", "models"), 2, "there is no artifact of"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said in error
    assert list(tmp_path.iterdir()) == []
