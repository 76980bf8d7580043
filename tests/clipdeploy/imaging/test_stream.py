from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import (
    ImageFolder,
    Reading,
    Skipped,
    iter_crops,
    open_images,
    select,
    stack_batches,
    survey,
)
from clipdeploy.models import cards

SPEC = cards.find(cards.DEMO).preprocess(Recipe())
CLASSES = ("cat", "dog")


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for seed in range(6):
        path = root / CLASSES[seed % 2] / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))
    (root / "notes.txt").write_text("no image")
    return root


def as_zip(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


def test_folders_give_labels(folder: Path) -> None:
    images = open_images(folder, CLASSES)
    assert [(entry.name, entry.label) for entry in images.entries][:2] == [
        ("cat/0.png", 0),
        ("cat/2.png", 0),
    ]
    assert images.labelled
    assert len(images.entries) == 6


def test_a_zip_gives_the_same_crops_as_its_folder(folder: Path) -> None:
    one = list(iter_crops(open_images(folder, CLASSES), SPEC))
    two = list(iter_crops(open_images(as_zip(folder), CLASSES), SPEC))
    assert [(a.entry, a.sha256) for a in one] == [(b.entry, b.sha256) for b in two]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, two, strict=True))
    assert one[0].pixels.shape == (32, 32, 3)


def test_images_at_the_top_have_no_label(folder: Path) -> None:
    (folder / "stray.png").write_bytes(png(9))
    assert not open_images(folder, CLASSES).labelled


def test_a_folder_that_is_not_a_class_is_named(folder: Path) -> None:
    (folder / "cat").rename(folder / "catt")
    with pytest.raises(DatasetError, match="not classes: catt"):
        open_images(folder, CLASSES)


def test_no_image_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DatasetError, match=r"contains no images \(1 other files\)"):
        open_images(tmp_path)
    with pytest.raises(DatasetError, match="does not exist"):
        open_images(tmp_path / "none")
    with pytest.raises(DatasetError, match="not a readable zip"):
        open_images(tmp_path / "notes.txt")


def test_a_name_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(png(1))
    with pytest.raises(DatasetError, match="not UTF-8"):
        open_images(folder, CLASSES)


def test_a_zip_cannot_reach_outside(tmp_path: Path) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../evil.png", png(0))
    with pytest.raises(DatasetError, match="a path outside the archive"):
        open_images(path)


def test_a_broken_image_stops_or_is_skipped_by_name(folder: Path) -> None:
    (folder / "dog" / "3.png").write_bytes(png(3)[:60])
    images = open_images(folder, CLASSES)
    with pytest.raises(DatasetError, match=r"dog/3\.png"):
        list(iter_crops(images, SPEC))
    skipped = Skipped()
    assert len(list(iter_crops(images, SPEC, skipped=skipped))) == 5
    assert skipped.names == ["dog/3.png"]


def test_selection_is_seeded_and_even(folder: Path) -> None:
    images = open_images(folder, CLASSES)
    chosen = select(images, 4, seed=1)
    assert [entry.label for entry in chosen.entries].count(0) == 2
    assert chosen == select(images, 4, seed=1)
    assert len({select(images, 4, seed=seed).entries for seed in range(8)}) > 1
    with pytest.raises(DatasetError, match="contains 6 images, 7 are needed"):
        select(images, 7, seed=0)


@pytest.mark.parametrize("count", [1, 5, 7, 12, 20, 30])
@pytest.mark.parametrize("flat", [False, True], ids=["class folders", "label file"])
def test_a_selection_is_even_over_the_classes(tmp_path: Path, count: int, flat: bool) -> None:
    sizes = {"a": 2, "b": 9, "c": 9, "d": 10}
    lines = []
    for name, size in sizes.items():
        for number in range(size):
            path = tmp_path / (
                f"{name}{number}.png" if flat else f"{name}/sub{number % 2}/{number}.png"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number))
            lines.append(f"{path.name} {list(sizes).index(name)}")
    if flat:
        (tmp_path / "val.txt").write_text("\n".join(lines))
    images = open_images(tmp_path, tuple(sizes))
    assert images.labelled
    for seed in range(5):
        counts = Counter(entry.label for entry in select(images, count, seed).entries)
        assert counts.total() == count
        # Counts differ by one among classes with images left; exhausted classes have no more.
        left = [counts[i] for i, size in enumerate(sizes.values()) if counts[i] < size]
        used = [size for i, size in enumerate(sizes.values()) if counts[i] == size]
        if left:
            assert max(left) - min(left) <= 1
            assert max([*used, 0]) <= max(left)


def test_the_comparison_detects_an_uneven_selection(folder: Path) -> None:
    first = Counter(entry.label for entry in open_images(folder, CLASSES).entries[:4])
    assert max(first.values()) - min(first.values()) > 1


def test_class_folders_are_found_below_a_common_folder(folder: Path) -> None:
    deep = folder.parent / "deep"
    (deep / "ILSVRC" / "Data").mkdir(parents=True)
    folder.rename(deep / "ILSVRC" / "Data" / "val")
    images = open_images(deep, CLASSES)
    assert [entry.label for entry in images.entries] == [0, 0, 0, 1, 1, 1]
    assert images.entries[0].name == "ILSVRC/Data/val/cat/0.png"
    assert survey(images).others.first == ("ILSVRC/Data/val/notes.txt",)
    # A train folder beside val is refused, because the choice is ambiguous.
    (deep / "ILSVRC" / "Data" / "train" / "cat").mkdir(parents=True)
    (deep / "ILSVRC" / "Data" / "train" / "cat" / "9.png").write_bytes(png(9))
    with pytest.raises(DatasetError, match=r"ILSVRC/Data/train, ILSVRC/Data/val \(pass one"):
        open_images(deep, CLASSES)


def test_resource_forks_of_macos_are_left_out_and_reported(folder: Path) -> None:
    path = as_zip(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/cat/._0.png", b"\0\5\x16\7")
        archive.writestr("cat/._2.png", b"\0\5\x16\7")
    images = open_images(path, CLASSES)
    assert images.entries == open_images(folder, CLASSES).entries
    assert survey(images).ignored.count == 2


def test_a_survey_counts_problems(folder: Path) -> None:
    (folder / "notes.txt").unlink()
    assert survey(open_images(folder, CLASSES))
    (folder / "notes.txt").write_text("no image")
    (folder / "stray.png").write_bytes(png(9))
    (folder / "cat" / "copy.png").write_bytes(png(1))
    (folder / "dog" / "3.png").write_bytes(b"")
    images = open_images(folder, (*CLASSES, "emu"))
    found = survey(images)
    assert not found
    assert (found.images, found.classes) == (8, 2)
    assert found.absent_classes.first == ("emu",)
    assert found.unlabelled.first == ("stray.png",)
    assert found.problems() == (
        "1 images have no class: stray.png",
        "1 classes have no image: emu",
        "1 files are not images and were left out: notes.txt",
    )
    reading = Reading()
    crops = iter_crops(images, SPEC, skipped=Skipped(), reading=reading)
    assert len(list(crops)) == 7
    assert reading.read == 8
    assert reading.unreadable == ["dog/3.png"]
    assert reading.duplicates == ["dog/1.png is cat/copy.png"]
    assert reading.problems() == (
        "1 images cannot be read: dog/3.png",
        "1 images have the same bytes as another one: dog/1.png is cat/copy.png",
    )


def test_batches_keep_the_order_and_the_last_one_may_be_smaller() -> None:
    crops = [(str(at), np.full((8, 8, 3), at, np.uint8)) for at in range(5)]
    batches = list(stack_batches(iter(crops), 2))
    assert [keys for keys, _ in batches] == [["0", "1"], ["2", "3"], ["4"]]
    assert [pixels.shape for _, pixels in batches] == [(2, 8, 8, 3), (2, 8, 8, 3), (1, 8, 8, 3)]
    assert np.concatenate([pixels for _, pixels in batches])[:, 0, 0, 0].tolist() == list(range(5))
    assert list(stack_batches(iter(crops[:0]), 2)) == []


def test_a_survey_counts_only_the_selected_images(folder: Path) -> None:
    images = open_images(folder, CLASSES)
    only_cats = ImageFolder(images.root, images.entries[:3], images.origin)
    assert survey(only_cats).absent_classes.first == ("dog",)
    assert survey(select(images, 4, seed=0)).images == 4


def test_a_survey_shows_five_names_of_many(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(png(number))
    (problem,) = survey(open_images(tmp_path, ("cat",))).problems()[:1]
    assert problem == "12 images have no class: 00.png, 01.png, 02.png, 03.png, 04.png and 7 more"


def header_only(width: int, height: int) -> bytes:
    """A PNG with this size in its header and another image's data."""
    data = bytearray(png(0))
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


BAD = {
    "a zero-byte file": (b"", "cannot identify"),
    "text": (b"no image at all\n" * 100, "cannot identify"),
    "a cut file": (png(0)[:80], "truncated|cannot"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "cannot identify"),
    "a bomb": (header_only(30_000, 30_000), "decompression bomb"),
    "a header that lies": (header_only(9, 9), "truncated|not enough|image file"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", BAD)
def test_unreadable_files_are_named_and_the_others_are_decoded(
    folder: Path, kind: str, workers: int
) -> None:
    data, reason = BAD[kind]
    (folder / "dog" / "3.png").write_bytes(data)
    images = open_images(folder, CLASSES)
    with pytest.raises(DatasetError, match=rf"dog/3\.png: .*({reason})"):
        list(iter_crops(images, SPEC, workers=workers))
    skipped = Skipped()
    crops = list(iter_crops(images, SPEC, workers=workers, skipped=skipped))
    assert skipped.names == ["dog/3.png"]
    assert [crop.entry for crop in crops] == [e for e in images.entries if e.name != "dog/3.png"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_half_a_bomb_is_refused_too(tmp_path: Path, workers: int, action: str) -> None:
    """Between one and two times its limit of 89 million pixels, Pillow only warns."""
    warnings.simplefilter(action, Image.DecompressionBombWarning)  # pytest resets the filters
    (tmp_path / "large.png").write_bytes(header_only(10_000, 10_000))
    with pytest.raises(DatasetError, match=r"large\.png: .*decompression bomb"):
        list(iter_crops(open_images(tmp_path), SPEC, workers=workers))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("1", "png"),
        ("LA", "png"),
        ("RGBA", "webp"),
        ("CMYK", "jpg"),
        ("YCbCr", "jpg"),
        ("I;16", "png"),
        ("RGB", "BMP"),
        ("RGB", "tiff"),
    ],
)
def test_unusual_images_become_rgb_crops(tmp_path: Path, mode: str, suffix: str) -> None:
    y, x = np.mgrid[0:48, 0:48]
    ramp = np.stack([x * 5, y * 5, x * 5], -1).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(ramp[..., 0].astype(np.uint16) << 8)
    else:
        image = Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / f"odd.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
    (crop,) = iter_crops(open_images(tmp_path), SPEC)
    assert (crop.pixels.shape, crop.pixels.dtype) == ((32, 32, 3), np.uint8)
    # Columns 0 to 239 from left to right, in grey modes by the red and blue share at least.
    assert crop.pixels[:, -4:].mean() - crop.pixels[:, :4].mean() > 50


def test_a_rotated_photo_is_set_upright(tmp_path: Path) -> None:
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[:, :24] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise: the left half comes up
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    images = open_images(tmp_path)
    (upright,) = iter_crops(images, SPEC)
    (as_stored,) = iter_crops(images, replace(SPEC, exif_orientation=False))
    # 255 and 0 but for JPEG's ringing at the edge.
    assert upright.pixels[:12].mean() > 250
    assert upright.pixels[-12:].mean() < 5
    assert as_stored.pixels[:, :12].mean() > 250
