"""``CLIPForImageClassification`` of transformers: the head reads the mean of the patch tokens.

These tokens are not normalised: ``post_layernorm`` is in the file, but only the class token, which
this head does not read, goes through it.
"""

import re

from clipdeploy.models.checkpoints.layouts.layout import Layout, rules

__all__ = ["HF_CLIP", "encoder_layers"]

_ENDS = r"(weight|bias)"


def encoder_layers(tower: str) -> tuple[tuple[str, str], ...]:
    """The rules for the blocks of a tower: ``vision_model`` or ``text_model``."""
    layer = tower + r"\.encoder\.layers\.(\d+)\."
    return (
        (layer + r"layer_norm([12])\." + _ENDS, r"blocks.\1.norm\2.\3"),
        (layer + r"self_attn\.([qkv])_proj\." + _ENDS, r"blocks.\1.attn.\2.\3"),
        (layer + r"self_attn\.out_proj\." + _ENDS, r"blocks.\1.attn.proj.\2"),
        (layer + r"mlp\.(fc[12])\." + _ENDS, r"blocks.\1.mlp.\2.\3"),
    )


HF_CLIP = Layout(
    name="transformers CLIP",
    anchor="vision_model.embeddings.patch_embedding.weight",
    also=("vision_model.embeddings.class_embedding",),
    rules=rules(
        (r"vision_model\.embeddings\.class_embedding", "cls_token"),
        (r"vision_model\.embeddings\.position_embedding\.weight", "pos_embed"),
        (r"vision_model\.embeddings\.position_ids", ""),
        (r"vision_model\.embeddings\.patch_embedding\." + _ENDS, r"patch_embed.proj.\1"),
        (r"vision_model\.pre_layrnorm\." + _ENDS, r"norm_pre.\1"),
        (r"vision_model\.post_layernorm\." + _ENDS, r"norm.\1"),
        (r"classifier\." + _ENDS, r"head.\1"),
        *encoder_layers("vision_model"),
    ),
    outside=re.compile(r"(.*\.)?(text_model\..*|(text|visual)_projection\.weight|logit_scale)"),
    # CLIPVisionConfig.hidden_act is quick_gelu for OpenAI's weights and gelu for LAION's.
    gelu=None,
    pooling="avg",
    eps=(1e-5, 1e-5),
    final_norm=False,
)
