"""Resamples position embeddings to another grid, as the training libraries do."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Resampling", "resize_position_grid"]

Resampling = Literal["timm", "mmpretrain"]


def resize_position_grid(
    position: Tensor, grid: int, resampling: Resampling = "mmpretrain"
) -> Tensor:
    """Resample a position embedding (1, 1 + G * G, C) to (1, 1 + grid * grid, C).

    Bicubic, ``align_corners=False``; the class token's row is unchanged.  ``timm`` antialiases
    (timm 1.0 ``layers/pos_embed.py`` ``resample_abs_pos_embed``), which matters for smaller grids;
    ``mmpretrain`` does not (mmpretrain 1.2 ``models/utils/embed.py`` ``resize_pos_embed``).
    """
    side = round((position.shape[1] - 1) ** 0.5)
    token, patches = position[:, :1], position[:, 1:]
    planes = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    antialias = resampling == "timm" and side != grid
    planes = F.interpolate(
        planes, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat([token, planes.flatten(2).transpose(1, 2)], dim=1)
