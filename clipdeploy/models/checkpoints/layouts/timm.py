"""timm's ``vision_transformer.py`` (1.0), whose names are the canonical ones."""

from clipdeploy.models.checkpoints.layouts.layout import Layout, rules

__all__ = ["TIMM"]

TIMM = Layout(
    name="timm",
    anchor="patch_embed.proj.weight",
    also=("blocks.0.attn.qkv.weight",),
    rules=rules(
        (r"(cls_token|pos_embed)", r"\1"),
        (r"patch_embed\.proj\.(weight|bias)", r"patch_embed.proj.\1"),
        (r"(norm_pre|norm|fc_norm|head)\.(weight|bias)", r"\1.\2"),
        (r"blocks\.(\d+)\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)", r"\g<0>"),
        (r"blocks\.(\d+)\.ls([12])\.gamma", r"\g<0>"),
    ),
    resampling="timm",
)
