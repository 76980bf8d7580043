"""Which artifacts a benchmark can measure at which batches, and why it cannot measure the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.benchmark.rounds import Contender, random_images
from clipdeploy.core.errors import ArtifactError, ClipdeployError, EngineError
from clipdeploy.core.passport import Passport
from clipdeploy.engines.passport import read_engine_passport
from clipdeploy.runners import Runner
from clipdeploy.workspace.folder import PRECISIONS, Workspace
from clipdeploy.workspace.passports import check_made_from, checked_passport, is_vouched
from exporters.headers import read_passport

__all__ = ["ENGINE", "GRAPH", "NotRun", "line_up", "models_of", "short_labels", "workspace_files"]

ENGINE, GRAPH = ".engine", ".onnx"


@dataclass(frozen=True)
class NotRun:
    """An artifact, or one batch of it, that was not measured, and why."""

    artifact: str
    label: str
    batch: int | None
    reason: str


def _short(path: Path) -> str:
    return ".".join(path.name.split(".")[-2:])


def short_labels(paths: Sequence[Path]) -> list[str]:
    """A name for each: ``int8.onnx`` where that tells them apart, else more of the path."""
    for name in (_short, lambda path: path.name, str):
        labels = [name(path) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    # The same file twice is a fair question: how far are equals apart?
    return [f"{_short(path)} #{number}" for number, path in enumerate(paths, 1)]


def models_of(paths: Sequence[Path]) -> str:
    """The models that the passports name, with commas; a file without a passport names none."""
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
    """Why ``path`` does not count as made from its neighbours; empty if it does."""
    try:
        # The runner compares the engine's bytes when it loads them.
        engine = checked_passport(path, reference, plan=False).engine
        if engine is not None:
            check_made_from(path, engine.hashes.graph, path.with_suffix(GRAPH))
    except ClipdeployError as error:
        return error.message
    return ""


def _check_named(path: Path) -> None:
    """Compare a passport with its card and its own file, whatever lies beside it.

    What has no file or no passport is left to whoever opens it.
    """
    if path.is_file() and is_vouched(path):
        checked_passport(path, plan=False, neighbours=False)


def workspace_files(
    workspace: Workspace, model: str, *, trust: bool
) -> tuple[list[Path], dict[Path, str]]:
    """Every graph and engine of a model, and why some are refused.

    See :mod:`clipdeploy.workspace.passports` for the checks.  ``trust`` loads engines unchecked.

    Raises:
        UsageError: the model has not been exported in the workspace.
        ArtifactError, GraphError, FileError: its FP32 graph cannot be read, or is not what its
            passport says.
    """
    source, reference = workspace.source(model)
    graphs = [workspace.graph(model, precision) for precision in (*PRECISIONS, "int8-cpu")]
    engines = [workspace.engine(model, precision) for precision in PRECISIONS]
    found = [path for path in (*graphs, *engines) if path.exists()]
    taken = {source, *(engines if trust else ())}
    reasons = {path: _refusal(path, reference) for path in found if path not in taken}
    return found, {path: reason for path, reason in reasons.items() if reason}


def _contender(path: Path, label: str, runner: Runner, batch: int, seed: int) -> Contender:
    low, high = runner.batches
    if batch < low or (high is not None and batch > high):
        kind = "engine" if path.suffix == ENGINE else "graph"
        takes = f"{low} or more" if high is None else f"{low} to {high}"
        takes = f"exactly {low}" if low == high else takes
        raise EngineError(f"not possible: the {kind} takes {takes}")
    return Contender(path, label, runner, random_images(runner.input, batch, seed))


def line_up(
    paths: Sequence[Path],
    batches: Sequence[int],
    open_one: Callable[[Path], Runner],
    stack: ExitStack,
    *,
    refused: Mapping[Path, str],
    seed: int,
) -> tuple[list[Contender], list[NotRun]]:
    """Every artifact at every batch that it takes, and what is left out; ``stack`` closes them."""
    contenders: list[Contender] = []
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
                contenders.append(_contender(path, label, runner, batch, seed))
            except ClipdeployError as error:
                not_run.append(NotRun(str(path), label, batch, error.message))
    return contenders, not_run
