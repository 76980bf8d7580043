r"""Brings the tensors of every layout into one form, with timm's names.

    qkv = [q; k; v]                            a missing qkv or head bias is zero
    gamma * (W x + b) = (gamma W) x + gamma b  LayerScale, into attn.proj and mlp.fc2
    conv(x) + b + pos = conv(x) + (pos + b)    bias of the patch convolution, into the patches' rows
    head (proj^T x) = (head proj^T) x          CLIP's projection, into the head
    pos_embed of G * G rows                    with a row of zeros for the class token in front
                                               (timm's no_embed_class)

Only the last bits of the logits differ.  Sources: timm 1.0 and mmpretrain 1.2
``vision_transformer.py``, open_clip ``transformer.py``.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

__all__ = ["canonical", "is_square"]

StateDict = dict[str, Tensor]

_PART = re.compile(r"(blocks\.\d+\.attn\.)q\.(weight|bias)")
_SCALED = (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2"))


def canonical(tensors: StateDict) -> StateDict:
    """The tensors in canonical form, float32; tensors of unexpected shapes are left as they are."""
    made = {name: value.float() for name, value in tensors.items()}
    _shape_embeddings(made)
    _join_qkv(made)
    _fill_biases(made)
    _fold_layer_scale(made)
    _fold_patch_bias(made)
    _fold_projection(made)
    return made


def is_square(count: int) -> bool:
    """Whether ``count`` patches form a square grid."""
    return count > 0 and math.isqrt(count) ** 2 == count


def _shape_embeddings(made: StateDict) -> None:
    if "cls_token" in made and made["cls_token"].ndim == 1:
        made["cls_token"] = made["cls_token"][None, None]
    if "pos_embed" in made and made["pos_embed"].ndim == 2:
        made["pos_embed"] = made["pos_embed"][None]
    position = made.get("pos_embed")
    if position is not None and position.ndim == 3 and "cls_token" in made:
        rows = position.shape[1]
        if is_square(rows) and rows > 1:
            zeros = torch.zeros_like(position[:, :1])
            made["pos_embed"] = torch.cat([zeros, position], dim=1)


def _join_qkv(made: StateDict) -> None:
    for name in [name for name in made if _PART.fullmatch(name)]:
        stem, end = _PART.fullmatch(name).groups()  # type: ignore[union-attr]
        names = [f"{stem}{part}.{end}" for part in "qkv"]
        parts = [made[each] for each in names if each in made]
        if len(parts) == 3 and len({part.shape for part in parts}) == 1:
            made[f"{stem}qkv.{end}"] = torch.cat(parts)
            for each in names:
                del made[each]


def _fill_biases(made: StateDict) -> None:
    for name in [name for name in made if name.endswith(("attn.qkv.weight", "head.weight"))]:
        bias = name.removesuffix("weight") + "bias"
        made.setdefault(bias, torch.zeros(made[name].shape[:1]))


def _fold_layer_scale(made: StateDict) -> None:
    for scale, linear in _SCALED:
        for name in [name for name in made if name.endswith(scale)]:
            stem = name.removesuffix(scale) + linear
            weight, bias, gamma = made.get(f"{stem}.weight"), made.get(f"{stem}.bias"), made[name]
            if weight is None or bias is None or gamma.shape != bias.shape:
                continue
            if weight.shape[:1] == bias.shape:
                made[f"{stem}.weight"], made[f"{stem}.bias"] = weight * gamma[:, None], bias * gamma
                del made[name]


def _fold_patch_bias(made: StateDict) -> None:
    bias, position = made.get("patch_embed.proj.bias"), made.get("pos_embed")
    if bias is None or position is None or position.shape[2:] != bias.shape:
        return
    folded = position.clone()
    folded[:, 1:] += bias
    made["pos_embed"] = folded
    del made["patch_embed.proj.bias"]


def _fold_projection(made: StateDict) -> None:
    projection, head = made.get("proj"), made.get("head.weight")
    if projection is None or head is None or projection.ndim != 2 or head.ndim != 2:
        return
    if head.shape[1] == projection.shape[1]:
        # In float64, so that one rounding remains.
        made["head.weight"] = (head.double() @ projection.double().T).float()
        del made["proj"]
