"""The checks for a machine with a GPU: limits, tables, and what counts as passed.

The checks here are real processes, most of them of a few lines of Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_module import load_script

from clipdeploy.core.device import gpus
from clipdeploy.core.version import __version__

ROOT = Path(__file__).resolve().parents[2]
# `-I -S` starts in a hundredth of a second.
PYTHON = [sys.executable, "-I", "-S", "-c"]
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
print("loading the engine", file=sys.stderr, flush=True)
time.sleep(600)
"""
FAILS = """
import sys
print("\\x1b[31mCUDA error: no kernel image | SM 9.0\\x1b[0m", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench/gpu_day")


@pytest.fixture
def log(script: ModuleType, tmp_path: Path) -> Any:
    return script.Log(tmp_path, 60.0)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that was killed may still wait to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_check_that_hangs_is_killed_with_its_children_and_named(log: Any, tmp_path: Path) -> None:
    assert not log.check("engines", "verify", [*PYTHON, HANGS], 0.5)
    assert log.check("gemm", "cuBLAS", [*PYTHON, "print(1)"], 30, read=lambda text: f"{text}TB/s")
    hung, after = log.rows
    assert (hung.step, hung.check, hung.result) == ("engines", "verify", "failed")
    assert hung.text == "killed after 0.5 s: loading the engine"
    (output,) = tmp_path.glob("*verify.out")
    assert not is_running(int(output.read_text()))
    assert (after.result, after.text) == ("passed", "1\nTB/s")


def test_a_failed_check_is_in_the_table_with_the_end_of_its_log(log: Any, tmp_path: Path) -> None:
    log.machine["GPU"] = "NVIDIA H100, SM 9.0"
    log.check("demo", "verify", [*PYTHON, FAILS], 30)
    log.skip("sums", "INT8 sums", "no TensorRT is installed")
    log.check("vit", "graphs", [*PYTHON, "print('{\"rows\": [')"], 30, read=json.loads)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    said = "CUDA error: no kernel image | SM 9.0"
    assert f"exit code 7: {said}".replace("|", "\\|") in table
    assert "| GPU | NVIDIA H100, SM 9.0 |" in table
    assert "| sums | INT8 sums | not run | 0.0 | no TensorRT is installed |" in table
    assert f"    {said}\n" in table
    assert "its output cannot be read: JSONDecodeError" in table
    # A traceback where an exit code with a report was expected.
    log.check("sums", "tensorrt", [*PYTHON, FAILS], 30, read=json.loads, codes=(0, 7))
    assert log.rows[-1].text == f"exit code 7: {said}"
    assert "0 passed, 2 failed, 1 not run (which is no pass)" in table
    # Every row has as many cells as the title.
    rows = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {3, 6}
    found = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert [found[key] for key in ("passed", "failed", "not_run")] == [0, 3, 1]
    assert [row["result"] for row in found["rows"]] == ["failed", "not run", "failed", "failed"]


def test_after_the_time_nothing_runs(script: ModuleType, tmp_path: Path) -> None:
    log = script.Log(tmp_path, 0.3)
    assert not log.check("gemm", "cuBLAS", [*PYTHON, "import time; time.sleep(60)"], 30)
    assert not log.check("vit", "export", [*PYTHON, "print(1)"], 30)
    assert [row.result for row in log.rows] == ["failed", "not run"]
    assert log.rows[1].text == "the 0.3 s are over (--seconds)"


def test_a_program_that_does_not_exist_is_a_failed_step(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = script.Day(script.Log(tmp_path, 60.0), tmp_path, found={"gpus": []})

    def breaks(day: Any) -> None:
        day.log.check("gemm", "cuBLAS", [str(tmp_path / "missing")], 30)

    monkeypatch.setattr(script, "doctor", lambda day: None)
    monkeypatch.setattr(script, "STEPS", {"gemm": breaks, "vit": script.vit})
    script.run_steps(day, ["gemm", "vit"])
    assert [(row.step, row.result) for row in day.log.rows] == [
        ("gemm", "failed"),
        ("vit", "not run"),
    ]
    # The exit code says so too.
    monkeypatch.setattr("sys.argv", ["gpu_day.py", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(script, "doctor", lambda day: day.found.update(gpus=[]))
    assert script.main() == 1
    # Without doctor's answer nothing is known of the machine, not even that it has no GPU.
    monkeypatch.setattr(script, "doctor", lambda day: None)
    day = script.Day(script.Log(tmp_path, 60.0), tmp_path)
    script.run_steps(day, ["gemm", "vit"])
    assert {row.text for row in day.log.rows} == {"doctor did not say what this machine has"}


@pytest.fixture
def ran(tmp_path: Path) -> dict[str, Any]:
    """The script with a step that needs a GPU, from another folder; its table as JSON."""
    words = ["bash", str(ROOT / "scripts" / "gpu_day.sh"), "--only", "gemm", "vit"]
    place = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(words, env=place, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    return {"code": done.returncode, "said": done.stdout, **found}


@pytest.mark.skipif(bool(gpus()), reason="tests a machine without a GPU")
def test_without_a_gpu_nothing_that_needs_one_is_passed(ran: dict[str, Any]) -> None:
    assert ran["code"] == 0, ran["said"]
    results = {(row["step"], row["check"]): row for row in ran["rows"]}
    assert results["doctor", "clipdeploy doctor"]["result"] == "passed"
    for step in (("gemm", "cuBLAS"), ("vit", "graphs, engines, benchmark")):
        assert (results[step]["result"], results[step]["text"]) == ("not run", "no GPU")
    assert ran["machine"]["GPU"] == "no GPU"
    assert ran["machine"]["torch"]
    assert ran["machine"]["clipdeploy"].startswith(__version__)
    assert "not run (which is no pass)" in ran["said"]


def test_a_machine_without_tensorrt_is_no_failure(script: ModuleType) -> None:
    none = {"level": "error", "subject": "TensorRT", "text": "no installed TensorRT"}
    cuda = {"level": "warning", "subject": "ONNX Runtime", "text": "cannot use CUDA"}
    good = {"level": "good", "subject": "Python", "text": "3.12"}
    assert script.troubles([good, none, cuda], []) == ([none["text"], cuda["text"]], False)
    assert script.troubles([none], ["tensorrt"])[1]
    assert script.troubles([{**none, "subject": "PyTorch"}], [])[1]


def test_unknown_steps_are_refused() -> None:
    words = [sys.executable, str(ROOT / "scripts" / "bench" / "gpu_day.py"), "--only", "lunch"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'lunch'" in done.stderr


def verified(db: float, **changes: Any) -> str:
    """The JSON of `verify` for one graph on CUDA."""
    row = {
        "artifact": "work/int8.onnx",
        "runner": "ONNX Runtime (CUDA)",
        "verdict": "equivalent",
        "reason": "drop +0.00 points",
        "fidelity": {"sqnr_db": db},
    }
    return json.dumps({"rows": [{**row, **changes}]})


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (verified(40.6), ""),
        (verified(34.0), "int8.onnx 34.0 dB, 41.0 on the CPU"),
        (verified(40.6, runner="ONNX Runtime (CPU)"), "int8.onnx ran on ONNX Runtime (CPU)"),
        (verified(40.6, verdict="regressed"), "int8.onnx regressed: drop"),
        (
            verified(0, runner="", fidelity=None, reason="no cuDNN"),
            "int8.onnx did not run: no cuDNN",
        ),
    ],
)
def test_a_verdict_counts_only_where_it_ran(script: ModuleType, output: str, expected: str) -> None:
    on_cpu = {"int8.onnx": 41.0}
    if not expected:
        assert script.judged(output, "(CUDA)", on_cpu).endswith("int8.onnx 40.6 (41.0)")
        return
    with pytest.raises(script.FailedError, match=re.escape(expected)):
        script.judged(output, "(CUDA)", on_cpu)


def test_fp32_s_own_rounding_is_not_compared(script: ModuleType) -> None:
    assert script.judged(verified(118.0), "(CUDA)", {"int8.onnx": 130.0})
    with pytest.raises(script.FailedError, match=r"70\.0 dB"):
        script.judged(verified(70.0), "(CUDA)", {"int8.onnx": 130.0})


def measured(**changes: Any) -> str:
    """The JSON of `benchmark` for one engine at one batch."""
    row = {
        "label": "int8.engine",
        "runner": "tensorrt 10.13 on NVIDIA H100",
        "batch": 8,
        "latency": {"p50": {"value": 1.25}},
        "device": {"p50": {"value": 1.0}},
    }
    environment = {"note": "SM clock 1980 MHz"}
    found = {"config": {"batches": [8]}, "not_run": [], "environment": environment}
    return json.dumps({**found, "rows": [{**row}], **changes})


def test_latencies_are_those_of_the_gpu(script: ModuleType) -> None:
    text = script.latencies(measured(), "tensorrt ")
    assert text == "ms at batch 8: int8.engine 1.250 (GPU 1.000). SM clock 1980 MHz"
    with pytest.raises(script.FailedError, match="ran on tensorrt 10"):
        script.latencies(measured(), "tensorrt-rtx ")
    left = {"label": "fp8.engine", "batch": 8, "reason": "out of memory"}
    with pytest.raises(script.FailedError, match=r"fp8\.engine at batch 8: out of memory"):
        script.latencies(measured(not_run=[left]), "tensorrt ")


CASES = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no TensorRT")
def test_left(): pass
"""


def test_skipped_tests_are_not_passed(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(CASES)

    def counted(chosen: str) -> str:
        words = [sys.executable, "-m", "pytest", "-q", "-k", chosen, "--junitxml=x.xml"]
        subprocess.run([*words, "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True)
        return str(script.counted((tmp_path / "x.xml").read_text(), gpu=True))

    with pytest.raises(script.FailedError, match=r"1 passed, 1 failed, 1 skipped .*: test_bad"):
        counted("test")
    with pytest.raises(
        sys.modules["gpu_log"].NotRunError, match=r"0 passed, 0 failed, 1 skipped \(no TensorRT\)"
    ):
        counted("left")
    assert counted("good or left") == "1 passed, 0 failed, 1 skipped (no TensorRT)"


def test_a_form_that_clipdeploy_builds_must_not_overflow(script: ModuleType) -> None:
    def found(**changes: Any) -> str:
        ours = {"form": "channel", "ours": True, "built": True, "plan": "unknown"}
        return json.dumps([{**ours, "run": "does not", "error": 1e-3, "said": "", **changes}])

    def read(**changes: Any) -> str:
        return str(script.read_sums(found(**changes), fit=True))

    not_run = {"run": "not run", "error": None, "said": "no kernel image"}
    assert read() == "channel does not (error 1.0e-03)"
    assert read(ours=False, run="overflows")
    assert read(ours=False, **not_run)
    for changes in ({"run": "overflows"}, {"plan": "overflows"}, {"built": False}):
        with pytest.raises(script.FailedError, match="clipdeploy builds the channel form"):
            read(**changes)
    with pytest.raises(script.FailedError, match="no kernel image"):
        read(**not_run)
    with pytest.raises(sys.modules["gpu_log"].NotRunError, match="no kernel image"):
        script.read_sums(found(**not_run), fit=False)
