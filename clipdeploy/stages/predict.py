"""Classifies images with any artifact, or compares them with texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
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
from clipdeploy.stages.texts import EmbeddedTexts, embed_texts
from clipdeploy.verification.targets import Target, named_targets
from clipdeploy.workspace.folder import PRECISIONS, Workspace
from clipdeploy.workspace.passports import checked_passport
from exporters.providers import cuda_problem
from exporters.samples import Samples

__all__ = ["Guess", "Prediction", "Predictions", "predict_images"]

_BATCH = 16


@dataclass(frozen=True)
class Guess:
    """A class: its index, the name of its folder, its label, and its softmax in percent.

    For an embedding model it is a text, ``name`` and ``label`` alike, and ``cosine`` its cosine
    with the image; None for a class.
    """

    index: int
    name: str
    label: str
    percent: float
    cosine: float | None = None


@dataclass(frozen=True)
class Prediction:
    """An image and its classes, the most likely one first."""

    image: str
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Predictions(Shown):
    """The predictions of an artifact, and the runner that ran it.

    ``problems`` has a sentence for each finding about the folders, archives and texts, such as
    files that are not images.  ``text_artifact`` embedded the texts; empty for a classifier.
    """

    model: str
    artifact: str
    runner: str
    images: tuple[Prediction, ...]
    problems: tuple[str, ...] = ()
    text_artifact: str = ""

    def __rich__(self) -> Renderable:
        parts: list[Text | Table] = []
        for found in self.images:
            table = Table(box=None, pad_edge=False, show_header=False)
            table.add_column(justify="right")
            for guess in found.guesses:
                same = guess.label == guess.name
                named = guess.label if same else f"{guess.label} ({guess.name})"
                cosine = () if guess.cosine is None else (f"{guess.cosine:7.4f}",)
                table.add_row(f"{guess.percent:6.2f} %", *cosine, Text(printable(named)))
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


def _largest(logits: NDArray[np.floating], top: int) -> list[tuple[int, float]]:
    """The indices of the ``top`` largest of the logits (K,), and their softmax in percent."""
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")[:top]
    return [(i, 100 * float(shares[i])) for i in order.tolist()]


# A row of an artifact's output -> the answers to the image.
_Answers = Callable[[NDArray[np.float32]], tuple[Guess, ...]]


def _of_classes(target: Target, top: int) -> _Answers:
    words = _words(target)
    return lambda row: tuple(Guess(i, *words[i], share) for i, share in _largest(row, top))


def _of_texts(texts: EmbeddedTexts, top: int) -> _Answers:
    def answers(row: NDArray[np.float32]) -> tuple[Guess, ...]:
        cosines = texts.cosines(row)
        return tuple(
            Guess(i, texts.texts[i], texts.texts[i], share, float(cosines[i]))
            for i, share in _largest(texts.logit_scale * cosines, top)
        )

    return answers


def _embedded(target: Target, folder: Path, texts: Sequence[str]) -> EmbeddedTexts | None:
    """The texts to compare an embedding model's images with; None for a classifier."""
    model = target.passport.model
    if target.passport.embeds and not texts:
        raise UsageError(
            f"{model} gives embeddings, not classes: its images are compared with texts",
            hint="pass --texts FILE or --text TEXT",
        )
    if texts and not target.passport.embeds:
        raise UsageError(
            f"{model} gives logits of its classes, and cannot be compared with texts",
            hint="leave out the texts, or name an embedding model",
        )
    return embed_texts(folder, target.passport, texts) if texts else None


def _predictions(
    runner: Runner, target: Target, files: Iterator[tuple[str, bytes]], answers: _Answers
) -> Iterator[Prediction]:
    spec = target.passport.preprocess
    crops = ((name, crop_file(data, name, spec)) for name, data in files)
    for names, pixels in stack_batches(crops, _BATCH):
        batch = Samples(pixels, spec).as_input(runner.input)
        for name, logits in zip(names, runner(batch), strict=True):
            if not np.isfinite(logits).all():
                raise EngineError(
                    f"{target.path} gives NaN or infinite numbers for {name}",
                    hint="it is damaged or overflows; clipdeploy verify shows where",
                )
            yield Prediction(name, answers(logits))


@takes_any_name
def predict_images(
    workspace: Workspace,
    model: str | None,
    paths: StrPath | Iterable[StrPath],
    artifact: StrPath | None = None,
    *,
    texts: Sequence[str] = (),
    top: int = 5,
    progress: Progress = SILENT,
) -> Predictions:
    """The ``top`` most likely classes of image files, or of all images in folders and archives.

    The images of an embedding model are compared with ``texts`` instead, which the text tower
    beside it embeds, see :mod:`clipdeploy.stages.texts`.  ``artifact`` is a graph or an engine, by
    default the model's fastest one that runs here.  ``model`` may be None if the artifact has a
    passport.  The classes of a graph without a passport are numbers, because the model's names may
    not be theirs.

    Raises:
        UsageError: an embedding model without texts, or texts for another model.
        ClipdeployError: see :mod:`clipdeploy.core.errors`; also if an image cannot be read.
    """
    TOP.check(top, "top")
    paths = as_paths(paths)
    artifact = as_path(artifact)
    target = _target(workspace, model, artifact)
    folder = target.path.parent if model is None else workspace.folder(model)
    with progress.task("embed the texts") if texts else nullcontext():
        embedded = _embedded(target, folder, texts)
    answers = _of_texts(embedded, top) if embedded else _of_classes(target, top)
    foreign = None if target.vouched else target.passport
    runner = open_runner(target.path, passport=foreign)
    try:
        with progress.task("predict"):
            problems: list[str] = []
            found = tuple(_predictions(runner, target, _files(paths, problems), answers))
    finally:
        runner.close()
    return Predictions(
        target.passport.model,
        str(target.path),
        runner.name,
        found,
        (*problems, *(embedded.notes if embedded else ())),
        str(embedded.artifact) if embedded else "",
    )
