"""Whether the reference of an artifact was proven: by a probe, by its accuracy, or not at all.

    export --probe      ->  weights.probed in the graph's passport
    verify, confirmed   ->  reference.json beside the graph  ->  inspect, package, deploy, reports

An accuracy is measured after the graph was written, whose hash must not change. So the accuracy is
recorded in a file of its own. It counts only while everything that decides the reference's answers
is the same: :func:`decides_reference`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

from clipdeploy.core.errors import ArtifactError, FileError
from clipdeploy.core.files import file_errors, write_atomic
from clipdeploy.core.passport import Passport, read_json, settings_of, to_json
from clipdeploy.core.values import Fault, is_hash, is_number, unless, unless_lines
from clipdeploy.engines.passport import library_versions
from clipdeploy.imaging.keys import digest_of, pixels_key, sources
from clipdeploy.models import cards

__all__ = [
    "PROOF_FILE",
    "AccuracyProof",
    "Means",
    "ReferenceProof",
    "decides_reference",
    "reference_code",
    "reference_proof",
    "remove_proof",
    "save_proof",
]

PROOF_FILE = "reference.json"
PROOF_SCHEMA = 1

# The modules that turn a crop and a checkpoint into logits.
_DECIDES_LOGITS = (
    "clipdeploy.models.checkpoints.canonical",
    "clipdeploy.models.checkpoints.checkpoint",
    "clipdeploy.models.checkpoints.position",
    "clipdeploy.models.checkpoints.select",
    "clipdeploy.models.checkpoints.stated",
    "clipdeploy.models.checkpoints.unpickle",
    *(
        f"clipdeploy.models.checkpoints.layouts.{name}"
        for name in (
            *("hf_clip", "hf_vit", "layout", "mmpretrain", "mmpretrain_clip", "openai", "timm"),
            "zero_shot",
        )
    ),
    "clipdeploy.models.clip.embedding",
    "clipdeploy.models.clip.pair",
    "clipdeploy.models.load",
    "clipdeploy.runners.torch",
    "clipdeploy.models.vit",
    "exporters.preprocess_graph",
    "exporters.samples",
)

Means = Literal["probe", "published accuracy", "expected accuracy"]


def reference_code() -> str:
    """Hash the source code that turns a crop and a checkpoint into logits; hex SHA-256."""
    return sources(_DECIDES_LOGITS)


def decides_reference(passport: Passport) -> dict[str, str]:
    """Everything that decides the reference's answers to an image file, by name, as short texts.

    The number of threads, the processor and the device are left out: they move the last bits of
    logits, and an accuracy of many images is no statement about those.
    """
    card = cards.full_card(passport.model)
    return {
        "weights": passport.weights.identity,
        "model": passport.model,
        "card": digest_of(settings_of(card)) if card is not None else "",
        "recipe": digest_of(settings_of(passport.recipe)),
        "preprocessing": digest_of(settings_of(passport.preprocess)),
        "class names": digest_of([passport.classes, *passport.class_names]),
        "image decoder": pixels_key(passport.preprocess),
        "code": reference_code(),
        "PyTorch": library_versions().get("torch", ""),
    }


@dataclass(frozen=True)
class AccuracyProof:
    """An accuracy of the reference that ``verify`` measured and confirmed.

    ``source``: whose accuracy it was compared with, that of the model's card (``published``) or the
    user's (``expected``). ``top1`` was measured and ``stated_top1`` published or expected, in
    percent; ``interval`` is Wilson's 99 % interval of ``top1``. ``images`` of ``data`` were judged;
    ``entries`` is the SHA-256 of the names and classes of all its images. ``decides`` are the
    values of :func:`decides_reference`. ``date`` is that of the first verification that gave these
    numbers, in UTC.
    """

    source: Literal["published", "expected"]
    stated_top1: float
    top1: float
    interval: tuple[float, float]
    images: int
    data: str
    entries: str
    decides: dict[str, str]
    date: str = field(compare=False)
    schema: int = PROOF_SCHEMA

    def faults(self) -> Iterator[Fault]:
        """Yield invalid values, see :mod:`clipdeploy.core.values`."""
        for name in ("stated_top1", "top1"):
            value = getattr(self, name)
            yield from unless(is_number(value, 0, 100), name, value, "from 0 to 100")
        low, high = self.interval
        near = low - cards.TOP1_ROUNDING <= self.stated_top1 <= high + cards.TOP1_ROUNDING
        around = low <= self.top1 <= high and near
        yield from unless(around, "interval", self.interval, "around both accuracies")
        yield from unless(self.images >= 1, "images", self.images, "1 or more")
        yield from unless(is_hash(self.entries), "entries", self.entries, "a SHA-256 in hex")
        yield from unless(_is_date(self.date), "date", self.date, "a date such as 2026-01-31")
        yield from unless_lines("data", self.data)
        yield from unless_lines("decides", self.decides)

    @property
    def sentence(self) -> str:
        """The two accuracies and their images in words."""
        low, high = self.interval
        stated = "was published" if self.source == "published" else "was expected"
        return (
            f"top-1 is {self.top1:.2f} % of {self.images:,} images of {self.data} "
            f"(99 % interval {low:.2f} to {high:.2f}), {self.stated_top1:.2f} % {stated}; "
            f"{self.date}"
        )


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True)
class ReferenceProof:
    """How the reference of an artifact was proven: ``by`` nothing if it was not.

    ``expected accuracy`` is one that the user gave, not a published one. ``accuracy`` has the
    numbers, None without them. ``problem`` says why a recorded accuracy does not count; empty if
    there is none.
    """

    by: tuple[Means, ...] = ()
    accuracy: AccuracyProof | None = None
    problem: str = ""

    @property
    def sentence(self) -> str:
        """The proof, or that there is none, in words."""
        found = []
        if "probe" in self.by:
            found.append("proven by a probe: it has the outputs of your framework")
        if self.accuracy is not None:
            means = "published accuracy"
            if self.accuracy.source == "expected":
                means = "the accuracy that you expected, not by a published one"
            found.append(f"proven by {means}: {self.accuracy.sentence}")
        if not found:
            means = (
                "export --probe compares its outputs with your framework's, verify its accuracy "
                "with the published one"
            )
            return f"not proven: {self.problem or means}"
        return "; ".join([*found, *([self.problem] if self.problem else [])])


def reference_proof(artifact: Path, passport: Passport) -> ReferenceProof:
    """How the reference of ``artifact``, whose graph has this ``passport``, was proven.

    A file that is damaged, of a newer version, or of anything else than this reference counts as no
    proof; ``problem`` then names it.
    """
    accuracy, problem = _recorded(artifact.with_name(PROOF_FILE), passport)
    by: list[Means] = ["probe"] if passport.weights.probed else []
    if accuracy is not None:
        by.append("published accuracy" if accuracy.source == "published" else "expected accuracy")
    return ReferenceProof(tuple(by), accuracy, problem)


def _recorded(path: Path, passport: Passport) -> tuple[AccuracyProof | None, str]:
    if not os.path.lexists(path) or passport.embeds:
        return None, ""
    try:
        found = read_json(path, AccuracyProof, PROOF_SCHEMA)
    except (ArtifactError, FileError) as error:
        return None, error.message
    ours = decides_reference(passport)
    if other := [name for name, value in ours.items() if found.decides.get(name, "") != value]:
        return None, f"{path} is of a reference with other {', '.join(other)}"
    return found, ""


def save_proof(artifact: Path, proof: AccuracyProof) -> None:
    """Record an accuracy beside ``artifact``, unless the same one is recorded with an earlier date.

    Raises:
        FileError: no permission, no space.
    """
    path = artifact.with_name(PROOF_FILE)
    try:
        same = read_json(path, AccuracyProof, PROOF_SCHEMA) == proof
    except (ArtifactError, FileError):
        same = False
    if not same:
        write_atomic(path, to_json(proof) + b"\n")


def remove_proof(artifact: Path) -> None:
    """Remove the accuracy that is recorded beside ``artifact``, if there is one.

    Raises:
        FileError: no permission.
    """
    path = artifact.with_name(PROOF_FILE)
    with file_errors("remove", path):
        path.unlink(missing_ok=True)
