"""Batches are the same in every run, also if a run takes only some of them."""

from __future__ import annotations

import itertools
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD, Preprocess
from clipdeploy.imaging import ImageFolder, open_images, select
from clipdeploy.imaging.archives import ZipPlace
from clipdeploy.models import cards
from clipdeploy.verification.batches import (
    DecodedBatch,
    decoded_batches,
    digest_of_contents,
    digest_of_entries,
    digest_of_files,
    shuffled,
)

SPEC = Preprocess(32, CLIP_MEAN, CLIP_STD)
SIZE = 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty digits in class folders, last changed an hour ago."""
    import zipfile

    chosen = select(open_images(cards.demo_file("test.zip"), tuple("0123456789")), 30, seed=0)
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        archive.extractall(tmp_path / "digits", [entry.name for entry in chosen.entries])
    return tmp_path / "digits"


@pytest.fixture
def images(folder: Path) -> ImageFolder:
    return open_images(folder, tuple("0123456789"))


def batches(images: ImageFolder, *numbers: int, skip: bool = False) -> list[DecodedBatch]:
    chosen = numbers or range(-(-len(images.entries) // SIZE))
    return list(decoded_batches(images, SPEC, SIZE, set(chosen), skip_unreadable=skip, workers=0))


def contents(batch: DecodedBatch) -> list[tuple[str, str, bytes]]:
    return [(crop.entry.name, crop.sha256, crop.pixels.tobytes()) for crop in batch.crops]


def test_batches_are_the_list_cut_up(images: ImageFolder) -> None:
    found = batches(images)
    assert [len(batch.crops) for batch in found] == [7, 7, 7, 7, 2]
    assert [batch.number for batch in found] == [0, 1, 2, 3, 4]
    names = [crop.entry.name for batch in found for crop in batch.crops]
    assert names == [entry.name for entry in images.entries]


def test_any_part_of_the_numbers_gives_the_same_batches(images: ImageFolder) -> None:
    whole = {batch.number: contents(batch) for batch in batches(images)}
    generator = random.Random(0)
    for _ in range(10):
        numbers = generator.sample(range(5), generator.randint(1, 5))
        found = batches(images, *numbers)
        assert [batch.number for batch in found] == sorted(numbers)
        assert all(contents(batch) == whole[batch.number] for batch in found)


@pytest.mark.parametrize("spoilt", [[0], [6, 7], list(range(7, 14)), [29], list(range(30))])
def test_unreadable_images_move_no_other(
    spoilt: list[int], images: ImageFolder, folder: Path
) -> None:
    whole = {batch.number: contents(batch) for batch in batches(images)}
    names = [images.entries[i].name for i in spoilt]
    for name in names:
        (folder / name).write_bytes(b"no image")
    with pytest.raises(DatasetError, match=names[0]):
        batches(images)
    found = batches(images, skip=True)
    assert [batch.number for batch in found] == [0, 1, 2, 3, 4]
    assert [name for batch in found for name in batch.unreadable] == names
    for batch in found:
        kept = [each for each in whole[batch.number] if each[0] not in names]
        assert contents(batch) == kept
        assert all(
            images.entries.index(entry) // SIZE == batch.number
            for entry in images.entries
            if entry.name in batch.unreadable
        )
    # The same of one shard.
    assert [contents(b) for b in batches(images, 1, 3, skip=True)] == [
        contents(found[1]),
        contents(found[3]),
    ]


def test_the_order_is_always_the_same_mixes_classes_and_loses_nothing(images: ImageFolder) -> None:
    one = shuffled(images)
    assert one == shuffled(images)
    assert one.entries != images.entries
    assert set(one.entries) == set(images.entries)
    # In the order of their names, seven of ten batches have at most two classes.
    for start in range(0, 28, SIZE):
        assert len({entry.label for entry in one.entries[start : start + SIZE]}) >= 4
    everything = shuffled(open_images(cards.demo_file("test.zip"), tuple("0123456789"))).entries
    neighbours = sum(a.label == b.label for a, b in itertools.pairwise(everything))
    # A tenth by chance, within four standard deviations; sorted by class it is 98 %.
    assert abs(neighbours / 499 - 0.1) < 4 * (0.09 / 499) ** 0.5
    # Batches follow the given order.
    assert [crop.entry.name for batch in batches(one) for crop in batch.crops] == [
        entry.name for entry in one.entries
    ]


def test_the_digest_of_entries(images: ImageFolder) -> None:
    digest = digest_of_entries(images)
    assert digest_of_entries(ImageFolder(Path("elsewhere"), images.entries)) == digest
    first, *rest = images.entries
    for entries in (
        tuple(rest),
        (*rest, first),
        (replace(first, label=9), *rest),
        (replace(first, name="0/other.png"), *rest),
        (replace(first, label=None), *rest),
    ):
        assert digest_of_entries(ImageFolder(images.root, entries)) != digest


def test_the_digest_of_contents(images: ImageFolder, folder: Path) -> None:
    digest = digest_of_contents(images)
    elsewhere = folder.rename(folder.with_name("moved"))
    moved = ImageFolder(elsewhere, images.entries)
    assert digest_of_contents(moved) == digest
    path = elsewhere / images.entries[11].name
    data = path.read_bytes()
    for other in (data + b"x", data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(other)
        assert digest_of_contents(moved) != digest
    path.unlink()
    assert digest_of_contents(moved) != digest
    # A zip has a CRC-32 of every member: it also covers those that are not sampled.
    archive = open_images(cards.demo_file("test.zip"), tuple("0123456789"))
    unsampled = archive.entries[3]
    assert isinstance(unsampled.place, ZipPlace)
    place = replace(unsampled.place, crc=unsampled.place.crc ^ 1)
    entries = (*archive.entries[:3], replace(unsampled, place=place), *archive.entries[4:])
    changed = ImageFolder(archive.root, entries)
    assert digest_of_contents(changed) != digest_of_contents(archive)


def test_the_digest_of_files(
    images: ImageFolder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They were written just now, and another change might not change their stamps.
    assert digest_of_files(images) == ""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)
    digest = digest_of_files(images)
    assert len(digest) == 64
    assert digest_of_files(images) == digest
    os.utime(folder / images.entries[5].name, ns=(now, now))
    assert digest_of_files(images) != digest
    (folder / images.entries[5].name).unlink()
    assert digest_of_files(images) == ""


def test_pixels_are_the_images(images: ImageFolder) -> None:
    (first,) = batches(images, 0)
    assert all(crop.pixels.shape == (32, 32, 3) for crop in first.crops)
    assert len({crop.pixels.tobytes() for crop in first.crops}) == SIZE
    assert np.stack([crop.pixels for crop in first.crops]).dtype == np.uint8
