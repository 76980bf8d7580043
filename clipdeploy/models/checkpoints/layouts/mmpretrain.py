"""mmpretrain 1.2 and mmcls: ``VisionTransformer`` with a linear or a ViT head.

``ln2`` of the backbone normalises the mean of the patch tokens (``out_type="avg_featmap"``).
"""

import re

from clipdeploy.models.checkpoints.layouts.layout import Layout, rules

__all__ = ["MMPRETRAIN"]

_LAYER = r"backbone\.layers\.(\d+)\."

MMPRETRAIN = Layout(
    name="mmpretrain",
    anchor="backbone.patch_embed.projection.weight",
    also=("backbone.layers.0.attn.qkv.weight",),
    rules=rules(
        (r"backbone\.(cls_token|pos_embed)", r"\1"),
        (r"backbone\.patch_embed\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
        (r"backbone\.pre_norm\.(weight|bias)", r"norm_pre.\1"),
        (r"backbone\.ln1\.(weight|bias)", r"norm.\1"),
        (r"backbone\.ln2\.(weight|bias)", r"fc_norm.\1"),
        (_LAYER + r"ln([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
        (_LAYER + r"attn\.(qkv|proj)\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
        (_LAYER + r"attn\.gamma1\.(?:weight|scale)", r"blocks.\1.ls1.gamma"),
        (_LAYER + r"ffn\.layers\.0\.0\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
        (_LAYER + r"ffn\.layers\.1\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
        (_LAYER + r"ffn\.gamma2\.(?:weight|scale)", r"blocks.\1.ls2.gamma"),
        (r"head\.(?:layers\.head|fc)\.(weight|bias)", r"head.\1"),
        (r"data_preprocessor\.(mean|std)", ""),
    ),
    outside=re.compile(r"ema_(backbone|head|neck)_\w+"),
)
