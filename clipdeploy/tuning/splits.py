"""Splits images into a search set and a confirmation set that share no image, by SHA-256."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging import ImageEntry, ImageFolder

__all__ = ["Split", "check_splits", "hash_images", "split_images"]


@dataclass(frozen=True)
class Split:
    """Images, and the SHA-256 of each by name."""

    images: ImageFolder
    hashes: dict[str, str]

    @property
    def digest(self) -> str:
        """One hash of all images, independent of names and order."""
        return hashlib.sha256("".join(sorted(self.hashes.values())).encode()).hexdigest()


def hash_images(images: ImageFolder) -> dict[str, str]:
    """The SHA-256 of each image's bytes, by name.

    Raises:
        DatasetError: an image cannot be read.
    """
    reader = images.reader()
    try:
        return {
            entry.name: hashlib.sha256(reader.read(entry.name)).hexdigest()
            for entry in images.entries
        }
    finally:
        reader.close()


def split_images(
    images: ImageFolder, hashes: Mapping[str, str], search: int, seed: int
) -> tuple[Split, Split]:
    """Choose ``search`` images with ``seed``, spread evenly over the classes; split off the rest.

    Copies of an image, by its bytes, count once.

    Raises:
        DatasetError: no image is left to confirm on.
    """
    groups: dict[int | None, list[ImageEntry]] = defaultdict(list)
    seen: set[str] = set()
    for entry in images.entries:
        if hashes[entry.name] not in seen:
            seen.add(hashes[entry.name])
            groups[entry.label].append(entry)
    if not 0 < search < len(seen):
        raise DatasetError(
            f"{images.root} has {len(seen)} different images: {search} to search on leave none "
            "to confirm on"
            if search
            else f"{images.root}: too few images to split",
            hint="give more images, or search on fewer with --search-images",
        )
    generator = np.random.default_rng(seed)
    drawn = [[group[i] for i in generator.permutation(len(group))] for group in groups.values()]
    # The first image of each class, then the second: both splits contain all classes.
    turns = [
        group[turn] for turn in range(max(map(len, drawn))) for group in drawn if turn < len(group)
    ]
    return _split(images, turns[:search], hashes), _split(images, turns[search:], hashes)


def _split(images: ImageFolder, chosen: list[ImageEntry], hashes: Mapping[str, str]) -> Split:
    entries = tuple(sorted(chosen, key=lambda entry: entry.name))
    kept = {entry.name: hashes[entry.name] for entry in entries}
    return Split(ImageFolder(images.root, entries, images.origin), kept)


def check_splits(search: Split, confirm: Split, calibrated: frozenset[str]) -> None:
    """Check that no image is in both splits or was calibrated on.

    Raises:
        DatasetError: an image is in both splits, or in ``calibrated``.
    """
    known = set(search.hashes.values())
    for name, digest in confirm.hashes.items():
        if digest in known:
            raise DatasetError(
                f"{name} was searched on, so it cannot confirm the result",
                hint="confirm on images that the search did not use",
            )
    for split in (search, confirm):
        for name, digest in split.hashes.items():
            if digest in calibrated:
                raise DatasetError(
                    f"{name} was used for calibration, so it cannot judge the result",
                    hint="search on images that `calibrate` did not use",
                )
