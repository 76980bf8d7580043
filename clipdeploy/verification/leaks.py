"""Finds validation images that an artifact was calibrated on, which would overstate its accuracy.

A leak is an image with the bytes or the decoded pixels of a calibration image (``same``). One that
looks almost the same (``near``, a photograph that was saved again with loss) is only counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calibration.table import load_table
from clipdeploy.core.errors import DatasetError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import QUANTISED
from clipdeploy.imaging import Crop
from clipdeploy.imaging.fingerprints import Fingerprint, Known
from clipdeploy.verification.records import Leak
from clipdeploy.verification.targets import Target
from exporters.blocks import UNKNOWN
from exporters.headers import read_skeleton
from exporters.products import find_products

__all__ = ["Calibrated", "calibration_of", "read_calibrated", "refuse_leaks"]


@dataclass(frozen=True)
class Calibrated:
    """The images of a calibration table; empty without one.

    ``table`` is the SHA-256 of the table's file, ``digest`` that of the recorded facts about its
    images. ``decoded`` is False if the table has no fingerprints of decoded pixels, as old ones.
    """

    table: str = ""
    digest: str = ""
    images: Known = field(default_factory=lambda: Known(()), compare=False)
    decoded: bool = True

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence if leaks can be found by the files' bytes only."""
        if self.decoded:
            return ()
        return (
            "the calibration was made by an older clipdeploy: calibration images that were saved "
            "again in another format are not recognised; run `clipdeploy calibrate --force`",
        )

    def leaks(self, crops: Sequence[Crop]) -> list[tuple[str, Leak]]:
        """Return the names of the crops' images, each with its kind of leak."""
        hashes, prints = zip(*((c.sha256, c.fingerprint) for c in crops), strict=True)
        names = (crop.entry.name for crop in crops)
        return list(zip(names, self.images.match_all(hashes, prints), strict=True))


def read_calibrated(path: Path) -> Calibrated:
    """Read the images of the calibration table at ``path``; empty if there is no such file.

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


# Precisions of products that no images were needed for; all others, such as int4, have scales.
_UNCALIBRATED = ("fp64", "fp32", "fp16", "bf16", UNKNOWN)


def calibration_of(target: Target, known: Calibrated) -> str | None:
    """Return the table that an artifact was calibrated with: empty if none, None if unknown.

    A graph without a passport that has a quantised product was calibrated on unknown images; an
    engine without a passport may have been.
    """
    if not target.vouched:
        engine = target.kind == "engine"
        return None if engine or _is_quantised(target.path) else ""
    if target.precision not in QUANTISED:
        return ""
    table = target.passport.parents.get("calibration", "")
    return table if table and table == known.table else None


def _is_quantised(graph: Path) -> bool:
    return any(
        found.precision not in _UNCALIBRATED for found in find_products(read_skeleton(graph))
    )


def refuse_leaks(images: Iterable[tuple[str, Leak]]) -> None:
    """Refuse an image that an artifact was calibrated on, among pairs of name and leak.

    Raises:
        DatasetError: there is such an image.
    """
    for name, leak in images:
        if leak == "same":
            raise DatasetError(
                f"{name} was used for calibration: it cannot judge the result",
                hint="verify with other images, or pass --allow-leak to count and show them",
            )
