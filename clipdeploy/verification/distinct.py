"""Each image once: copies of one say nothing new, and an interval over them would be too narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipdeploy.imaging.fingerprints import THUMBNAIL_BYTES, first_copies
from clipdeploy.verification.records import ImageRecord

__all__ = ["Distinct", "distinct_records"]


@dataclass(frozen=True)
class Distinct:
    """The records of different images.

    ``records`` have different decoded pixels, ``unlike`` are those of them that do not look nearly
    like an earlier one; ``copies`` were left out as they have the pixels of another.
    """

    records: list[ImageRecord]
    unlike: list[ImageRecord]
    copies: int

    @property
    def near_copies(self) -> int:
        """How many look nearly like an earlier one."""
        return len(self.records) - len(self.unlike)


def distinct_records(records: Sequence[ImageRecord]) -> Distinct:
    """The first record of each image, in their order."""
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
