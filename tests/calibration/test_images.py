from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.images import check_images, flatness, image_warnings
from calibration.table import CalibrationImageRecord, CalibrationTable
from clipdeploy.core.errors import CalibrationError
from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD, Preprocess
from clipdeploy.imaging.fingerprints import fingerprint

Pixels = NDArray[np.uint8]
RNG = np.random.default_rng(0)
PICTURES = (
    RNG.integers(0, 256, (150, 8, 8, 1), np.uint8).repeat(3, axis=3).repeat(2, 1).repeat(2, 2)
)


def _table(pictures: list[Pixels], *, known: bool = True) -> CalibrationTable:
    images = tuple(
        CalibrationImageRecord(f"{i}.png", f"{i:064x}", *(fingerprint(each) if known else ()))
        for i, each in enumerate(pictures)
    )
    return CalibrationTable("tiny", "random:0", "", Preprocess(16, CLIP_MEAN, CLIP_STD), images, {})


def _grey(level: int) -> Pixels:
    return np.full((16, 16, 3), level, np.uint8)


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [
        ([_grey(0)] * 150, "150 of 150 images have a single colour, grey level 0"),
        ([_grey(255)] * 150, "150 of 150 images have a single colour, grey level 255"),
        ([_grey(level) for level in range(150)], "150 of 150 images have a single colour"),
        ([_grey(0)] * 80 + list(PICTURES[:70]), "80 of 150 images have a single colour"),
        ([_grey(3)], "1 of 1 images have a single colour"),
        ([PICTURES[0]] * 150, "all 150 images are the same picture"),
        ([PICTURES[0]] * 2, "all 2 images are the same picture"),
        (list(PICTURES[:3]) * 50, "all 150 images are copies of 3 pictures"),
    ],
)
def test_images_that_show_nothing_or_the_same_are_refused(
    pictures: list[Pixels], reason: str
) -> None:
    with pytest.raises(CalibrationError, match=reason):
        check_images(_table(pictures))


@pytest.mark.parametrize(
    "pictures",
    [
        list(PICTURES),
        [_grey(0)] * 70 + list(PICTURES[:80]),
        list(PICTURES[:100]) * 3,
        [PICTURES[0]],
        list(PICTURES[:2]),
    ],
)
def test_other_images_are_accepted(pictures: list[Pixels]) -> None:
    check_images(_table(pictures))


def test_images_whose_pixels_are_unknown_are_not_judged() -> None:
    table = _table([_grey(0)] * 9, known=False)
    check_images(table)
    assert flatness(table) is None
    assert image_warnings(table) == ()


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        (lambda x: x, False),
        (lambda x: x * 0.7, False),
        (lambda x: x * 0.3, True),
        (lambda x: x * 0.05, True),
        (lambda x: 128 + (x - 128) * 0.1, True),
        (lambda x: 255 - x * 0.1, True),
    ],
)
def test_dim_and_flat_images_are_named(
    change: Callable[[NDArray[np.float64]], NDArray[np.float64]], warned: bool
) -> None:
    changed = change(PICTURES.astype(np.float64)).astype(np.uint8)
    warnings = image_warnings(_table(list(changed)))
    assert bool(warnings) == warned
    assert all("dim or flat" in warning for warning in warnings)
