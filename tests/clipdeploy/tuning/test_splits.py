"""Splits share no image, even under another name."""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging import ImageFolder, open_images
from clipdeploy.models import cards
from clipdeploy.tuning.splits import Split, check_splits, hash_images, split_images

NAMES = tuple(name for name, _ in cards.class_names(cards.find(cards.DEMO)))


@pytest.fixture(scope="module")
def images() -> ImageFolder:
    return open_images(cards.demo_file("test.zip"), NAMES)


@pytest.fixture(scope="module")
def hashes(images: ImageFolder) -> dict[str, str]:
    return hash_images(images)


def test_halves_are_disjoint_balanced_and_seeded(
    images: ImageFolder, hashes: dict[str, str]
) -> None:
    search, confirm = split_images(images, hashes, 250, seed=3)
    assert len(search.hashes) + len(confirm.hashes) == len(images.entries) == 500
    assert not set(search.hashes.values()) & set(confirm.hashes.values())
    counts = Counter(entry.label for entry in search.images.entries)
    assert len(counts) == 10
    assert max(counts.values()) - min(counts.values()) <= 1
    again, other = (split_images(images, hashes, 250, seed=seed)[0] for seed in (3, 4))
    assert again == search
    assert other.digest != search.digest


def test_a_copy_under_another_name_counts_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        archive.extractall(tmp_path)
    for folder in tmp_path.iterdir():
        first = sorted(folder.iterdir())[0]
        shutil.copy(first, folder / f"copy-of-{first.name}")
    images = open_images(tmp_path, NAMES)
    hashes = hash_images(images)
    search, confirm = split_images(images, hashes, 100, seed=0)
    assert len(images.entries) == 510
    assert len(search.hashes) + len(confirm.hashes) == 500
    check_splits(search, confirm, frozenset())


def test_a_search_split_cannot_confirm(images: ImageFolder, hashes: dict[str, str]) -> None:
    search, confirm = split_images(images, hashes, 100, seed=0)
    check_splits(search, confirm, frozenset())
    with pytest.raises(DatasetError, match="was searched on"):
        check_splits(search, search, frozenset())
    one = next(iter(search.hashes.values()))
    mixed = Split(confirm.images, confirm.hashes | {"renamed.png": one})
    with pytest.raises(DatasetError, match=r"renamed\.png was searched on"):
        check_splits(search, mixed, frozenset())


@pytest.mark.parametrize("which", [0, 1])
def test_calibration_images_cannot_judge(
    images: ImageFolder, hashes: dict[str, str], which: int
) -> None:
    splits = split_images(images, hashes, 100, seed=0)
    known = next(iter(splits[which].hashes.values()))
    with pytest.raises(DatasetError, match="used for calibration"):
        check_splits(*splits, frozenset({known}))


def test_some_must_be_left(images: ImageFolder, hashes: dict[str, str]) -> None:
    for count in (0, 500):
        with pytest.raises(DatasetError):
            split_images(images, hashes, count, seed=0)
