"""Opens, splits and decodes the images of a search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import DatasetError, UsageError
from clipdeploy.core.passport import Passport, Preprocess
from clipdeploy.imaging import ImageFolder, Labelling, iter_crops, stack_batches
from clipdeploy.imaging.labelled import open_labelled
from clipdeploy.tuning.search import SearchConfig
from clipdeploy.tuning.splits import Split, hash_images, split_images
from clipdeploy.verification.batches import shuffled
from clipdeploy.verification.leaks import Calibrated, refuse_leaks
from clipdeploy.verification.paired import images_needed, judge_drop
from exporters.samples import Samples

__all__ = ["Labelled", "check_enough", "labelled_batches", "make_splits"]

# Default of ``search_images``: half of the images, but no more than this.
_SEARCH_IMAGES = 1024

Labelled = tuple[Samples, NDArray[np.int64]]


def _open(
    data: Path, passport: Passport, labelling: Labelling, note: Callable[[str], object]
) -> ImageFolder:
    if passport.weights.kind == "random":
        raise UsageError(
            f"{passport.model} has random weights, so it has no accuracy to preserve",
            hint="export it again with a checkpoint",
        )
    if passport.embeds:
        raise UsageError(
            f"{passport.model} gives embeddings: a search preserves top-1, which they do not have",
            hint="clipdeploy bisect names the Linears that cost most; quantize --exclude leaves "
            "them in FP16",
        )
    images = open_labelled(data, passport, labelling, note)
    if not images.labelled:
        raise DatasetError(
            f"{data} has images without labels; a search needs them to measure accuracy",
            hint="put the images into class folders, or give a label file with --labels FILE",
        )
    return images


def make_splits(
    data: Path,
    confirm: Path | None,
    passport: Passport,
    config: SearchConfig,
    note: Callable[[str], object] = lambda text: None,
) -> tuple[Split, Split]:
    """The images to search on, and those to confirm on: the rest of ``data``, or ``confirm``.

    ``note`` is called with each irregularity of the images.

    Raises:
        UsageError: the model has random weights, or gives embeddings.
        DatasetError: images without labels, unreadable images, or none left to confirm on.
    """
    images = _open(data, passport, config.labelling, note)
    hashes = hash_images(images)
    if confirm is not None:
        others = _open(confirm, passport, config.labelling, note)
        return Split(images, hashes), Split(others, hash_images(others))
    count = config.search_images or min(len(set(hashes.values())) // 2, _SEARCH_IMAGES)
    return split_images(images, hashes, count, config.seed)


def check_enough(split: Split, config: SearchConfig, what: str) -> None:
    """Check that there are enough images to confirm a drop within ``max_drop``.

    Raises:
        DatasetError: too few; the message has the number needed.
    """
    count = len(split.images.entries)
    if judge_drop(0, 0, count, config.max_drop).verdict != "equivalent":
        needed = images_needed(0, 0, count, config.max_drop)
        raise DatasetError(
            f"{count} images to {what} on are too few to prove a drop within "
            f"{config.max_drop:g} points, even without any lost image: {needed:,} are needed",
            hint="give more images, or allow a larger --max-drop",
        )


def labelled_batches(
    split: Split, spec: Preprocess, batch: int, calibrated: Calibrated = Calibrated()
) -> Iterator[Labelled]:
    """Decode images in an order that mixes classes; yield batches of images and labels (B,).

    Raises:
        DatasetError: an image cannot be read, or has the same pixels as one of ``calibrated``.
    """

    def crops() -> Iterator[tuple[int | None, NDArray[np.uint8]]]:
        for crop in iter_crops(shuffled(split.images), spec):
            refuse_leaks(calibrated.leaks([crop]))
            yield crop.entry.label, crop.pixels

    for labels, pixels in stack_batches(crops(), batch):
        yield Samples(pixels, spec), np.asarray(labels, np.int64)
