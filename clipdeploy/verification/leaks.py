"""Images that an artifact was calibrated on: they flatter it, so that they cannot judge it.

A leak is an image with the bytes or the decoded pixels of a calibration image (``same``); one that
looks nearly the same (``near``, a photograph that was saved again with loss) is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calibration.table import load_table
from clipdeploy.core.errors import DatasetError
from clipdeploy.core.files import sha256_file
from clipdeploy.imaging import Crop
from clipdeploy.imaging.fingerprints import Fingerprint, Known
from clipdeploy.verification.records import Leak
from clipdeploy.verification.targets import Target
from exporters.headers import read_skeleton
from exporters.products import find_products

__all__ = ["Calibrated", "calibration_of", "read_calibrated", "refuse_leaks"]


@dataclass(frozen=True)
class Calibrated:
    """The images of a calibration table; of none if it is left empty.

    ``table`` is the SHA-256 of the table's file, ``digest`` that of what is known of its images.
    ``decoded`` is False if the table says nothing of their decoded pixels, as old ones do.
    """

    table: str = ""
    digest: str = ""
    images: Known = field(default_factory=lambda: Known(()), compare=False)
    decoded: bool = True

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence if leaks are looked for by the files' bytes alone."""
        if self.decoded:
            return ()
        return (
            "the calibration is of an older clipdeploy: calibration images that were saved again "
            "in another format are not recognised; `clipdeploy calibrate --force` makes it anew",
        )

    def leaks(self, crops: Sequence[Crop]) -> list[tuple[str, Leak]]:
        """The names of some images, and which of them are among these."""
        hashes, prints = zip(*((c.sha256, c.fingerprint) for c in crops), strict=True)
        names = (crop.entry.name for crop in crops)
        return list(zip(names, self.images.match_all(hashes, prints), strict=True))


def read_calibrated(path: Path) -> Calibrated:
    """The images of the calibration table at ``path``; of none if there is no such file.

    Raises:
        FileError, ArtifactError: it cannot be read.
    """
    if not path.exists():
        return Calibrated()
    images = load_table(path).images
    prints = [
        (each.sha256, Fingerprint(each.pixels, each.thumbnail) if each.decoded else None)
        for each in images
    ]
    digest = hashlib.sha256(repr(sorted(prints, key=repr)).encode()).hexdigest()
    decoded = all(found is not None for _, found in prints)
    return Calibrated(sha256_file(path), digest, Known(prints), decoded)


def calibration_of(target: Target, known: Calibrated) -> str | None:
    """The table that an artifact was calibrated with: empty if with none, None if it is unknown.

    What nothing vouches for and has an INT8 product was calibrated on unknown images, and so may
    be an engine that nothing vouches for.
    """
    if not target.vouched:
        engine = target.kind == "engine"
        return None if engine or _has_int8(target.path) else ""
    if not target.precision.startswith("int8"):
        return ""
    table = target.passport.parents.get("calibration", "")
    return table if table and table == known.table else None


def _has_int8(graph: Path) -> bool:
    return any(found.precision == "int8" for found in find_products(read_skeleton(graph)))


def refuse_leaks(images: Iterable[tuple[str, Leak]]) -> None:
    """Refuse an image that an artifact was calibrated on, among pairs of name and leak.

    Raises:
        DatasetError: it is there.
    """
    for name, leak in images:
        if leak == "same":
            raise DatasetError(
                f"{name} was used for calibration: it cannot judge the result",
                hint="verify with other images, or pass --allow-leak to count and show them",
            )
