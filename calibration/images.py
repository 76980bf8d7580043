"""Whether images can be calibrated with: ranges of blank or identical images fit nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.table import CalibrationTable
from clipdeploy.core.errors import CalibrationError

__all__ = ["check_images", "flatness", "image_warnings", "is_flat"]

# An eighth of the 256 levels; evenly spread grey means have a standard deviation of 74.
_FLAT_LEVELS = 32.0
# Grey means that spread by less than one level are those of an image of one colour.
_BLANK_LEVELS = 1.0
# So many different pictures are some, however many copies there are of them.
_ENOUGH = 32


def _thumbnails(table: CalibrationTable) -> NDArray[np.uint8]:
    """The 8 x 8 grey means of the images whose pixels are known, uint8 (N, 64)."""
    data = b"".join(image.thumbnail for image in table.images)
    return np.frombuffer(data, np.uint8).reshape(-1, 64)


def flatness(table: CalibrationTable) -> float | None:
    """How far the grey means of all images spread, as standard deviation; None if unknown."""
    thumbnails = _thumbnails(table)
    return float(thumbnails.std()) if len(thumbnails) else None


def is_flat(table: CalibrationTable) -> bool:
    """Whether the images are dim or have little contrast, as far as that is known."""
    spread = flatness(table)
    return spread is not None and spread < _FLAT_LEVELS


def check_images(table: CalibrationTable) -> None:
    """Make sure that most images show something, and not all the same.

    Raises:
        CalibrationError: more than half are of one colour, or few pictures are there many times.
    """
    thumbnails = _thumbnails(table)
    if not len(thumbnails):
        return
    hint = "calibrate with different images, as they will be served"
    blank = int((thumbnails.std(axis=1) < _BLANK_LEVELS).sum())
    if 2 * blank > len(thumbnails):
        level = float(np.median(thumbnails))
        raise CalibrationError(
            f"{blank} of {len(thumbnails)} images are of one colour, grey level {level:.0f}",
            hint=hint,
        )
    known = [image.pixels for image in table.images if image.decoded]
    different = len(set(known))
    if different < _ENOUGH and 2 * different <= len(known):
        pictures = "the same picture" if different == 1 else f"copies of {different} pictures"
        raise CalibrationError(f"all {len(known)} images are {pictures}", hint=hint)


def image_warnings(table: CalibrationTable) -> tuple[str, ...]:
    """What is unusual about the images, as sentences."""
    if not is_flat(table):
        return ()
    return (
        f"the images are dim or flat: their grey levels spread by {flatness(table):.0f} of 255, "
        f"less than {_FLAT_LEVELS:.0f}; ranges found on them cut off brighter images",
    )
