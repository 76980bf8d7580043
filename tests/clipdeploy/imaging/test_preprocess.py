from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import Preprocess, Recipe
from clipdeploy.imaging.preprocess import (
    crop_file,
    crop_image,
    decode,
    open_image,
    short_edge,
    to_rgb,
)
from clipdeploy.models import cards
from exporters.samples import normalise

SPEC = cards.find("clip-vit-base-p16").preprocess(Recipe())


def photo(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colour with fine noise on it, uint8 (H, W, 3): resampling blurs it."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (width + height)], -1)
    return np.clip(base + generator.normal(0, 25, base.shape), 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def expected_crop(image: Image.Image, new: tuple[int, int], left: int, top: int) -> object:
    """The published arithmetic, with numbers computed by hand in the test."""
    resized = image.resize(new, Image.Resampling.BICUBIC)
    return np.asarray(resized)[top : top + 224, left : left + 224]


@pytest.mark.parametrize(
    ("size", "new", "left", "top"),
    [
        ((500, 375), (298, 224), 37, 0),  # landscape: int(224 * 500 / 375) = 298
        ((375, 500), (224, 298), 0, 37),  # portrait
        ((335, 224), (335, 224), 56, 0),  # (335 - 224) / 2 = 55.5, halves to even: 56
        ((337, 224), (337, 224), 56, 0),  # 56.5, halves to even: 56
        ((501, 333), (337, 224), 56, 0),  # odd: int(224 * 501 / 333) = 337
        ((224, 224), (224, 224), 0, 0),
        ((30, 20), (336, 224), 56, 0),  # smaller than the crop: enlarged
        ((1, 1), (224, 224), 0, 0),
    ],
)
def test_the_crop_is_the_published_arithmetic(
    size: tuple[int, int], new: tuple[int, int], left: int, top: int
) -> None:
    image = Image.fromarray(photo(*size))
    expected = expected_crop(image, new, left, top)
    np.testing.assert_array_equal(crop_image(image, SPEC), expected)


def test_the_comparison_detects_rounding_half_up() -> None:
    image = Image.fromarray(photo(337, 224))
    assert not np.array_equal(crop_image(image, SPEC), expected_crop(image, (337, 224), 57, 0))


def test_the_comparison_detects_antialiasing_and_bilinear() -> None:
    image = Image.fromarray(photo(500, 375))
    bilinear = np.asarray(image.resize((298, 224), Image.Resampling.BILINEAR))[:, 37 : 37 + 224]
    assert not np.array_equal(crop_image(image, SPEC), bilinear)


def test_bilinear_is_pillows() -> None:
    image, spec = Image.fromarray(photo(500, 375)), replace(SPEC, interpolation="bilinear")
    bilinear = np.asarray(image.resize((298, 224), Image.Resampling.BILINEAR))[:, 37 : 37 + 224]
    np.testing.assert_array_equal(crop_image(image, spec), bilinear)


def test_timm_recipes() -> None:
    image = Image.fromarray(photo(500, 375))
    center = Preprocess(224, SPEC.mean, SPEC.std, crop_pct=0.95)
    # floor(224 / 0.95) = 235, long edge int(235 * 500 / 375) = 313.
    resized = np.asarray(image.resize((313, 235), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop_image(image, center), resized[6 : 6 + 224, 44 : 44 + 224])
    squash = Preprocess(224, SPEC.mean, SPEC.std, crop_pct=1.0, crop_mode="squash")
    squashed = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop_image(image, squash), squashed)


def test_grey_is_repeated_in_three_channels() -> None:
    grey = Image.fromarray(photo(40, 30)[..., 0])
    rgb = np.asarray(decode(encoded(grey), "grey.png"))
    np.testing.assert_array_equal(rgb, np.repeat(np.asarray(grey)[..., None], 3, axis=2))


def test_palette_becomes_its_colours() -> None:
    palette = Image.fromarray(photo(40, 30)).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(encoded(palette), "p.png")), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(mode: str) -> None:
    image = Image.fromarray(photo(40, 30)).convert(mode)
    image.putalpha(7)
    expected = np.asarray(Image.fromarray(photo(40, 30)).convert(mode[:-1]).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(encoded(image), "a.png")), expected)


def test_transparent_palette_keeps_its_colours() -> None:
    palette = Image.fromarray(photo(40, 30)).quantize(16)
    data = encoded(palette, transparency=0)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data, "p.png")), expected)


def test_cmyk_is_converted() -> None:
    image = Image.fromarray(photo(40, 30)).convert("CMYK")
    data = encoded(image, "TIFF")
    np.testing.assert_array_equal(
        np.asarray(decode(data, "c.tif")), np.asarray(image.convert("RGB"))
    )


def test_sixteen_bit_keeps_the_high_byte() -> None:
    samples = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 54
    rgb = np.asarray(decode(encoded(Image.fromarray(samples)), "deep.png"))
    np.testing.assert_array_equal(rgb[..., 1], (samples >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_or_ignored(orientation: int) -> None:
    pixels = photo(40, 30)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    # EXIF 2.3, tag 0x0112: the sides of row 0 and column 0 of the stored image.
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    np.testing.assert_array_equal(np.asarray(decode(data, "turned.png")), turned)
    untouched = decode(data, "turned.png", exif_orientation=False)
    np.testing.assert_array_equal(np.asarray(untouched), pixels)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_image_is_named(keep: float, kind: str) -> None:
    data = encoded(Image.fromarray(photo(60, 40)), kind)
    with pytest.raises(DatasetError, match=r"holiday\.jpg"):
        decode(data[: int(keep * len(data))], "holiday.jpg")


def test_a_decompression_bomb_is_refused() -> None:
    data = encoded(Image.new("1", (14_000, 14_000)))
    with pytest.raises(DatasetError, match="bomb"):
        decode(data, "bomb.png")


def test_normalise_is_the_formula() -> None:
    crops = photo(8, 8)[None]
    got = normalise(crops, SPEC)
    expected = (crops / 255.0 - np.asarray(SPEC.mean)) / np.asarray(SPEC.std)
    assert got.dtype == np.float32
    assert got.shape == (1, 3, 8, 8)
    # Values up to 2.7 in float32: half an ulp is 1.2e-7, and two roundings happen.
    np.testing.assert_allclose(got, expected.transpose(0, 3, 1, 2), rtol=0, atol=5e-7)


@pytest.mark.parametrize("size", [(1, 8000), (8000, 1), (1, 1786), (3, 60_000), (1, 30_000_000)])
def test_an_image_too_narrow_to_be_resized(size: tuple[int, int]) -> None:
    """A file of a hundred bytes would take gigabytes once its short edge has 224 pixels."""
    data = encoded(Image.new("1", size))
    with pytest.raises(DatasetError, match=r"narrow\.png.* too long and narrow") as found:
        crop_file(data, "narrow.png", SPEC)
    assert "--skip-unreadable" in found.value.hint


def test_postscript_is_not_run() -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n"
    for read in (decode, lambda data, name: open_image(io.BytesIO(data), name)):
        with pytest.raises(DatasetError, match="the format EPS is not supported"):
            read(program, "x.png")


def test_a_narrow_image_that_can_be_resized() -> None:
    data = encoded(Image.new("RGB", (1, 1700), (200, 10, 10)))
    assert crop_file(data, "narrow.png", SPEC).shape == (224, 224, 3)


def test_sixteen_bits_keep_their_high_byte() -> None:
    samples = np.array([[0, 255, 256, 65_535]], np.uint16)
    pixels = np.asarray(decode(encoded(Image.fromarray(samples)), "16.png"))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 255]
    whole = Image.fromarray(np.array([[-5, 70_000, 512]], np.int32))
    assert np.asarray(to_rgb(whole))[0, :, 0].tolist() == [0, 255, 2]


def test_the_short_edge_is_that_of_the_file() -> None:
    data = encoded(Image.new("L", (30, 17)))
    assert short_edge(data) == 17
    assert short_edge(data[:20]) == 0
    assert short_edge(b"") == 0
