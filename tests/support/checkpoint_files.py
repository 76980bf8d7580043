"""Writes weights in the formats of their publishers: mmpretrain and timm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_RULES = (
    (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (r"^norm_pre\.", "backbone.pre_norm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"backbone.layers.\1.ln\2."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"backbone.layers.\1.ffn.layers.0.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"backbone.layers.\1.ffn.layers.1."),
    (r"^blocks\.(\d+)\.attn\.", r"backbone.layers.\1.attn."),
    (r"^norm\.", "backbone.ln1."),
    (r"^head\.", "head.layers.head."),
    (r"^(cls_token|pos_embed)$", r"backbone.\1"),
)


def mmpretrain_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's names to mmpretrain's."""
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in _RULES:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[name] = value
    return renamed


def write_legacy_flat(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Write mmpretrain's keys, flat, in the old pickle format (files of December 2022)."""
    torch.save(mmpretrain_keys(tensors), path, _use_new_zipfile_serialization=False)
    return path


def write_nested_zip(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Write mmpretrain's keys under ``state_dict``, with ``meta``, as a zip (current script)."""
    torch.save({"state_dict": mmpretrain_keys(tensors), "meta": {"epoch": 50}}, path)
    return path
