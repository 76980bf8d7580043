from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdeploy import zoo
from clipdeploy.datasets import Skipped, iter_crops, open_images, select
from exporters.artifact import Recipe
from exporters.errors import DatasetError

SPEC = zoo.find(zoo.DEMO).preprocess(Recipe())
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


def test_a_folder_that_is_no_class_is_named(folder: Path) -> None:
    (folder / "cat").rename(folder / "catt")
    with pytest.raises(DatasetError, match="no class: catt"):
        open_images(folder, CLASSES)


def test_no_image_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DatasetError, match=r"holds no image \(1 other files\)"):
        open_images(tmp_path)
    with pytest.raises(DatasetError, match="does not exist"):
        open_images(tmp_path / "none")
    with pytest.raises(DatasetError, match="no readable zip"):
        open_images(tmp_path / "notes.txt")


def test_a_name_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(png(1))
    with pytest.raises(DatasetError, match="not UTF-8"):
        open_images(folder, CLASSES)


def test_a_zip_cannot_reach_outside(tmp_path: Path) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../evil.png", png(0))
    with pytest.raises(DatasetError, match="outside itself"):
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
    with pytest.raises(DatasetError, match="holds 6 images, 7 were asked for"):
        select(images, 7, seed=0)
