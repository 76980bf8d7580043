"""mmpretrain 1.2 and mmcls: ``VisionTransformer`` with a linear or a ViT head.

``ln2`` of the backbone normalises the mean of the patch tokens (``out_type="avg_featmap"``).
"""

import re

from clipdeploy.models.checkpoints.layouts.layout import Layout, rules

__all__ = ["MMPRETRAIN", "vit_rules"]

_ENDS = r"(weight|bias)"
_PREPROCESSOR = (r"data_preprocessor\.(mean|std)", "")


def vit_rules(tower: str) -> tuple[tuple[str, str], ...]:
    """The rules for mmpretrain's ``VisionTransformer`` called ``tower``, and the preprocessor's."""
    inside = tower + r"\."
    layer = inside + r"layers\.(\d+)\."
    return (
        (inside + r"(cls_token|pos_embed)", r"\1"),
        (inside + r"patch_embed\.projection\." + _ENDS, r"patch_embed.proj.\1"),
        (inside + r"pre_norm\." + _ENDS, r"norm_pre.\1"),
        (inside + r"ln1\." + _ENDS, r"norm.\1"),
        (inside + r"ln2\." + _ENDS, r"fc_norm.\1"),
        (layer + r"ln([12])\." + _ENDS, r"blocks.\1.norm\2.\3"),
        (layer + r"attn\.(qkv|proj)\." + _ENDS, r"blocks.\1.attn.\2.\3"),
        (layer + r"attn\.gamma1\.(?:weight|scale)", r"blocks.\1.ls1.gamma"),
        (layer + r"ffn\.layers\.0\.0\." + _ENDS, r"blocks.\1.mlp.fc1.\2"),
        (layer + r"ffn\.layers\.1\." + _ENDS, r"blocks.\1.mlp.fc2.\2"),
        (layer + r"ffn\.gamma2\.(?:weight|scale)", r"blocks.\1.ls2.gamma"),
        _PREPROCESSOR,
    )


MMPRETRAIN = Layout(
    name="mmpretrain",
    anchor="backbone.patch_embed.projection.weight",
    also=("backbone.layers.0.attn.qkv.weight",),
    rules=rules(*vit_rules("backbone"), (r"head\.(?:layers\.head|fc)\." + _ENDS, r"head.\1")),
    outside=re.compile(r"ema_(backbone|head|neck)_\w+"),
)
