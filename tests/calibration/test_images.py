from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from calibration.images import check_images, detail, flatness, image_findings, structure
from calibration.table import CalibrationCrop, CalibrationImageRecord, CalibrationTable
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


def test_near_copies_are_refused_as_copies_are() -> None:
    noisy = [np.clip(PICTURES[0].astype(int) + i % 3, 0, 255).astype(np.uint8) for i in range(150)]
    check_images(_table(noisy[:1] + list(PICTURES[1:])), 150)
    with pytest.raises(CalibrationError, match="all 150 images are the same picture"):
        check_images(_table(noisy), 1)


def test_images_whose_pixels_are_unknown_are_not_judged() -> None:
    table = _table([_grey(0)] * 9, known=False)
    check_images(table)
    assert flatness(table) is None
    assert image_findings(table, 9, 9, colour=True) == ()


def _smooth(count: int, edge: int = 64, seed: int = 0) -> Pixels:
    """Pictures in which neighbours resemble each other, and which have fine detail."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 226, (count, 4, 4, 1)) + rng.integers(0, 30, (count, 4, 4, 3))
    large = [
        np.asarray(
            Image.fromarray(each.astype(np.uint8)).resize((edge, edge), Image.Resampling.BICUBIC),
            int,
        )
        for each in coarse
    ]
    grain = rng.normal(0, 20, (count, edge, edge, 1))
    return np.clip(np.stack([np.asarray(each) for each in large]) + grain, 0, 255).astype(np.uint8)


SMOOTH = _smooth(40)


def _kinds(
    pictures: Pixels, *, different: int | None = None, edge: int = 64, colour: bool = True
) -> list[str]:
    table = _table(list(pictures))
    images = tuple(replace(image, edge=edge) for image in table.images)
    crops = tuple(
        CalibrationCrop.of(image.name, image.sha256, each)
        for image, each in zip(images, pictures, strict=True)
    )
    spec = replace(table.preprocess, size=pictures.shape[1])
    table = replace(table, images=images, crops=crops, preprocess=spec)
    count = len(pictures) if different is None else different
    return [found.kind for found in image_findings(table, count, 40, colour=colour)]


def test_sound_images_have_no_findings() -> None:
    assert _kinds(SMOOTH) == []
    grey = SMOOTH[..., :1].repeat(3, axis=3)
    assert _kinds(grey, colour=False) == []


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda x: x * 0.9, []),
        (lambda x: x * 0.3, ["dim"]),
        (lambda x: x * 0.05, ["dim"]),
        (lambda x: 128 + (x - 128) * 0.1, ["dim"]),
        (lambda x: 255 - x * 0.1, ["dim"]),
        (lambda x: x * (np.arange(40) > 5)[:, None, None, None], ["blank"]),
        (lambda x: RNG.integers(0, 256, (40, 64, 64, 3)), ["dim", "noise"]),
        (
            lambda x: RNG.integers(0, 256, (40, 8, 8, 3)).repeat(8, 1).repeat(8, 2),
            ["noise", "blurred"],
        ),
        (lambda x: x.mean(axis=3, keepdims=True).repeat(3, 3), ["grey"]),
        (lambda x: x * np.asarray([1, 0, 1]), ["channel"]),
        (lambda x: x * np.asarray([1, 1, 0]) + np.asarray([0, 0, 90]), ["channel"]),
    ],
)
def test_a_fault_of_the_images_is_named(
    change: Callable[[NDArray[np.float64]], NDArray[np.float64]], kinds: list[str]
) -> None:
    changed = np.clip(change(SMOOTH.astype(np.float64)), 0, 255).astype(np.uint8)
    assert _kinds(changed) == kinds


def test_blurred_images_are_named() -> None:
    large = _smooth(8, 256)
    assert "blurred" not in _kinds(large, edge=256)
    blur = ImageFilter.GaussianBlur(16)
    blurred = np.stack([np.asarray(Image.fromarray(each).filter(blur)) for each in large])
    assert "blurred" in _kinds(blurred, edge=256)


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ({"different": 39}, ["few"]),
        ({"different": 30}, ["copies", "few"]),
        ({"edge": 15}, ["small"]),
        ({"edge": 16}, []),
        ({"edge": 0}, []),
    ],
)
def test_few_repeated_and_small_images_are_named(words: dict[str, int], kinds: list[str]) -> None:
    assert _kinds(SMOOTH, **words) == kinds


def test_a_fine_pattern_is_not_called_a_colour() -> None:
    pattern = np.zeros((40, 64, 64, 3), np.uint8)
    pattern[:, ::2] = 255
    table = _table(list(pattern))
    crops = tuple(CalibrationCrop.of(f"{i}", f"{i:064x}", each) for i, each in enumerate(pattern))
    spec = replace(table.preprocess, size=64)
    with pytest.raises(CalibrationError, match="show only fine noise or a fine pattern"):
        check_images(replace(table, crops=crops, preprocess=spec))


def test_structure_and_detail_have_their_stated_values() -> None:
    thumbnails = RNG.integers(0, 256, (500, 64), np.uint8)
    assert abs(structure(thumbnails).mean()) < 0.05
    ramp = np.add.outer(np.arange(8), np.arange(8)).astype(np.uint8).reshape(1, 64) * 15
    assert structure(ramp)[0] > 0.6
    assert len(structure(np.zeros((3, 64), np.uint8))) == 0
    halves = np.zeros((1, 64, 64, 3), np.uint8)
    halves[:, :, 32:] = 200
    assert detail(halves) == pytest.approx([0])
    assert detail(RNG.integers(0, 256, (4, 64, 64, 3), np.uint8)) == pytest.approx(1, abs=0.05)
    assert len(detail(np.full((2, 64, 64, 3), 9, np.uint8))) == 0
    assert len(detail(halves[:, :8, :8])) == 0
