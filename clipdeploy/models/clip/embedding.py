"""Makes an embedding model of CLIP's image tower: its projection is the output.

    raw:         e = embed x
    normalised:  e / |e|

The length of e does not matter if it is normalised.  The projection is then divided by the length
to expect, so that in FP16 the sum of squares neither overflows nor loses bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from clipdeploy.core.passport import Embedding
from clipdeploy.models.checkpoints import Checkpoint
from clipdeploy.models.clip.pair import ClipPair

__all__ = ["image_tower", "with_unit_projection"]


def image_tower(pair: ClipPair, embedding: Embedding) -> Checkpoint:
    """The image tower as a checkpoint of a model with the output ``embedding``."""
    image = pair.image
    tensors = image.tensors if embedding == "raw" else with_unit_projection(image.tensors)
    shape = replace(image.shape, classes=image.shape.embed or 0)
    return replace(image, tensors=dict(tensors), shape=shape)


def with_unit_projection(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, float32 of any shape, with a projection that gives a length around 1."""
    weight = tensors["embed.weight"]
    return {**tensors, "embed.weight": (weight.double() / _expected_length(tensors)).float()}


def _expected_length(tensors: Mapping[str, Tensor]) -> float:
    """The root mean square length of embed's result, for a normalised input of LayerNorm ``norm``.

    ||W (g * n + b)||^2 is ||W diag(g)||^2 + ||W b||^2 on average, for n of independent entries with
    mean 0 and variance 1.
    """
    weight, gain, shift = (
        tensors[n].double() for n in ("embed.weight", "norm.weight", "norm.bias")
    )
    return float(((weight * gain).square().sum() + (weight @ shift).square().sum()).sqrt())
