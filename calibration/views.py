"""Makes other views of calibration images, which the statistics of the images do not include.

Statistics contain the extremes of their own images, so that nothing is clipped there.  Other images
exceed them, most of all those that were enlarged from a lower resolution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["coarse_views", "mirrored", "other_views"]

# How much larger than an image its other view shows things.
_MAGNIFIED = 1.2
# A picture of 32 pixels enlarged to 224; and the fewest pixels of a picture that shows something.
_COARSER, _LEAST_EDGE = 7, 16


def mirrored(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mirrored views of uint8 (N, S, S, 3)."""
    return np.ascontiguousarray(crops[:, :, ::-1])


def other_views(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mirrored and magnified views of uint8 (N, S, S, 3), by the nearest pixels; same shape."""
    middle = (crops.shape[1] - 1) / 2
    at = np.rint((np.arange(crops.shape[1]) - middle) / _MAGNIFIED + middle).astype(np.int64)
    return np.ascontiguousarray(crops[:, at][:, :, at[::-1]])


def coarse_views(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Views of uint8 (N, S, S, 3) as if enlarged from a seventh of the resolution; same shape."""
    edge = crops.shape[1]
    small = max(edge // _COARSER, _LEAST_EDGE)
    return np.stack([_enlarged(crop, small, edge) for crop in crops])


def _enlarged(crop: NDArray[np.uint8], small: int, edge: int) -> NDArray[np.uint8]:
    reduced = Image.fromarray(crop).resize((small, small), Image.Resampling.BOX)
    return np.asarray(reduced.resize((edge, edge), Image.Resampling.BICUBIC))
