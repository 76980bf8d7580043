"""Reads what the checks of ``gpu_day.py`` print: a short text for the table, or what is wrong.

Every reader takes the standard output of a command with ``--json`` and raises
:class:`gpu_log.FailedError` if a number or a device is not as it should be, and
:class:`gpu_log.NotRunError` if nothing was computed.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from gpu_log import FailedError, NotRunError

BACKENDS = ("tensorrt", "tensorrt-rtx")
NO_GPU = "no GPU"
# Graphs of one precision differ between providers in the order of FP16 sums, and lose half of
# their amplitude if something is computed otherwise.
MOST_DB_LOST = 6.0
# Above this only FP32's own rounding is left, which differs between devices; TF32 has 70 dB.
ENOUGH_DB = 100.0
PACKAGES = ("numpy", "onnx", "onnx-ir", "polygraphy", "triton")


def describe(gpu: dict[str, Any] | None) -> str:
    """A GPU's name and compute capability."""
    if gpu is None:
        return NO_GPU
    return "{}, SM {}.{}".format(gpu["name"], *gpu["compute_capability"])


def facts(machine: dict[str, Any]) -> dict[str, str]:
    """What of ``doctor``'s report stands above the table."""
    driver, torch, ort = machine["driver"], machine["torch"], machine["onnxruntime"]
    found = {
        "GPU": "; ".join(map(describe, machine["gpus"])) or NO_GPU,
        "driver": f"{driver['version']}, CUDA {driver['cuda']}" if driver else "none",
        "Python": ".".join(map(str, machine["python"])) + f", {machine['platform']}",
        "torch": torch["version"] if torch else "none",
        "ONNX Runtime": f"{ort['version']}, CUDA {ort['cuda'] or 'none'}" if ort else "none",
    }
    for backend in BACKENDS:
        known = machine[backend.replace("-", "_")]
        found[backend] = known["version"] if known else "not installed"
    known = machine["packages"]
    listed = [f"{name} {known[name]}" for name in PACKAGES if name in known]
    return {**found, "packages": ", ".join(listed)}


def troubles(
    findings: Sequence[dict[str, Any]], backends: Collection[str]
) -> tuple[list[str], bool]:
    """What ``doctor`` warns of, and whether that includes an error.

    That there is no TensorRT is no error here: what needs one is not run.
    """
    found = [each for each in findings if each["level"] in ("warning", "error")]
    wrong = any(
        each["level"] == "error" and (backends or each["subject"] != "TensorRT") for each in found
    )
    return [each["text"] for each in found], wrong


def verdicts(output: str) -> dict[str, dict[str, Any]]:
    """The rows of `verify`, by the artifact's name."""
    return {Path(row["artifact"]).name: row for row in json.loads(output)["rows"]}


def decibels(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The SQNR in dB of each artifact that was run, without those that equal PyTorch exactly."""
    found = {name: row["fidelity"]["sqnr_db"] for name, row in rows.items() if row["fidelity"]}
    return {name: value for name, value in found.items() if value is not None}


def judged(output: str, runner: str = "", beside: dict[str, float] | None = None) -> str:
    """The dB of each artifact that `verify` judged.

    Raises:
        FailedError: some are not equivalent to PyTorch, or did not run on ``runner``, or have
            fewer dB than ``beside`` gives.
    """
    rows, other = verdicts(output), beside or {}
    found = decibels(rows)
    cells = (
        f"{name} {value:.1f}" + (f" ({other[name]:.1f})" if name in other else "")
        for name, value in found.items()
    )
    text = f"dB{' (on the CPU)' if other else ''}: {', '.join(cells)}"
    wrong: dict[str, list[str]] = {}
    for name, row in rows.items():
        if why := fault(row, runner, other.get(name)):
            wrong.setdefault(why, []).append(name)
    if wrong:
        whole = (f"{', '.join(names)} {why}" for why, names in wrong.items())
        raise FailedError("; ".join([*whole, text]))
    return text


def fault(row: dict[str, Any], runner: str, on_cpu: float | None) -> str:
    """What is wrong with a row of `verify`; empty if nothing is."""
    if not row["fidelity"]:
        return f"did not run: {row['reason']}"
    if runner not in row["runner"]:
        return f"ran on {row['runner']}"
    if row["verdict"] != "equivalent":
        return f"{row['verdict']}: {row['reason']}"
    value = row["fidelity"]["sqnr_db"]
    if value is None or on_cpu is None or value >= min(on_cpu - MOST_DB_LOST, ENOUGH_DB):
        return ""
    return f"{value:.1f} dB, {on_cpu:.1f} on the CPU"


def read_engine(output: str, precision: str) -> str:
    """Megabytes and seconds of an engine.

    Raises:
        FailedError: it has another precision.
    """
    made = json.loads(output)["passport"]
    if made["graph"]["precision"] != precision:
        raise FailedError(f"the engine is {made['graph']['precision']}, not {precision}")
    return f"{made['plan_bytes'] / 1e6:.1f} MB, built in {made['build_seconds']:.1f} s"


def latencies(output: str, runner: str) -> str:
    """The median milliseconds of each artifact at each batch, of the GPU alone if it says.

    Raises:
        FailedError: one did not run, or ran elsewhere than on ``runner``.
    """
    found = json.loads(output)
    for left in found["not_run"]:
        raise FailedError(f"{left['label']} at batch {left['batch']}: {left['reason']}")
    cells: dict[str, list[str]] = {}
    for row in found["rows"]:
        if runner not in row["runner"]:
            raise FailedError(f"{row['label']} ran on {row['runner']}")
        cell = f"{row['latency']['p50']['value']:.3f}"
        if row["device"]:
            cell += f" (GPU {row['device']['p50']['value']:.3f})"
        cells.setdefault(row["label"], []).append(cell)
    batches = "/".join(map(str, found["config"]["batches"]))
    listed = "; ".join(f"{label} {', '.join(each)}" for label, each in cells.items())
    return f"ms at batch {batches}: {listed}. {found['environment']['note']}"


def counted(report: str, gpu: bool) -> str:
    """The number of tests by result in pytest's XML.

    Raises:
        FailedError: a test failed; it is named.
        NotRunError: all tests were skipped.
    """
    cases = list(ET.fromstring(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    reasons = [found.get("message", "") for c in cases if (found := c.find("skipped")) is not None]
    passed = len(cases) - len(failed) - len(reasons)
    why = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
    text = f"{passed} passed, {len(failed)} failed, {len(reasons)} skipped{why}"
    if failed:
        raise FailedError(f"{text}: {', '.join(c.get('name', '') for c in failed)}")
    if not passed:
        raise NotRunError(text if gpu else f"{NO_GPU}: {text}")
    return text


def read_gemm(output: str) -> str:
    """The gains of INT8 in scripts/bench/gemm.py."""
    found = json.loads(output)

    def cell(row: dict[str, Any]) -> str:
        guess = "" if row["estimate"] is None else f", estimate {row['estimate']:.2f}"
        alone, whole = row["fp16"] / row["int8"], row["fp16_pass"] / row["int8_pass"]
        return f"{row['linear']} {row['rows']} {alone:.2f}, with pass {whole:.2f}{guess}"

    shares = [row["int8_of_peak"] for row in found["rows"] if row["int8_of_peak"] is not None]
    best = f"; INT8 reaches {100 * max(shares):.0f} % of its peak at most" if shares else ""
    cells = "; ".join(map(cell, found["rows"]))
    fused = "" if found["fused"] else " (pass not fused: no Triton)"
    return f"copy {found['copy_gb_s']:.0f} GB/s{best}; FP16 / INT8{fused}: {cells}"


def read_sums(output: str, *, fit: bool) -> str:
    """What scripts/bench/sums.py found for each form; ``fit`` is whether engines can run here.

    Raises:
        FailedError: a form that clipdeploy builds overflows, or did not run although it can.
        NotRunError: nothing ran, because nothing can.
    """
    found = json.loads(output)
    text = "; ".join(
        f"{each['form']} {each['run']}"
        + ("" if each["error"] is None else f" (error {each['error']:.1e})")
        + ("" if each["plan"] == "unknown" else f", by its plan {each['plan']}")
        for each in found
    )
    said = dict.fromkeys(each["said"] for each in found if each["said"])
    text = ". ".join([text, *said])
    if wrong := [each["form"] for each in found if each["ours"] and overflows(each)]:
        raise FailedError(f"clipdeploy builds the {' and '.join(wrong)} form: {text}")
    if any(each["run"] == "not run" for each in found if each["ours"]):
        raise FailedError(text) if fit else NotRunError(text)
    return text


def overflows(found: dict[str, Any]) -> bool:
    """Whether a form overflows, by its run or its plan, or could not be built."""
    return not found["built"] or "overflows" in (found["run"], found["plan"])
