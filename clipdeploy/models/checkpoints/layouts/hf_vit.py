"""``ViTForImageClassification`` of transformers 4 and 5.

Files of ``save_pretrained`` have the names of version 4; state dicts of version 5 have others.
"""

from clipdeploy.models.checkpoints.layouts.layout import Layout, rules

__all__ = ["HF_VIT"]

_OLD, _NEW = r"vit\.encoder\.layer\.(\d+)\.", r"vit\.layers\.(\d+)\."
_ENDS = r"(weight|bias)"
# First letters of query, key and value.
_QKV = r"([qkv])"

HF_VIT = Layout(
    name="transformers ViT",
    anchor="vit.embeddings.patch_embeddings.projection.weight",
    also=("vit.embeddings.position_embeddings",),
    rules=rules(
        (r"vit\.embeddings\.cls_token", "cls_token"),
        (r"vit\.embeddings\.position_embeddings", "pos_embed"),
        (r"vit\.embeddings\.patch_embeddings\.projection\." + _ENDS, r"patch_embed.proj.\1"),
        (r"vit\.layernorm\." + _ENDS, r"norm.\1"),
        (r"classifier\." + _ENDS, r"head.\1"),
        (_OLD + r"layernorm_before\." + _ENDS, r"blocks.\1.norm1.\2"),
        (_NEW + r"layernorm_before\." + _ENDS, r"blocks.\1.norm1.\2"),
        (_OLD + r"layernorm_after\." + _ENDS, r"blocks.\1.norm2.\2"),
        (_NEW + r"layernorm_after\." + _ENDS, r"blocks.\1.norm2.\2"),
        (
            _OLD + r"attention\.attention\." + _QKV + r"(?:uery|ey|alue)\." + _ENDS,
            r"blocks.\1.attn.\2.\3",
        ),
        (_NEW + r"attention\." + _QKV + r"_proj\." + _ENDS, r"blocks.\1.attn.\2.\3"),
        (_OLD + r"attention\.output\.dense\." + _ENDS, r"blocks.\1.attn.proj.\2"),
        (_NEW + r"attention\.o_proj\." + _ENDS, r"blocks.\1.attn.proj.\2"),
        (_OLD + r"intermediate\.dense\." + _ENDS, r"blocks.\1.mlp.fc1.\2"),
        (_OLD + r"output\.dense\." + _ENDS, r"blocks.\1.mlp.fc2.\2"),
        (_NEW + r"mlp\.fc([12])\." + _ENDS, r"blocks.\1.mlp.fc\2.\3"),
    ),
    # ViTConfig.layer_norm_eps.
    eps=(1e-12, 1e-12),
)
