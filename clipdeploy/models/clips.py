"""Look up published CLIPs: repository, zero-shot accuracy, and what their files do not tell.

Each row of ``data/clips.csv`` is a CLIP; to add one, add a row.  A zero-shot classifier is a model
of its geometry, whatever CLIP it was made from, so no row changes what a model's name means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from clipdeploy.core.data_rows import DataRow, read_rows
from clipdeploy.models import columns
from clipdeploy.models.cards import NORMALISATIONS
from clipdeploy.models.hub import hub_folder

__all__ = ["PublishedClip", "clip_named", "clip_of_file", "published_clips"]

_COLUMNS = "see docs/zero-shot.md for the columns"


@dataclass(frozen=True)
class PublishedClip:
    """The facts about one published CLIP.

    ``name`` is its repository on the Hugging Face hub, ``OWNER/NAME``.  ``gelu`` is that of both
    towers.  ``normalisation`` names mean and std of the training, as in ``zoo.csv``.  ``top1`` is
    percent on ImageNet's validation set with OpenAI's class texts and 80 templates, None if
    unpublished.  ``sha256_prefix`` is of the file that its authors published elsewhere, empty if
    there is none.
    """

    name: str
    architecture: str
    pretrain: str
    image_size: int
    gelu: Literal["erf", "quick"]
    normalisation: str
    top1: float | None
    sha256_prefix: str = ""

    @property
    def mean_std(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and std for samples scaled to 0..1, in the order of red, green and blue."""
        return NORMALISATIONS[self.normalisation]

    @property
    def hub_folder(self) -> str:
        """The folder of the weights in a cache of huggingface_hub."""
        return hub_folder(self.name)


@cache
def published_clips() -> tuple[PublishedClip, ...]:
    """The CLIPs in the order of ``clips.csv``.

    Raises:
        ArtifactError: a row is invalid.
    """
    return tuple(_clip(row) for row in read_rows("clips.csv", hint=_COLUMNS))


def _clip(row: DataRow) -> PublishedClip:
    value = row.value
    return PublishedClip(
        name=value("name", columns.hub_name),
        architecture=value("architecture", str),
        pretrain=value("pretrain", str, "-"),
        image_size=value("image_size", columns.count),
        gelu="quick" if value("gelu", columns.one_of("erf", "quick")) == "quick" else "erf",
        normalisation=value("normalisation", columns.one_of(*NORMALISATIONS), "clip"),
        # NaN: blank, so unpublished.
        top1=columns.known(value("zero_shot_top1", columns.percent, math.nan)),
        sha256_prefix=value("sha256_prefix", columns.hash_prefix, ""),
    )


def clip_named(name: str) -> PublishedClip | None:
    """The CLIP with this name; None if no row has it."""
    return next((each for each in published_clips() if each.name == name), None)


def clip_of_file(path: Path, sha256: str) -> PublishedClip | None:
    """The CLIP whose file this is, by its place in a cache of the hub or by its hash."""
    for each in published_clips():
        hashed = each.sha256_prefix and sha256.startswith(each.sha256_prefix)
        if hashed or each.hub_folder in path.parts:
            return each
    return None
