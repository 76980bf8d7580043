"""Removes copies of images: a copy is no new evidence, and would make an interval too narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipdeploy.imaging.fingerprints import THUMBNAIL_BYTES, first_copies
from clipdeploy.verification.records import ImageRecord

__all__ = ["Distinct", "distinct_records"]


@dataclass(frozen=True)
class Distinct:
    """The records of distinct images.

    ``records`` have different decoded pixels, ``unlike`` are those of them that do not look almost
    like an earlier one; ``copies`` counts the removed ones.
    """

    records: list[ImageRecord]
    unlike: list[ImageRecord]
    copies: int

    @property
    def near_copies(self) -> int:
        """The number of images that look almost like an earlier one."""
        return len(self.records) - len(self.unlike)


def distinct_records(records: Sequence[ImageRecord]) -> Distinct:
    """Return the first record of each image, in order."""
    thumbnails = np.frombuffer(b"".join(r.image.thumbnail for r in records), np.uint8)
    same, near = first_copies(
        [record.image.pixels for record in records], thumbnails.reshape(-1, THUMBNAIL_BYTES)
    )
    own = np.arange(len(records))
    return Distinct(
        [records[index] for index in np.flatnonzero(same == own).tolist()],
        [records[index] for index in np.flatnonzero(near == own).tolist()],
        int((same != own).sum()),
    )
