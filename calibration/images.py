"""Checks calibration images: ranges found on blank, repeated or unusual images fit no others.

What is measured on the 8 x 8 grey means g of each image, with its mean removed:

    contrast      the standard deviation of g over all images
    structure     r = sum of products of neighbours in g / sum of as many squares

Neighbouring parts of a picture resemble each other, those of noise do not: r is 0 for noise of any
grain up to an eighth of the image.  And on the stored crops:

    detail        share of the variance that is inside cells of 8 x 8 pixels

which is small if the images are blurred or were enlarged.  ``scripts/bench/calibration_images.py``
prints these of digits, photographs, and both with faults.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from calibration.table import CalibrationTable, Finding
from clipdeploy.core.errors import CalibrationError

__all__ = ["check_images", "detail", "flatness", "image_findings", "is_flat", "structure"]

# An eighth of the 256 grey levels; uniform grey means have a standard deviation of 74.
_FLAT_LEVELS = 32.0
# An image whose grey means vary by less than one level has a single colour.
_BLANK_LEVELS = 1.0
# With this many different pictures, copies do no harm.
_ENOUGH = 32
# Share of the images from which on copies, blank images or noise are reported.
_SHARE = 0.1
# Noise has 0 with a standard deviation of 0.1; the least of 700 digits is 0.43, of photographs 0.3.
_STRUCTURE = 0.2
# Of photographs 0.13 in the median, with a Gaussian blur of 8 pixels 0.008.
_DETAIL = 0.01
_CELL = 8
# The digits of clip-vit-demo are enlarged by 4.
_ENLARGED = 4
_EDGE = 8

F64 = NDArray[np.float64]


def _thumbnails(table: CalibrationTable) -> NDArray[np.uint8]:
    """The 8 x 8 grey means of the N images with known pixels, uint8 (N, 64)."""
    data = b"".join(image.thumbnail for image in table.images)
    return np.frombuffer(data, np.uint8).reshape(-1, _EDGE * _EDGE)


def flatness(table: CalibrationTable) -> float | None:
    """Standard deviation of the grey means over all images; None if unknown."""
    thumbnails = _thumbnails(table)
    return float(thumbnails.std()) if len(thumbnails) else None


def is_flat(table: CalibrationTable) -> bool:
    """Whether the images are known to be dim or to have little contrast."""
    spread = flatness(table)
    return spread is not None and spread < _FLAT_LEVELS


def structure(thumbnails: NDArray[np.uint8]) -> F64:
    """The correlation of neighbours in grey means (N, 64), for each image that is not blank."""
    grey = thumbnails.reshape(-1, _EDGE, _EDGE).astype(np.float64)
    grey = grey[grey.std(axis=(1, 2)) >= _BLANK_LEVELS]
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    across = (grey[:, :, 1:] * grey[:, :, :-1]).mean(axis=(1, 2))
    down = (grey[:, 1:] * grey[:, :-1]).mean(axis=(1, 2))
    return np.asarray((across + down) / 2 / np.square(grey).mean(axis=(1, 2)))


def detail(crops: NDArray[np.uint8]) -> F64:
    """Share of the variance inside cells of 8 x 8 pixels, for each of the crops (N, S, S, 3).

    Crops of a single colour, and those smaller than two cells, are left out.
    """
    count = crops.shape[1] // _CELL
    edge = count * _CELL
    if count < 2:
        return np.zeros(0)
    grey = crops[:, :edge, :edge].mean(axis=3).reshape(-1, count, _CELL, count, _CELL)
    whole = grey.var(axis=(1, 2, 3, 4))
    inside = (grey - grey.mean(axis=(2, 4), keepdims=True)).var(axis=(1, 2, 3, 4))
    varied = whole >= _BLANK_LEVELS**2
    return np.asarray(inside[varied] / whole[varied])


def check_images(table: CalibrationTable, different: int | None = None) -> None:
    """Check that most images are not blank and not copies of each other.

    ``different``: number of different pictures, near copies counted once; None counts equal pixels.

    Raises:
        CalibrationError: over half have a single colour, or a few pictures are repeated many times.
    """
    thumbnails = _thumbnails(table)
    if not len(thumbnails):
        return
    hint = "calibrate with different images, like those in production"
    blank = _blank(thumbnails)
    if 2 * blank > len(thumbnails):
        level = float(np.median(thumbnails))
        raise CalibrationError(
            f"{blank} of {len(thumbnails)} images {_emptiness(table)}, grey level {level:.0f}",
            hint=hint,
        )
    known = [image.pixels for image in table.images if image.decoded]
    different = len(set(known)) if different is None else different
    if different < _ENOUGH and 2 * different <= len(known):
        pictures = "the same picture" if different == 1 else f"copies of {different} pictures"
        raise CalibrationError(f"all {len(known)} images are {pictures}", hint=hint)


def _blank(thumbnails: NDArray[np.uint8]) -> int:
    return int((thumbnails.std(axis=1) < _BLANK_LEVELS).sum())


def _emptiness(table: CalibrationTable) -> str:
    """What images show whose grey means do not vary: the stored ones may have a fine pattern."""
    stored = table.stored()
    if stored is not None and (stored.crops.std(axis=(1, 2)) >= _BLANK_LEVELS).any(axis=1).all():
        return "show only fine noise or a fine pattern"
    return "have a single colour"


def image_findings(
    table: CalibrationTable, different: int, enough: int, *, colour: bool
) -> tuple[Finding, ...]:
    """What the pixels say against the images.

    ``different``: number of different pictures, near copies counted once; fewer than ``enough`` are
    few.  ``colour``: whether the model was trained on colour images.
    """
    thumbnails = _thumbnails(table)
    found = [*_count_findings(len(table.images), different, enough)]
    if len(thumbnails):
        found += _thumbnail_findings(table, thumbnails)
    found += _size_findings(table)
    stored = table.stored()
    if stored is not None:
        found += _crop_findings(stored.crops, colour=colour)
    return tuple(found)


def _count_findings(count: int, different: int, enough: int) -> Iterator[Finding]:
    copies = count - different
    if copies > _SHARE * count:
        yield Finding(
            "copies",
            f"{copies} of {count} images are copies, or nearly copies, of another one: the ranges "
            f"are from only {different} pictures",
        )
    if different < enough:
        kind = " different" if copies else ""
        yield Finding(
            "few",
            f"only {different}{kind} images: use {enough} or more, so that the ranges represent "
            "all data and not just these images",
        )


def _thumbnail_findings(
    table: CalibrationTable, thumbnails: NDArray[np.uint8]
) -> Iterator[Finding]:
    count = len(thumbnails)
    blank = _blank(thumbnails)
    if blank > _SHARE * count:
        yield Finding("blank", f"{blank} of {count} images have a single colour")
    if is_flat(table):
        yield Finding(
            "dim",
            f"the images are dim or flat: the standard deviation of their grey levels is "
            f"{flatness(table):.0f} of 255, less than {_FLAT_LEVELS:.0f}; brighter images will be "
            "clipped",
        )
    noise = int((structure(thumbnails) < _STRUCTURE).sum())
    if noise > _SHARE * count:
        yield Finding(
            "noise",
            f"{noise} of {count} images look like noise: their neighbouring parts do not resemble "
            "each other as those of pictures do",
        )


def _size_findings(table: CalibrationTable) -> Iterator[Finding]:
    edges = np.asarray([image.edge for image in table.images if image.edge])
    size = table.preprocess.size
    small = int((edges * _ENLARGED < size).sum())
    if 2 * small > len(edges):
        yield Finding(
            "small",
            f"{small} of {len(edges)} images are much smaller than the crop: they are enlarged "
            f"from {int(np.median(edges))} to {size} pixels and have no fine detail",
        )


def _crop_findings(crops: NDArray[np.uint8], *, colour: bool) -> Iterator[Finding]:
    shares = detail(crops)
    if len(shares) and float(np.median(shares)) < _DETAIL:
        yield Finding(
            "blurred",
            "the images show no fine detail: they are blurred, or were enlarged before",
        )
    constant = crops.std(axis=(1, 2)) < _BLANK_LEVELS
    empty = constant.all(axis=0) & ~constant.all()
    for name, missing in zip(("red", "green", "blue"), empty, strict=True):
        if missing:
            yield Finding("channel", f"the {name} channel of the images is constant")
    grey = (crops == crops[..., :1]).all()
    if colour and grey and not constant.all():
        yield Finding(
            "grey", "the images are grey, but the model was trained on ImageNet's colour images"
        )
