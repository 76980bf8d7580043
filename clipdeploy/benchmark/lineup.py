"""Selects the artifacts and batches that can be measured, and explains why others cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.benchmark.rounds import Case, random_images
from clipdeploy.core.errors import ArtifactError, ClipdeployError, EngineError
from clipdeploy.core.passport import Passport
from clipdeploy.engines.passport import read_engine_passport
from clipdeploy.runners import Runner
from clipdeploy.runners.base import BatchRange, batch_ranges, runs_at_once
from clipdeploy.workspace.folder import PRECISIONS, Workspace
from clipdeploy.workspace.passports import check_made_from, checked_passport, is_vouched
from exporters.headers import read_passport

__all__ = [
    "ENGINE",
    "GRAPH",
    "NotRun",
    "models_of",
    "open_cases",
    "short_labels",
    "workspace_files",
]

ENGINE, GRAPH = ".engine", ".onnx"


@dataclass(frozen=True)
class NotRun:
    """An artifact, or one batch of it, that was not measured, and the reason."""

    artifact: str
    label: str
    batch: int | None
    reason: str


def _short(path: Path) -> str:
    return ".".join(path.name.split(".")[-2:])


def short_labels(paths: Sequence[Path]) -> list[str]:
    """A label for each file: ``int8.onnx`` if these are unique, otherwise more of the path."""
    for name in (_short, lambda path: path.name, str):
        labels = [name(path) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    # The same file may be given twice, to see how much equal artifacts differ.
    return [f"{_short(path)} #{number}" for number, path in enumerate(paths, 1)]


def models_of(paths: Sequence[Path]) -> str:
    """The models in the passports of the files, separated by commas."""
    found: list[str] = []
    for path in paths:
        try:
            engine = path.suffix == ENGINE
            passport = read_engine_passport(path).graph if engine else read_passport(path)
        except ClipdeployError:
            continue
        found.append(passport.model)
    return ", ".join(dict.fromkeys(found))


def _refusal(path: Path, reference: Passport) -> str:
    """Why ``path`` was not made from the files next to it; empty if it was."""
    try:
        # The runner compares the engine's bytes when it loads them.
        engine = checked_passport(path, reference, plan=False).engine
        if engine is not None:
            check_made_from(path, engine.hashes.graph, path.with_suffix(GRAPH))
    except ClipdeployError as error:
        return error.message
    return ""


def _check_named(path: Path) -> None:
    """Compare the passport of a file with its card and its bytes, if it has one.

    A missing file or passport is reported when the runner opens the file.
    """
    if path.is_file() and is_vouched(path):
        checked_passport(path, plan=False, neighbours=False)


def workspace_files(
    workspace: Workspace, model: str, *, trust: bool
) -> tuple[list[Path], dict[Path, str]]:
    """Every graph and engine of a model, and the reasons why some are refused.

    See :mod:`clipdeploy.workspace.passports` for the checks.  ``trust`` skips them for engines.

    Raises:
        UsageError: the model has not been exported in the workspace.
        ArtifactError, GraphError, FileError: the FP32 graph cannot be read, or does not match its
            passport.
    """
    source, reference = workspace.source(model)
    graphs = [workspace.graph(model, precision) for precision in (*PRECISIONS, "int8-cpu")]
    engines = [workspace.engine(model, precision) for precision in PRECISIONS]
    found = [path for path in (*graphs, *engines) if path.exists()]
    unchecked = {source, *(engines if trust else ())}
    reasons = {path: _refusal(path, reference) for path in found if path not in unchecked}
    return found, {path: reason for path, reason in reasons.items() if reason}


def _named(batches: BatchRange) -> str:
    low, high = batches
    if high is None:
        return f"{low} or more"
    return f"exactly {low}" if low == high else f"{low} to {high}"


def _case(path: Path, label: str, runner: Runner, batch: int, seed: int) -> Case:
    # A padded batch would be timed as a larger one.
    if not runs_at_once(runner, batch):
        kind = "engine" if path.suffix == ENGINE else "graph"
        accepted = " or ".join(map(_named, batch_ranges(runner)))
        raise EngineError(f"not possible: the {kind} takes {accepted}")
    return Case(path, label, runner, random_images(runner.input, batch, seed))


def open_cases(
    paths: Sequence[Path],
    batches: Sequence[int],
    open_one: Callable[[Path], Runner],
    stack: ExitStack,
    *,
    refused: Mapping[Path, str],
    seed: int,
) -> tuple[list[Case], list[NotRun]]:
    """Open every artifact, and pair it with every batch that it accepts.

    The second result lists what was left out.  ``stack`` closes the runners.
    """
    cases: list[Case] = []
    not_run: list[NotRun] = []
    for path, label in zip(paths, short_labels(paths), strict=True):
        try:
            if path in refused:
                raise ArtifactError(refused[path])
            _check_named(path)
            runner = open_one(path)
        except ClipdeployError as error:
            not_run.append(NotRun(str(path), label, None, error.message))
            continue
        stack.callback(runner.close)
        for batch in batches:
            try:
                cases.append(_case(path, label, runner, batch, seed))
            except ClipdeployError as error:
                not_run.append(NotRun(str(path), label, batch, error.message))
    return cases, not_run
