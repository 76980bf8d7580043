"""Preprocess image files exactly as for the published accuracies.

    decode -> upright -> RGB uint8 -> resize (Pillow on uint8) -> centre crop
    x = (crop / 255 - mean) / std,   HWC -> CHW

Resize: bicubic, or bilinear if the checkpoint was trained so, both of Pillow with its antialiasing.
The short edge becomes S / crop_pct, the long edge int(S * long / short); the crop's offset
is int(round((edge - S) / 2)), halves to even (335 -> 224 gives 56).  Source: mmpretrain 1.2
``ResizeEdge``/``CenterCrop`` with the pillow backend, timm 1.0 ``transforms_factory.py``.

Unusual images: grey and palette images are expanded to RGB, an alpha channel is dropped, CMYK is
converted by Pillow, 16-bit samples keep their high byte (as in OpenCV), and an image smaller than
the crop is enlarged.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clipdeploy.core.passport import Preprocess
from clipdeploy.imaging.archives import unreadable
from clipdeploy.imaging.formats import OPEN_ERRORS, is_decoded

__all__ = ["crop_file", "crop_image", "decode", "open_image", "short_edge", "to_rgb"]

# Pillow's limit: it warns above it and refuses twice as many.
_MAX_PIXELS = 89_478_485


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; the module's docstring lists the conversions."""
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        samples = np.asarray(image)
        return Image.fromarray(np.clip(samples >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point samples have no defined range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes, name: str, *, exif_orientation: bool = True) -> Image.Image:
    """Decode one image file's bytes to an upright RGB image.

    Raises:
        DatasetError: the bytes are not an image, are truncated, or have too many pixels.
    """
    with _dataset_errors(name):
        image = _open(io.BytesIO(data))
        image.load()
        # In place, and without converting RGB images, to avoid copies.
        if exif_orientation:
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def crop_file(data: bytes, name: str, spec: Preprocess) -> NDArray[np.uint8]:
    """Decode, resize and crop one image file's bytes to uint8 (S, S, 3), S being ``spec.size``.

    Raises:
        DatasetError: see :func:`decode`; or the image is so long and narrow that it has too many
            pixels after resizing.
    """
    image = decode(data, name, exif_orientation=spec.exif_orientation)
    with _dataset_errors(name):
        return crop_image(image, spec)


def open_image(stream: IO[bytes], name: str) -> None:
    """Check one image file's header.

    Raises:
        DatasetError: the file is not an image, or has too many pixels.
    """
    with _dataset_errors(name):
        _open(stream)


def short_edge(data: bytes) -> int:
    """The short edge in pixels of an image file's bytes; 0 if its header cannot be read."""
    try:
        return min(_open(io.BytesIO(data)).size)
    except OPEN_ERRORS:
        return 0


def _open(stream: IO[bytes]) -> Image.Image:
    image = Image.open(stream)
    if not is_decoded(image.format):
        # Pillow would start another program to decode some of these formats.
        raise ValueError(f"the format {image.format} is not supported")
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels, which could be a decompression bomb"
        )
    return image


@contextmanager
def _dataset_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OPEN_ERRORS as error:
        reason = str(error).split(" <_io.")[0] or type(error).__name__
        raise unreadable(f"the image {name}", reason) from error


def crop_image(image: Image.Image, spec: Preprocess) -> NDArray[np.uint8]:
    """Resize and centre-crop an RGB image to uint8 (S, S, 3), S being ``spec.size``.

    Raises:
        ValueError: the resized image has more pixels than Pillow's limit for decompression bombs.
    """
    size = spec.size
    target = math.floor(size / spec.crop_pct)
    width, height = image.size
    if spec.crop_mode == "squash":
        new = (target, target)
    elif width <= height:
        new = (target, int(target * height / width))
    else:
        new = (int(target * width / height), target)
    # Not a module constant: this function's source is copied into the clients of packages.
    if new[0] * new[1] > 89_478_485:
        raise ValueError(
            f"{width} x {height} pixels would be resized to {new[0]} x {new[1]}: "
            "the image is too long and narrow"
        )
    if new != image.size:
        image = image.resize(new, Image.Resampling[spec.interpolation.upper()])
    left = int(round((new[0] - size) / 2.0))  # noqa: RUF046 - the formula, halves to even
    top = int(round((new[1] - size) / 2.0))  # noqa: RUF046
    return np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)
