"""Classifies images with any artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipdeploy.core.device import gpus
from clipdeploy.core.display import Renderable, Shown
from clipdeploy.core.errors import EngineError, UsageError
from clipdeploy.core.files import read_regular
from clipdeploy.core.passport import Precision
from clipdeploy.core.paths import StrPath, as_path, as_paths
from clipdeploy.core.printable import printable
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.core.spans import TOP
from clipdeploy.imaging import open_images, stack_batches, survey
from clipdeploy.imaging.preprocess import crop_file
from clipdeploy.models import cards
from clipdeploy.models.cards import takes_any_name
from clipdeploy.runners import Runner, open_runner
from clipdeploy.verification.targets import Target, named_targets
from clipdeploy.workspace.folder import PRECISIONS, Workspace
from clipdeploy.workspace.passports import checked_passport
from exporters.providers import cuda_problem
from exporters.samples import Samples

__all__ = ["Guess", "Prediction", "Predictions", "predict_images"]

_BATCH = 16


@dataclass(frozen=True)
class Guess:
    """A class: its index, the name of its folder, its label, and its softmax in percent."""

    index: int
    name: str
    label: str
    percent: float


@dataclass(frozen=True)
class Prediction:
    """An image and its classes, the most likely one first."""

    image: str
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Predictions(Shown):
    """The predictions of an artifact, and the runner that ran it.

    ``problems`` has a sentence for each finding about the folders and archives, such as files that
    are not images.
    """

    model: str
    artifact: str
    runner: str
    images: tuple[Prediction, ...]
    problems: tuple[str, ...] = ()

    def __rich__(self) -> Renderable:
        parts: list[Text | Table] = []
        for found in self.images:
            table = Table(box=None, pad_edge=False, show_header=False)
            table.add_column(justify="right")
            for guess in found.guesses:
                same = guess.label == guess.name
                named = guess.label if same else f"{guess.label} ({guess.name})"
                table.add_row(f"{guess.percent:6.2f} %", Text(printable(named)))
            parts += [Text(printable(found.image), style="bold"), table]
        return Group(*parts)


def _by_speed(workspace: Workspace, model: str) -> Iterator[Path]:
    """The artifacts of a model that may run here, the fastest first."""
    if gpus():
        yield from (workspace.engine(model, precision) for precision in reversed(PRECISIONS))
    # INT8 for the CPU does not run on a GPU.
    graphs: tuple[Precision, ...] = ("int8-cpu", "fp32") if cuda_problem() else ("fp16", "fp32")
    yield from (workspace.graph(model, precision) for precision in graphs)


def _default(workspace: Workspace, model: str) -> Path:
    """The fastest artifact that runs here: an engine with a GPU, else a graph."""
    source, _ = workspace.source(model)
    return next((path for path in _by_speed(workspace, model) if path.exists()), source)


def _target(workspace: Workspace, model: str | None, artifact: Path | None) -> Target:
    if model is not None:
        _, reference = workspace.source(model)
        return named_targets([artifact or _default(workspace, model)], reference, trust=False)[0]
    if artifact is None:
        raise UsageError("neither a model nor an artifact was given", hint="give one of them")
    found = checked_passport(artifact)
    return Target(artifact, "engine" if found.engine else "graph", found.graph)


def _files(paths: Sequence[Path], problems: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and bytes of each image; append findings about the folders to ``problems``."""
    for path in paths:
        archive = path.suffix in (".zip", ".tar") and path.is_file()
        if not (archive or path.is_dir()):
            yield str(path), read_regular(path)
            continue
        images = open_images(path)
        problems += survey(images).problems()
        reader = images.reader()
        try:
            for entry in images.entries:
                yield f"{path}/{entry.name}", reader.read(entry.name)
        finally:
            reader.close()


def _words(target: Target) -> list[tuple[str, str]]:
    """Folder name and label of each class; its number if it has no name."""
    passport = target.passport
    # Without a passport the names may belong to other weights.
    stated = passport.class_names if target.vouched else ()
    known = cards.class_names(cards.find(passport.model))
    if tuple(name for name, _ in known) == stated:
        return list(known)
    names = stated or [str(i) for i in range(passport.classes)]
    return [(name, name) for name in names]


def _guesses(
    logits: NDArray[np.float32], words: Sequence[tuple[str, str]], top: int
) -> tuple[Guess, ...]:
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")[:top]
    return tuple(Guess(i, words[i][0], words[i][1], 100 * float(shares[i])) for i in order.tolist())


def _predictions(
    runner: Runner, target: Target, files: Iterator[tuple[str, bytes]], top: int
) -> Iterator[Prediction]:
    words = _words(target)
    spec = target.passport.preprocess
    crops = ((name, crop_file(data, name, spec)) for name, data in files)
    for names, pixels in stack_batches(crops, _BATCH):
        batch = Samples(pixels, spec).as_input(runner.input)
        for name, logits in zip(names, runner(batch), strict=True):
            if not np.isfinite(logits).all():
                raise EngineError(
                    f"{target.path} gives NaN or infinite logits for {name}",
                    hint="it is damaged or overflows; clipdeploy verify shows where",
                )
            yield Prediction(name, _guesses(logits, words, top))


@takes_any_name
def predict_images(
    workspace: Workspace,
    model: str | None,
    paths: StrPath | Iterable[StrPath],
    artifact: StrPath | None = None,
    *,
    top: int = 5,
    progress: Progress = SILENT,
) -> Predictions:
    """The ``top`` most likely classes of image files, or of all images in folders and archives.

    ``artifact`` is a graph or an engine, by default the model's fastest one that runs here.
    ``model`` may be None if the artifact has a passport.  The classes of a graph without a passport
    are numbers, because the model's names may not be theirs.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`; also if an image cannot be read.
    """
    TOP.check(top, "top")
    paths = as_paths(paths)
    artifact = as_path(artifact)
    target = _target(workspace, model, artifact)
    foreign = None if target.vouched else target.passport
    runner = open_runner(target.path, passport=foreign)
    try:
        with progress.task("predict"):
            problems: list[str] = []
            found = tuple(_predictions(runner, target, _files(paths, problems), top))
    finally:
        runner.close()
    return Predictions(target.passport.model, str(target.path), runner.name, found, tuple(problems))
