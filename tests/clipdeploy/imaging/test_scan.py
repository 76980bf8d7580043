"""A scan of images finds unreadable files and duplicates."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdeploy.imaging import open_images, scan_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five valid images of different sizes."""
    root = tmp_path / "images"
    root.mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 20, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{seed}.png")
    return root


def bomb() -> bytes:
    """The header of a PNG of 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_valid_images_have_no_problems(folder: Path) -> None:
    assert scan_images(open_images(folder)).problems() == ()


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", bomb()])
def test_a_file_that_is_not_an_image_is_named(folder: Path, data: bytes) -> None:
    (folder / "bad.png").write_bytes(data)
    assert scan_images(open_images(folder)).unreadable == ["bad.png"]


def test_equal_bytes_are_duplicates_and_equal_sizes_are_not(folder: Path) -> None:
    shutil.copy(folder / "1.png", folder / "again.png")
    reading = scan_images(open_images(folder))
    assert reading.duplicates == ["again.png is 1.png"]
    data = bytearray((folder / "again.png").read_bytes())
    data[-1] ^= 1
    (folder / "again.png").write_bytes(data)
    assert scan_images(open_images(folder)).duplicates == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_scanned_too(folder: Path, tmp_path: Path, kind: str) -> None:
    shutil.copy(folder / "1.png", folder / "again.png")
    (folder / "empty.png").write_bytes(b"")
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), kind, folder))
    reading = scan_images(open_images(packed))
    assert reading.unreadable == ["empty.png"]
    assert reading.duplicates == ["again.png is 1.png"]


def test_a_removed_file_is_unreadable(folder: Path) -> None:
    images = open_images(folder)
    (folder / "2.png").unlink()
    assert scan_images(images).unreadable == ["2.png"]
