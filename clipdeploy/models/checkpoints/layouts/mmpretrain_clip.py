"""mmpretrain's ``CLIPZeroShot``: its own image tower, and the text tower of OpenAI's CLIP.

Names: ``mmpretrain/models/multimodal/clip/clip.py`` and
``tools/model_converters/openai-clip_to_mmpretrain-clip.py`` of mmpretrain 1.2.
"""

from clipdeploy.models.checkpoints.layouts.layout import Layout, rules
from clipdeploy.models.checkpoints.layouts.mmpretrain import vit_rules
from clipdeploy.models.checkpoints.layouts.openai import BESIDE_TOWER

__all__ = ["MMPRETRAIN_CLIP"]

MMPRETRAIN_CLIP = Layout(
    name="mmpretrain CLIP",
    anchor="visual.patch_embed.projection.weight",
    also=("visual.layers.0.attn.qkv.weight",),
    rules=rules(*vit_rules("visual"), (r"visual_proj\.proj", "proj")),
    outside=BESIDE_TOWER,
    # Of both towers, in all of its configurations.
    gelu="quick",
    # OpenAI's weights were trained with 1e-5; mmpretrain's image tower computes with 1e-6.
    eps=(1e-5, 1e-5),
)
