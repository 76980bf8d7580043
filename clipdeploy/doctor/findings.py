"""Turns the facts of a machine into findings, each problem with the command that fixes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.table import Table
from rich.text import Text

from clipdeploy.core.display import Renderable, Shown
from clipdeploy.doctor.libraries import judge_onnxruntime, judge_tensorrt, judge_torch
from clipdeploy.doctor.machine import Machine
from clipdeploy.doctor.verdicts import Finding, Level, error, good, note, warning

__all__ = ["Diagnosis", "Finding", "Level", "diagnose"]

_OLDEST_PYTHON = (3, 11)
# Separate rules check these, because another package can replace them.
_CHECKED_SEPARATELY = {"torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx"}
# ViT-B needs 0.35 GB each for checkpoint and FP32 graph, 0.27 GB for the FP16 and INT8 graphs and
# 0.63 GB for engines.
_ENOUGH_SPACE, _MINIMUM_SPACE = 2.0e9, 0.4e9
# Turing is the oldest GPU that TensorRT 10 and CUDA 13 support (NVIDIA, "CUDA Compatibility").
_OLDEST_GPU = (7, 5)


@dataclass(frozen=True)
class Diagnosis(Shown):
    """All findings and the facts behind them; true if export, build and verify can run."""

    can_run: bool
    findings: tuple[Finding, ...]
    machine: Machine

    def __bool__(self) -> bool:
        return self.can_run

    def of(self, level: Level) -> tuple[Finding, ...]:
        """The findings of one level."""
        return tuple(finding for finding in self.findings if finding.level == level)

    def __rich__(self) -> Renderable:
        table = Table(box=None, pad_edge=False)
        for title in ("", "checked", "found", "fix"):
            table.add_column(title)
        for each in self.findings:
            table.add_row(*map(Text, (each.level, each.subject, each.text, each.mend)))
        return table


def diagnose(machine: Machine) -> Diagnosis:
    """Judge a machine, real or made by hand."""
    rules = (_python, _packages, judge_torch, judge_onnxruntime, judge_tensorrt, _gpus, _folders)
    findings = tuple(finding for rule in rules for finding in rule(machine))
    can_run = all(finding.level != "error" for finding in findings)
    return Diagnosis(can_run, findings, machine)


def _python(machine: Machine) -> Iterator[Finding]:
    version = ".".join(map(str, machine.python))
    if machine.python < _OLDEST_PYTHON:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        yield error(
            "Python",
            f"{version} is older than {oldest}",
            f"python{oldest} -m venv .venv && .venv/bin/pip install .",
        )
    else:
        yield good("Python", f"{version}, {machine.platform}")


def _packages(machine: Machine) -> Iterator[Finding]:
    matching = 0
    for text in machine.requirements:
        required = Requirement(text)
        mend = f'pip install "{text}"'
        version = machine.packages.get(canonicalize_name(required.name))
        if version is None:
            if required.name not in _CHECKED_SEPARATELY:
                yield error("packages", f"{required.name} is not installed", mend)
        elif not required.specifier.contains(version, prereleases=True):
            yield error("packages", f"{required.name} {version} does not match {text}", mend)
        else:
            matching += 1
    if matching:
        total = len(machine.requirements)
        yield good("packages", f"{matching} of {total} requirements are met")


def _gpus(machine: Machine) -> Iterator[Finding]:
    nvidia = machine.driver
    if nvidia:
        yield good("driver", f"{nvidia.version}, up to CUDA {nvidia.cuda}")
    for gpu in machine.gpus:
        if gpu.compute_capability < _OLDEST_GPU:
            yield error(
                "GPU",
                f"{gpu.name} ({gpu.sm}) is older than SM 7.5, which current TensorRT needs",
                "CUDA_VISIBLE_DEVICES=N clipdeploy ...  (N: a newer GPU; nvidia-smi -L lists them)",
            )
        else:
            yield good("GPU", f"{gpu.name}, {gpu.sm}")
    if machine.gpus:
        return
    if nvidia and machine.visible is not None:
        yield warning(
            "GPU",
            f"CUDA_VISIBLE_DEVICES={machine.visible!r} hides every GPU",
            "unset CUDA_VISIBLE_DEVICES",
        )
    elif nvidia:
        yield warning("GPU", "there is a driver, but CUDA finds no GPU", "nvidia-smi -L")
    else:
        yield note(
            "GPU",
            "none: graphs can be judged and engines built, but engines cannot run here",
            "clipdeploy verify --data IMAGENET_VAL  (on the machine that will serve)",
        )


def _folders(machine: Machine) -> Iterator[Finding]:
    for folder in machine.folders:
        where = f"{folder.path} ({folder.free_bytes / 1e9:.1f} GB free)"
        mend = (
            "export CLIPDEPLOY_HOME=/a/larger/disk"
            if folder.role == "cache"
            else "clipdeploy COMMAND --workspace /a/larger/disk"
        )
        if folder.problem:
            yield error(folder.role, f"{folder.path} cannot be written: {folder.problem}", mend)
        elif folder.free_bytes < _MINIMUM_SPACE:
            yield error(folder.role, f"{where}: too little for an FP32 graph (0.35 GB)", mend)
        elif folder.free_bytes < _ENOUGH_SPACE:
            yield warning(
                folder.role, f"{where}: a ViT-B in three precisions needs up to 2 GB", mend
            )
        else:
            yield good(folder.role, where)
