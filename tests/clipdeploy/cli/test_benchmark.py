"""``clipdeploy benchmark`` as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from interrupts import hear_interrupts

from clipdeploy.cli.benchmark import benchmark
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

QUICK = ("--rounds", "2", "--warmup", "0", "--batch", "1,3", "--device", "cpu")
COMMAND = "from clipdeploy.cli.benchmark import benchmark; benchmark(prog_name='benchmark')"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(benchmark, [str(word) for word in words])


def refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in error


@pytest.fixture
def artifacts(demo_workspace: Workspace, tmp_path: Path) -> Path:
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    return tmp_path / "artifacts"


def test_all_of_the_last_model_is_measured_and_drawn(artifacts: Path, tmp_path: Path) -> None:
    result = run(*QUICK, "--workspace", artifacts, "--output", tmp_path / "new" / "speed.svg")
    assert result.exit_code == 0, result.output
    assert "model: clip-vit-demo (the last one of" in result.stderr
    assert "other programs on this machine affect the latencies" in result.stderr
    for label in ("fp32.onnx", "fp16.onnx", "int8.onnx"):
        assert label in result.stdout
    assert "2 rounds" in result.stdout
    assert (tmp_path / "new" / "speed.svg").read_bytes().startswith(b"<?xml")


def test_json_is_all_that_stdout_holds(artifacts: Path) -> None:
    graph = artifacts / cards.DEMO / "int8.onnx"
    result = run(graph, *QUICK, "--seed", "5", "--threads", "1", "--json")
    assert result.exit_code == 0, result.output
    read = json.loads(result.stdout)
    assert [(row["label"], row["batch"]) for row in read["rows"]] == [
        ("int8.onnx", 1),
        ("int8.onnx", 3),
    ]
    asked = read["config"]
    assert (asked["seed"], asked["threads"], asked["provider"]) == (5, 1, "cpu")
    # --rounds alone: no clock ends it.
    assert (asked["rounds"], asked["seconds"]) == (2, None)


def test_quiet_says_nothing(artifacts: Path) -> None:
    result = run(*QUICK, "--workspace", artifacts, "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""


def test_nothing_that_runs_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    engine = tmp_path / "vit.int8.engine"
    engine.write_bytes(b"no passport beside it")
    plot = tmp_path / "speed.png"
    result = run(engine, *QUICK, "--output", plot)
    assert result.exit_code == 1
    assert "int8.engine: " in result.stdout
    assert "error: nothing could be measured (int8.engine: " in result.stderr
    assert not plot.exists()


def test_one_that_runs_is_enough(artifacts: Path) -> None:
    engine = artifacts / cards.DEMO / "fp16.engine"
    engine.write_bytes(b"no passport beside it")
    result = run(*QUICK, "--workspace", artifacts, "--json")
    assert result.exit_code == 0
    [left] = json.loads(result.stdout)["not_run"]
    assert (left["label"], left["batch"]) == ("fp16.engine", None)
    assert "has no passport" in left["reason"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--batch", "1,x"), 2, "'1,x'"),
        (("--batch", "0"), 2, "batches of [0]"),
        (("--seconds", "0"), 2, "invalid value 0.0 for --seconds"),
        (("--rounds", "0"), 2, "invalid value 0 for --rounds"),
        (("--output", "speed.pdf"), 2, "speed.pdf"),
        (("x.onnx", "--model", "demo"), 2, "leave out --model"),
        (("notes.txt",), 2, "neither .onnx nor .engine"),
        (("gone.onnx",), 1, "there is no file gone.onnx"),
        (("--model", "demo"), 2, "has not been exported"),
    ],
)
def test_wrong_words_are_refused_before_anything_runs(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    refused(run(*words, "--workspace", tmp_path / "a"), code, said)
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from clipdeploy.cli.benchmark import benchmark\n"
        "try:\n    benchmark(['--help'], prog_name='benchmark')\n"
        "finally:\n"
        "    heavy = {'torch', 'tensorrt', 'onnx', 'onnxruntime', 'numpy', 'matplotlib'}\n"
        "    print('HEAVY', sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_leaves_no_plot(artifacts: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "speed.png"
    words = ["--workspace", str(artifacts), "--seconds", "600", "--warmup", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words, "--output", str(plot)],
        preexec_fn=hear_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("measuring 9"):
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate()
    assert process.returncode == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert out == ""
    assert not plot.parent.exists()
