"""The image tower of OpenAI's CLIP and of open_clip, with a linear head beside it.

``proj`` maps the class token to CLIP's embedding; a head behind it is joined with it.
"""

import re

from clipdeploy.models.checkpoints.layouts.layout import Layout, rules

__all__ = ["BESIDE_TOWER", "OPENAI", "RESBLOCKS"]

_BLOCK = r"transformer\.resblocks\.(\d+)\."
_ENDS = r"(weight|bias)"
# Of both towers.
RESBLOCKS = (
    (_BLOCK + r"ln_([12])\." + _ENDS, r"blocks.\1.norm\2.\3"),
    (_BLOCK + r"attn\.in_proj_" + _ENDS, r"blocks.\1.attn.qkv.\2"),
    (_BLOCK + r"attn\.out_proj\." + _ENDS, r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
    (_BLOCK + r"mlp\.c_fc\." + _ENDS, r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.c_proj\." + _ENDS, r"blocks.\1.mlp.fc2.\2"),
)

# The text tower and CLIP's other tensors.
BESIDE_TOWER = re.compile(
    r"(.*\.)?(transformer\.resblocks\..*|token_embedding\.weight|positional_embedding"
    r"|ln_final\.(weight|bias)|text_projection(\.weight)?|text\..*|logit_scale|logit_bias"
    r"|attn_mask|input_resolution|context_length|vocab_size)"
)

OPENAI = Layout(
    name="open_clip",
    anchor="conv1.weight",
    also=("class_embedding", "positional_embedding", "ln_pre.weight"),
    rules=rules(
        (r"class_embedding", "cls_token"),
        (r"positional_embedding", "pos_embed"),
        (r"conv1\." + _ENDS, r"patch_embed.proj.\1"),
        (r"ln_pre\." + _ENDS, r"norm_pre.\1"),
        (r"ln_post\." + _ENDS, r"norm.\1"),
        (r"proj", "proj"),
        *RESBLOCKS,
    ),
    outside=BESIDE_TOWER,
    # QuickGELU in OpenAI's models and open_clip's "-quickgelu" ones, GELU in the others.
    gelu=None,
    eps=(1e-5, 1e-5),
)
