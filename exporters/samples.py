"""A few images in every form that a graph may take them in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import Preprocess, TensorSpec
from exporters.errors import GraphError
from exporters.preprocess_graph import scale_and_offset

__all__ = ["Samples", "normalise"]


def normalise(crops: NDArray[np.uint8], spec: Preprocess) -> NDArray[np.float32]:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), ``(x / 255 - mean) / std`` per channel."""
    scale, offset = scale_and_offset(spec)
    planar = np.ascontiguousarray(crops.transpose(0, 3, 1, 2)).astype(np.float32)
    planar *= scale[:, None, None]
    planar += offset[:, None, None]
    return planar


@dataclass(frozen=True)
class Samples:
    """Crops, uint8 (B, S, S, 3), and what each kind of graph input makes of them."""

    crops: NDArray[np.uint8]
    spec: Preprocess

    @cached_property
    def pixels(self) -> NDArray[np.float32]:
        """Normalised, float32 (B, 3, S, S)."""
        return normalise(self.crops, self.spec)

    def as_input(self, tensor: TensorSpec) -> NDArray[Any]:
        """What a graph with input ``tensor`` takes: uint8 crops, or float16 or float32 pixels."""
        return (
            self.crops if tensor.dtype == "uint8" else self.pixels.astype(tensor.dtype, copy=False)
        )

    def feed(self, tensor: TensorSpec) -> NDArray[Any]:
        """:meth:`as_input`, with as many images as a graph of a fixed batch takes."""
        batch = tensor.shape[0]
        return (self.of(batch) if isinstance(batch, int) else self).as_input(tensor)

    def of(self, count: int) -> Samples:
        """``count`` images: the first ones, over again where there are fewer.

        Raises:
            GraphError: there is none.
        """
        if not len(self.crops):
            raise GraphError("no image to check the graph with")
        return Samples(self.crops[np.arange(count) % len(self.crops)], self.spec)
