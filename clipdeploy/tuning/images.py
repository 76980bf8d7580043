"""The images of a search: opened, split, decoded."""

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

# Half of the images at most, and no more than these, are searched on if nobody says otherwise.
_SEARCH_IMAGES = 1024

Labelled = tuple[Samples, NDArray[np.int64]]


def _open(
    data: Path, passport: Passport, labelling: Labelling, note: Callable[[str], object]
) -> ImageFolder:
    if passport.weights.kind == "random":
        raise UsageError(
            f"{passport.model} has random weights: it has no accuracy to keep",
            hint="export it with a checkpoint",
        )
    images = open_labelled(data, passport, labelling, note)
    if not images.labelled:
        raise DatasetError(
            f"{data} has images without labels: accuracy cannot be searched for",
            hint="class folders, or a label file: --labels FILE",
        )
    return images


def make_splits(
    data: Path,
    confirm: Path | None,
    passport: Passport,
    config: SearchConfig,
    note: Callable[[str], object] = lambda text: None,
) -> tuple[Split, Split]:
    """The images to search on, and those to confirm on: the rest, or ``confirm``.

    ``note`` is told what is odd about them.

    Raises:
        UsageError: the model has random weights.
        DatasetError: no labels, unreadable images, or none left to confirm on.
    """
    images = _open(data, passport, config.labelling, note)
    hashes = hash_images(images)
    if confirm is not None:
        others = _open(confirm, passport, config.labelling, note)
        return Split(images, hashes), Split(others, hash_images(others))
    wanted = config.search_images or min(len(set(hashes.values())) // 2, _SEARCH_IMAGES)
    return split_images(images, hashes, wanted, config.seed)


def check_enough(split: Split, config: SearchConfig, what: str) -> None:
    """Refuse so few images that no result could ever be confirmed.

    Raises:
        DatasetError: with the number that it takes.
    """
    count = len(split.images.entries)
    if judge_drop(0, 0, count, config.max_drop).verdict != "equivalent":
        needed = images_needed(0, 0, count, config.max_drop)
        raise DatasetError(
            f"{count} images to {what} on cannot show a drop within {config.max_drop:g} points, "
            f"not even of a perfect copy: {needed:,} can",
            hint="give more images, or allow a larger --max-drop",
        )


def labelled_batches(
    split: Split, spec: Preprocess, batch: int, calibrated: Calibrated = Calibrated()
) -> Iterator[Labelled]:
    """Decoded images, their classes mixed, and their labels (B,), ``batch`` at once.

    Raises:
        DatasetError: an image cannot be read, or has the pixels of one of ``calibrated``.
    """

    def crops() -> Iterator[tuple[int | None, NDArray[np.uint8]]]:
        for crop in iter_crops(shuffled(split.images), spec):
            refuse_leaks(calibrated.leaks([crop]))
            yield crop.entry.label, crop.pixels

    for labels, pixels in stack_batches(crops(), batch):
        yield Samples(pixels, spec), np.asarray(labels, np.int64)
