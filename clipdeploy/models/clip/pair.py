"""Reads both towers of a CLIP checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.passport import ModelChoices
from clipdeploy.models.checkpoints import Checkpoint, read_tower
from clipdeploy.models.checkpoints.foreign import listed
from clipdeploy.models.checkpoints.stated import stated_of_image, stated_of_text
from clipdeploy.models.clip.text import TextTower, text_tower

__all__ = ["ClipPair", "read_pair"]

_SCALE, _PROJECTION = "logit_scale", "visual_projection.weight"
# openai/CLIP: 100 at most; a file with a higher one is damaged.
_HIGHEST_SCALE = 1000.0


@dataclass(frozen=True)
class ClipPair:
    """The two towers of a CLIP checkpoint.

    ``image`` has canonical tensors and ``embed.weight`` (D, width), CLIP's visual projection, but
    no head.  ``text`` gives embeddings of D numbers.  ``logit_scale`` multiplies the cosines.
    """

    image: Checkpoint
    text: TextTower
    logit_scale: float


def read_pair(path: Path, choices: ModelChoices = ModelChoices()) -> ClipPair:
    """Read a CLIP as OpenAI, open_clip or transformers (``CLIPModel``) save it.

    Raises:
        FileError: the file does not exist or cannot be opened.
        CheckpointError: it cannot be read, is no CLIP, or its towers do not belong together.
    """
    image, beside, config = read_tower(path, choices)
    scale = _take(beside, _SCALE, image.path)
    stated, usual = stated_of_text(config), stated_of_image(config)
    # A configuration may have another GELU for texts; the caller's choice is for both towers.  What
    # the configuration says of images is no choice: a passport records it.
    chosen = choices.gelu if choices.gelu != usual.gelu else None
    gelu = chosen or stated.gelu or image.choices.gelu or "erf"
    chosen_eps = choices.eps if choices.eps != usual.eps else None
    eps = chosen_eps or stated.eps or image.choices.eps or image.native_eps
    text, others = text_tower(beside, image.path, gelu, eps, stated.heads)
    tensors = dict(image.tensors)
    projection = tensors.pop("proj", None)
    own = [name for name in others if name.endswith(_PROJECTION)]
    if projection is None and len(own) == 1:
        projection = beside[own[0]].T
        others = tuple(name for name in others if name != own[0])
    if projection is None or projection.ndim != 2:
        raise CheckpointError(
            f"{image.path} has no visual projection", hint="save the whole model's state dict"
        )
    if others:
        raise CheckpointError(
            f"{image.path} contains tensors of neither tower: {listed(others)}",
            hint="only plain CLIPs are read: a ViT and a text transformer",
        )
    width, embed = projection.shape[0], text.proj.out_features
    if projection.shape != (image.shape.width, embed):
        raise CheckpointError(
            f"the towers of {image.path} do not belong together: the image's embedding is "
            f"{width} x {projection.shape[1]}, the texts' has {embed} numbers",
            hint="save both towers of one CLIP",
        )
    tensors["embed.weight"] = projection.T.contiguous()
    shape = replace(image.shape, embed=embed)
    return ClipPair(replace(image, tensors=tensors, shape=shape), text, _exp(scale, image.path))


def _take(beside: dict[str, Tensor], name: str, path: Path) -> Tensor:
    """Remove the one tensor called ``name``, behind any prefix."""
    found = [each for each in beside if each == name or each.endswith(f".{name}")]
    if len(found) != 1:
        raise CheckpointError(
            f"{path} has no {name}, or more than one: it is no whole CLIP",
            hint="pass OpenAI's archive, or the state dict of open_clip's or transformers' CLIP",
        )
    return beside.pop(found[0])


def _exp(scale: Tensor, path: Path) -> float:
    value = math.exp(min(float(scale), 100.0)) if scale.numel() == 1 else math.nan
    if not 0 < value <= _HIGHEST_SCALE:
        raise CheckpointError(
            f"{path} has a logit scale of {value:g}, which is not from 0 to {_HIGHEST_SCALE:g}",
            hint="the file is damaged: download it again",
        )
    return value
