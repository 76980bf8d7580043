"""Fingerprints of equal, nearly equal and different pictures."""

from __future__ import annotations

import io
import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import iter_crops, open_images
from clipdeploy.imaging.fingerprints import (
    THUMBNAIL_BYTES,
    Fingerprint,
    Known,
    fingerprint,
    first_copies,
)
from clipdeploy.imaging.preprocess import crop_image, decode
from clipdeploy.models import cards

SPEC = replace(cards.find(cards.DEMO).preprocess(Recipe()), size=224)
SHAPES = [(500, 375), (375, 500), (640, 480), (333, 333)]


def picture(seed: int) -> Image.Image:
    """Smooth shapes under fine noise, as compressible as a photograph."""
    generator = np.random.default_rng(seed)
    size = SHAPES[seed % len(SHAPES)]
    coarse = generator.integers(0, 256, (12, 16, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    noisy = smooth.astype(np.int16) + generator.normal(0, 20, smooth.shape).astype(np.int16)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def of_file(data: bytes, size: int = SPEC.size) -> Fingerprint:
    return fingerprint(crop_image(decode(data, "image"), replace(SPEC, size=size)))


def names(count: int, start: int = 0) -> list[str]:
    return [f"{number:064x}" for number in range(start, start + count)]


def thumbnails(prints: list[Fingerprint]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(p.thumbnail for p in prints), np.uint8).reshape(-1, 64)


def groups(prints: list[Fingerprint]) -> tuple[list[int], list[int]]:
    same, near = first_copies([p.pixels for p in prints], thumbnails(prints))
    assert same.dtype == near.dtype == np.int64
    return same.tolist(), near.tolist()


@pytest.mark.parametrize("size", [1, 5, 8, 20, 32, 60, 224, 336])
def test_a_thumbnail_is_the_rounded_mean_of_its_cells(size: int) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    edges = [number * size // 8 for number in range(9)]
    spans = [slice(a, max(b, a + 1)) for a, b in itertools.pairwise(edges)]
    # Means of bytes lie no closer to one half than 1e-9, where they are not one half.
    wanted = [[int(np.floor(pixels[a, b].mean() + 0.5 + 1e-9)) for b in spans] for a in spans]
    found = fingerprint(pixels)
    assert len(found.thumbnail) == THUMBNAIL_BYTES
    assert list(found.thumbnail) == np.ravel(wanted).tolist()
    assert len(bytes.fromhex(found.pixels)) >= 16


def test_the_largest_sums_do_not_overflow() -> None:
    white = np.full((2064, 2064, 3), 255, np.uint8)
    for size in (2056, 2064):
        assert set(fingerprint(white[:size, :size]).thumbnail) == {255}


def test_one_pixel_makes_other_pixels_and_a_view_does_not() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    view = np.asfortranarray(pixels)
    assert fingerprint(view) == fingerprint(pixels)
    other = pixels.copy()
    other[31, 31, 2] ^= 1
    assert fingerprint(other).pixels != fingerprint(pixels).pixels


LOSSLESS = {
    "bmp": lambda image: saved(image, "BMP"),
    "webp": lambda image: saved(image, "WEBP", lossless=True, exact=True),
    "tiff": lambda image: saved(image, "TIFF", compression="tiff_lzw"),
    "other png": lambda image: saved(image, "PNG", compress_level=1) + b"behind the end",
}


@pytest.mark.parametrize("how", LOSSLESS)
def test_a_lossless_copy_is_the_same(how: str) -> None:
    png, other = saved(picture(0), "PNG"), LOSSLESS[how](picture(0))
    assert png != other
    known = Known([("aa" * 32, of_file(png))])
    assert known.match("bb" * 32, of_file(other)) == "same"
    assert known.match("bb" * 32, of_file(saved(picture(1), "PNG"))) == ""


def test_other_metadata_are_the_same() -> None:
    image, exif = picture(2), Image.Exif()
    exif[0x010F] = "another camera"
    plain, tagged = saved(image, "JPEG", quality=90), saved(image, "JPEG", quality=90, exif=exif)
    assert plain != tagged
    assert of_file(plain) == of_file(tagged)


def resized(image: Image.Image, factor: float) -> Image.Image:
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


LOSSY = {
    "jpeg 95": lambda image: saved(image, "JPEG", quality=95),
    "jpeg 85": lambda image: saved(image, "JPEG", quality=85),
    "jpeg 75": lambda image: saved(image, "JPEG", quality=75),
    "webp 80": lambda image: saved(image, "WEBP", quality=80),
    "smaller": lambda image: saved(resized(image, 0.95), "PNG"),
    "larger": lambda image: saved(resized(image, 1.07), "JPEG", quality=90),
    "smaller and back": lambda image: saved(
        resized(image, 0.9).resize(image.size, Image.Resampling.BILINEAR), "JPEG", quality=90
    ),
}


@pytest.mark.parametrize("size", [32, 224, 384])
@pytest.mark.parametrize("how", LOSSY)
def test_a_lossy_copy_is_a_near_copy_of_its_original_only(how: str, size: int) -> None:
    originals = [of_file(saved(picture(seed), "JPEG", quality=92), size) for seed in range(8)]
    copies = [of_file(LOSSY[how](picture(seed)), size) for seed in range(8)]
    for own in range(8):
        for other, original in enumerate(originals):
            matches = Known([("aa" * 32, original)]).match("bb" * 32, copies[own])
            assert matches == ("near" if own == other else "")
    assert groups(originals + copies) == (list(range(16)), [*range(8), *range(8)])


@pytest.fixture(scope="module")
def digits() -> list[Fingerprint]:
    spec = replace(SPEC, size=32)
    archives = [cards.demo_file(f"{name}.zip") for name in ("calibration", "test")]
    return [
        fingerprint(crop.pixels)
        for archive in archives
        for crop in iter_crops(open_images(archive), spec, workers=0)
    ]


def test_no_two_digits_are_copies_of_each_other(digits: list[Fingerprint]) -> None:
    """They have only ten shapes, but every one is a different picture."""
    assert len(digits) == 700
    everyone = list(range(700))
    assert groups(digits) == (everyone, everyone)
    for at in range(0, 700, 7):
        others = digits[:at] + digits[at + 1 :]
        known = Known(zip(names(699), others, strict=True))
        assert known.match("ff" * 32, digits[at]) == ""


@pytest.mark.parametrize("size", [32, 224, 448])
def test_pictures_of_noise_are_not_copies_of_each_other(size: int) -> None:
    """Their thumbnails are nearly flat: at 448 pixels all of them are within 2 grey levels."""
    noise = [
        fingerprint(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))
        for seed in range(40)
    ]
    everyone = list(range(40))
    assert groups(noise) == (everyone, everyone)


def test_blank_pictures_are_copies_of_their_own_shade_only() -> None:
    shades = (0, 255, 100, 101)
    blank = [fingerprint(np.full((32, 32, 3), shade, np.uint8)) for shade in shades]
    assert groups([*blank, *blank]) == ([0, 1, 2, 3] * 2, [0, 1, 2, 3] * 2)


def brute_force(pixels: list[str], values: NDArray[np.uint8]) -> tuple[list[int], list[int]]:
    """The definition at the top of the module, pair by pair, in whole numbers."""
    count, wide = len(pixels), values.astype(np.int64)
    same = [pixels.index(value) for value in pixels]
    spread = 64 * (wide**2).sum(1) - wide.sum(1) ** 2  # 64^2 times the variance
    near = same.copy()
    for _ in range(count):
        for a in range(count):
            for b in range(count):
                distance = 64 * ((wide[a] - wide[b]) ** 2).sum()
                close = distance <= 7**2 * 64**2 and 100 * distance <= min(spread[a], spread[b])
                if close or same[a] == same[b]:
                    near[a] = near[b] = min(near[a], near[b])
    return same, near


@pytest.mark.parametrize("block", [3, 512])
@pytest.mark.parametrize("seed", range(6))
def test_groups_are_those_of_the_definition(
    seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains of small steps, equal pixels with other thumbnails and the reverse."""
    monkeypatch.setattr("clipdeploy.imaging.fingerprints._BLOCK", block)
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 64))
    steps = generator.normal(0, 11 + seed, (40, 64)).cumsum(axis=0) / 4
    values = np.clip(coarse[generator.integers(0, 5, 40)] + steps, 0, 255).astype(np.uint8)
    values[7], values[30] = values[20], values[3]
    pixels = [f"{number:032x}" for number in range(40)]
    pixels[11] = pixels[35] = pixels[2]
    same, near = first_copies(pixels, values)
    assert (same.tolist(), near.tolist()) == brute_force(pixels, values)
    assert 5 < len(set(near.tolist())) < 37  # the example joins some and not all


def test_a_few_copies_among_twenty_thousand_are_found() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 256, (20_000, 64), np.uint8)
    values[19_000:19_100] = np.clip(values[:100].astype(int) + 1, 0, 255)
    pixels = [f"{number:032x}" for number in range(20_000)]
    pixels[19_500] = pixels[5]
    same, near = first_copies(pixels, values)
    wanted = np.arange(20_000)
    wanted[19_500] = 5
    assert (same == wanted).all()
    wanted[19_000:19_100] = np.arange(100)
    assert (near == wanted).all()


def test_an_empty_list_has_no_copies() -> None:
    assert groups([]) == ([], [])
    assert Known([]).match_all([], []) == []


def test_a_file_without_a_fingerprint_is_found_by_its_bytes_only() -> None:
    old, other = of_file(saved(picture(0), "PNG")), of_file(saved(picture(1), "PNG"))
    known = Known([("aa" * 32, None), ("bb" * 32, other)])
    assert known.match("aa" * 32, None) == "same"
    assert known.match("cc" * 32, old) == ""
    assert known.match("cc" * 32, None) == ""
    assert Known([("aa" * 32, None)]).match("cc" * 32, old) == ""


def test_matching_many_gives_the_same_as_matching_each(digits: list[Fingerprint]) -> None:
    rng = np.random.default_rng(zlib.crc32(b"match"))
    known = Known(zip(names(100), digits[:100], strict=True))
    asked: list[Fingerprint | None] = list(digits[50:650])
    for at in range(0, 50, 2):  # a re-encoding with loss
        values = np.frombuffer(digits[50 + at].thumbnail, np.uint8).astype(int)
        moved = np.clip(values + rng.integers(-2, 3, 64), 0, 255).astype(np.uint8)
        asked[at] = Fingerprint("00" * 16, moved.tobytes())
    asked[3] = None
    sha256s = names(600, start=1000)
    sha256s[599] = names(1)[0]
    found = known.match_all(sha256s, asked)
    assert found == [known.match(*one) for one in zip(sha256s, asked, strict=True)]
    wanted = ["near" if at % 2 == 0 else "same" for at in range(50)] + [""] * 550
    wanted[3], wanted[599] = "", "same"
    assert found == wanted
