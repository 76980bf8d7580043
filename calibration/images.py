"""Checks calibration images: ranges found on blank or identical images fit no others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.table import CalibrationTable
from clipdeploy.core.errors import CalibrationError

__all__ = ["check_images", "flatness", "image_warnings", "is_flat"]

# An eighth of the 256 grey levels; uniform grey means have a standard deviation of 74.
_FLAT_LEVELS = 32.0
# An image whose grey means vary by less than one level has a single colour.
_BLANK_LEVELS = 1.0
# With this many different pictures, copies do no harm.
_ENOUGH = 32


def _thumbnails(table: CalibrationTable) -> NDArray[np.uint8]:
    """The 8 x 8 grey means of the N images with known pixels, uint8 (N, 64)."""
    data = b"".join(image.thumbnail for image in table.images)
    return np.frombuffer(data, np.uint8).reshape(-1, 64)


def flatness(table: CalibrationTable) -> float | None:
    """Standard deviation of the grey means over all images; None if unknown."""
    thumbnails = _thumbnails(table)
    return float(thumbnails.std()) if len(thumbnails) else None


def is_flat(table: CalibrationTable) -> bool:
    """Whether the images are known to be dim or to have little contrast."""
    spread = flatness(table)
    return spread is not None and spread < _FLAT_LEVELS


def check_images(table: CalibrationTable) -> None:
    """Check that most images are not blank and not copies of each other.

    Raises:
        CalibrationError: over half have a single colour, or a few pictures are repeated many times.
    """
    thumbnails = _thumbnails(table)
    if not len(thumbnails):
        return
    hint = "calibrate with different images, like those in production"
    blank = int((thumbnails.std(axis=1) < _BLANK_LEVELS).sum())
    if 2 * blank > len(thumbnails):
        level = float(np.median(thumbnails))
        raise CalibrationError(
            f"{blank} of {len(thumbnails)} images have a single colour, grey level {level:.0f}",
            hint=hint,
        )
    known = [image.pixels for image in table.images if image.decoded]
    different = len(set(known))
    if different < _ENOUGH and 2 * different <= len(known):
        pictures = "the same picture" if different == 1 else f"copies of {different} pictures"
        raise CalibrationError(f"all {len(known)} images are {pictures}", hint=hint)


def image_warnings(table: CalibrationTable) -> tuple[str, ...]:
    """Warnings about the images, as sentences."""
    if not is_flat(table):
        return ()
    return (
        f"the images are dim or flat: the standard deviation of their grey levels is "
        f"{flatness(table):.0f} of 255, less than {_FLAT_LEVELS:.0f}; brighter images will be "
        "clipped",
    )
