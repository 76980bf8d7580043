"""Finds out why PyTorch misses its published accuracy, by trying the usual causes one at a time.

Causes in the input (resize, mean and std, channel order) or in the numerics are tried on a sample
of the images, causes in the labels on the recorded answers. The likely cause is the one with the
largest gain, if the gain is significant (McNemar's exact test) and more than half of what is
missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.imaging import ImageFolder, Skipped, iter_crops, select, stack_batches
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel, reload_model
from clipdeploy.runners.torch import TorchRunner
from clipdeploy.verification.paired import mcnemar_exact
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.result import Baseline, Cause
from exporters.samples import normalise

__all__ = ["diagnose"]

_SAMPLE = 256
_BATCH = 16
_SIGNIFICANCE = 0.001
_ANY_ORDER = "some other order of the classes"
# Points: a learnt order also fits any simpler mistake in the labels.
_HANDICAP = 5.0

Right = NDArray[np.bool_]
Resize = Literal["published", "timm"]
Numerics = Literal["trained", "as-shipped"]


@dataclass(frozen=True)
class _Variant:
    """A model and its preprocessing with one thing changed."""

    what: str
    mend: str
    model: LoadedModel
    spec: Preprocess
    swap_channels: bool = False


def _variants(model: LoadedModel, spec: Preprocess) -> Iterator[_Variant]:
    recipe = model.recipe
    other: Resize = "timm" if recipe.resize == "published" else "published"
    resized = model.card.preprocess(replace(recipe, resize=other))
    if (resized.crop_pct, resized.crop_mode) != (spec.crop_pct, spec.crop_mode):
        changed = replace(spec, crop_pct=resized.crop_pct, crop_mode=resized.crop_mode)
        yield _Variant(f"resize as {other}", f"export with --resize {other}", model, changed)
    clip = spec.mean == CLIP_MEAN
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if clip else (CLIP_MEAN, CLIP_STD)
    origin = "ImageNet's" if clip else "CLIP's"
    numerics: Numerics = "as-shipped" if recipe.numerics == "trained" else "trained"
    mend = f"export with --numerics {numerics}"
    yield _Variant(f"{origin} mean and std", mend, model, replace(spec, mean=mean, std=std))
    shipped = replace(recipe, numerics=numerics)
    reloaded = reload_model(model.card, model.weights, shipped, complete=False)
    yield _Variant(f"LayerNorm eps and position grid {numerics}", mend, reloaded, spec)
    yield _Variant("red and blue exchanged", "the image files are BGR", model, spec, True)


def _answers(variant: _Variant, images: ImageFolder) -> dict[str, int]:
    """Return the top-1 answer to each readable image."""
    runner = TorchRunner(variant.model.module, variant.spec)
    order = slice(None, None, -1 if variant.swap_channels else 1)
    crops = (
        (crop.entry.name, crop.pixels[:, :, order])
        for crop in iter_crops(images, variant.spec, skipped=Skipped())
    )
    answers: dict[str, int] = {}
    for names, pixels in stack_batches(crops, _BATCH):
        logits = runner(normalise(pixels, variant.spec))
        answers.update(zip(names, logits.argmax(axis=1).tolist(), strict=True))
    return answers


def _relabelled(classes: int, names: Sequence[str]) -> Mapping[str, tuple[str, Sequence[int]]]:
    """Return mistakes in the order of classes: what each label would mean, and the remedy."""
    count = range(classes)
    orders: dict[str, tuple[str, Sequence[int]]] = {
        "labels counted from 1": ("subtract 1 from every label", [i - 1 for i in count]),
        "labels one too small": ("add 1 to every label", [i + 1 for i in count]),
        "labels in the order of their digits (0, 1, 10, 100, ...)": (
            "number the classes in the order of their numbers",
            sorted(count, key=str),
        ),
    }
    words = [label for _, label in cards.imagenet_classes()] if classes == 1000 else list(names)
    alphabetical = sorted(count, key=words.__getitem__) if len(words) == classes else []
    if alphabetical and alphabetical != list(count):
        orders["labels in the alphabetical order of their words"] = (
            "number the classes in the order of their WordNet IDs",
            alphabetical,
        )
    return orders


def _best_order(votes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what each label means: one to one, the label-answer pairs with most votes first.

    ``votes`` (K, K) counts the answers to the images of each label.  -1 for a label without votes.
    """
    order = np.full(len(votes), -1, np.int64)
    free = np.ones(len(votes), bool)
    for place in np.argsort(-votes, axis=None, kind="stable").tolist():
        label, answer = divmod(place, len(votes))
        if not votes[label, answer]:
            break
        if order[label] < 0 and free[answer]:
            order[label], free[answer] = answer, False
    return order


def _halves(records: Sequence[ImageRecord]) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Split the records: every other image of each label."""
    halves: tuple[list[ImageRecord], list[ImageRecord]] = ([], [])
    seen: Counter[int | None] = Counter()
    for record in records:
        halves[seen[record.label] % 2].append(record)
        seen[record.label] += 1
    return halves


def _permutation(records: Sequence[ImageRecord], classes: int) -> tuple[Right, Right]:
    """Return whether the reference's answers are right before and after a learnt order of classes.

    The order is learnt on one half of the records and applied to the other, whose (before, after)
    are returned, so that a gain is not overfitting.
    """
    learnt, tried = _halves(records)
    votes = np.zeros((classes, classes), np.int64)
    for record in learnt:
        if record.label is not None and record.reference.first is not None:
            votes[record.label, record.reference.first] += 1
    order = _best_order(votes)
    before = np.asarray([record.reference.right() for record in tried], bool)
    after = np.asarray(
        [r.label is not None and order[r.label] == r.reference.first for r in tried], bool
    )
    return before, after


def _cause(
    what: str, mend: str, before: Right, after: Right, published: float | None
) -> tuple[Cause, bool]:
    """Return a cause, and whether it is likely: a significant gain of most of what is missing."""
    if not len(after):
        return Cause(what, mend, 0.0, 0.0, 0), False
    top1, old = (100 * float(np.mean(right)) for right in (after, before))
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    real = gained > lost and mcnemar_exact(lost, gained) < _SIGNIFICANCE
    missing = (100.0 if published is None else published) - old
    return Cause(what, mend, top1, top1 - old, len(after)), real and top1 - old > missing / 2


def _label_causes(
    records: Sequence[ImageRecord],
    classes: int,
    names: Sequence[str],
    published: float | None,
) -> Iterator[tuple[Cause, bool]]:
    before = np.asarray([record.reference.right() for record in records], bool)
    for what, (mend, order) in _relabelled(classes, names).items():
        after = [r.label is not None and order[r.label] == r.reference.first for r in records]
        yield _cause(what, mend, before, np.asarray(after, bool), published)
    mend = "the label file and the model number the classes differently"
    yield _cause(_ANY_ORDER, mend, *_permutation(records, classes), published)


def _input_causes(
    model: LoadedModel,
    spec: Preprocess,
    images: ImageFolder,
    published: float | None,
    progress: Progress,
) -> Iterator[tuple[Cause, bool]]:
    sample = select(images, min(_SAMPLE, len(images.entries)), seed=0)
    labels = {entry.name: entry.label for entry in sample.entries}
    as_is = _answers(_Variant("", "", model, spec), sample)
    before = np.asarray([as_is[name] == labels[name] for name in as_is], bool)
    variants = list(_variants(model, spec))
    with progress.task("look for the cause", len(variants)) as advance:
        for variant in variants:
            found = _answers(variant, sample)
            after = np.asarray([found[name] == labels[name] for name in as_is], bool)
            yield _cause(variant.what, variant.mend, before, after, published)
            advance(1)


def diagnose(
    baseline: Baseline,
    model: LoadedModel,
    spec: Preprocess,
    images: ImageFolder | None,
    records: Sequence[ImageRecord],
    class_names: Sequence[str],
    progress: Progress = SILENT,
) -> Baseline:
    """Add the causes to a baseline that failed, and the likely one to its sentence.

    Args:
        images: labelled images; None if unavailable, then only label causes are tried.
        records: the reference's answers to them.

    Raises:
        ClipdeployError: the images or the weights can no longer be read.
    """
    published = baseline.published_top1
    tried = list(_label_causes(records, model.module.config.classes, class_names, published))
    if images is not None:
        tried += _input_causes(model, spec, images, published, progress)
    tried.sort(key=_by_gain)
    cause, sure = tried[0]
    likely = f"likely cause: {cause.what}, with which it is {cause.top1:.2f} % ({cause.mend})"
    if not sure:
        looked = "resize, mean and std, numerics, channels, class order"
        likely = f"none of the usual causes explains it ({looked})"
    return replace(
        baseline,
        sentence=f"{baseline.sentence}; {likely}",
        causes=tuple(cause for cause, _ in tried),
    )


def _by_gain(tried: tuple[Cause, bool]) -> tuple[bool, float]:
    cause, sure = tried
    handicap = _HANDICAP if cause.what == _ANY_ORDER else 0.0
    return not sure, handicap - cause.top1
