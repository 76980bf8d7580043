"""Says why a file is no ViT classifier that can be read: its architecture, or what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.printable import printable
from clipdeploy.models.checkpoints.layouts import LAYOUTS, Layout

__all__ = ["adapter_error", "foreign_error", "listed", "unknown_error"]

_LISTED = 6
_NO_VIT = "only plain ViT classifiers are read: no option changes that"
# What a tensor's name says of the architecture; the first that fits.
_ARCHITECTURES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(gamma_1|rel_pos_bias\.)|relative_position_bias\.rel", "BEiT"),
    (r"attn\.(logit_scale|cpb_mlp|w_msa\.cpb_mlp)", "Swin Transformer V2"),
    (r"relative_position_bias_table", "Swin Transformer"),
    (
        r"attn\.(inner_attn_ln|q_bias)|(^|\.)rope\.|mlp\.(ffn_ln|w12|fc1_[gx])",
        "EVA",
    ),
    (r"(^|\.)(visual\.)?(attn_pool|head\.probe|head\.attention)\.?", "SigLIP (attention pooling)"),
    (r"(dist_token|distillation_token|head_dist\.|distillation_classifier\.)", "DeiT (distilled)"),
    (r"(reg_token|register_tokens|dinov2\.)", "DINOv2"),
    (r"attn\.(q_norm|k_norm|norm)\.weight", "a ViT with normalised queries and keys"),
    (r"attnpool\.", "CLIP's ResNet"),
    (r"(^|\.)layer1\.0\.(conv1|bn1)\.", "ResNet"),
    (r"(conv_dw|depthwise_conv|dwconv)\.", "ConvNeXt"),
    (r"encoder_layer_0\.self_attention", "torchvision's ViT"),
    (r"(^|\.)(blocks|layers)\.0\.(0\.)?(conv|bn)\w*\.", "a convolutional network"),
)
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|hada_\w+|loha_\w+|oft_\w+|ia3_\w+|adapter_\w+)(\.|$)")
_HEAD = re.compile(r"(^|\.)(head|heads|fc|classifier|linear|probe)\b")
_MERGE = (
    "merge them first: model.merge_and_unload() of peft, then save the state dict of the result"
)


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    found = [printable(name) for name in names]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def adapter_error(path: Path, names: Iterable[str]) -> CheckpointError | None:
    """The error for a file with LoRA weights or another adapter; None if it has none."""
    found = [name for name in names if _ADAPTER.search(name)]
    if not found:
        return None
    return CheckpointError(
        f"{path} contains LoRA or other adapter weights, not merged ones: {listed(found)}",
        hint=_MERGE,
    )


def foreign_error(path: Path, names: Iterable[str]) -> CheckpointError | None:
    """The error for an architecture other than the plain ViT; None if the names fit a ViT."""
    known = list(names)
    for pattern, what in _ARCHITECTURES:
        found = [name for name in known if re.search(pattern, name)]
        if found:
            return CheckpointError(
                f"{path} is a checkpoint of {what}, which is not supported: {listed(found[:1])}",
                hint=_NO_VIT,
            )
    return None


def unknown_error(path: Path, names: Iterable[str]) -> CheckpointError:
    """The error for a state dict in whose names no layout's model was found."""
    tensors = list(names)
    named = adapter_error(path, tensors) or foreign_error(path, tensors)
    if named is not None:
        return named
    if all(_HEAD.search(name) for name in tensors):
        return CheckpointError(
            f"{path} contains only a head, without the ViT below it: {listed(tensors)}",
            hint="load it into the whole model in Python and save that model's state dict",
        )
    layout, unfitting = _closest(tensors)
    if len(unfitting) == len(tensors):
        libraries = ", ".join(each.name for each in LAYOUTS)
        return CheckpointError(
            f"{path} has none of the layouts of {libraries}: {listed(tensors)}",
            hint="pass the state dict of a ViT classifier in one of these layouts",
        )
    missing = layout.anchor
    outside = f"these keys do not fit: {listed(unfitting)}" if unfitting else "all keys fit"
    return CheckpointError(
        f"{path} is closest to the layout of {layout.name}, but has no {missing}; {outside}",
        hint="rename the keys, or save the whole classifier's state dict with its library",
    )


def _closest(tensors: list[str]) -> tuple[Layout, list[str]]:
    """The layout that fits most names, whatever their prefix, and the names that do not fit."""
    misfits = [(layout, [n for n in tensors if not _fits(layout, n)]) for layout in LAYOUTS]
    return min(misfits, key=lambda each: len(each[1]))


def _fits(layout: Layout, name: str) -> bool:
    parts = name.split(".")
    return any(layout.rename(".".join(parts[start:])) is not None for start in range(len(parts)))
