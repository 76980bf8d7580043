"""The layouts that are read, one module for each."""

from clipdeploy.models.checkpoints.layouts.hf_clip import HF_CLIP
from clipdeploy.models.checkpoints.layouts.hf_vit import HF_VIT
from clipdeploy.models.checkpoints.layouts.layout import Layout
from clipdeploy.models.checkpoints.layouts.mmpretrain import MMPRETRAIN
from clipdeploy.models.checkpoints.layouts.mmpretrain_clip import MMPRETRAIN_CLIP
from clipdeploy.models.checkpoints.layouts.openai import OPENAI
from clipdeploy.models.checkpoints.layouts.timm import TIMM
from clipdeploy.models.checkpoints.layouts.zero_shot import ZERO_SHOT

__all__ = ["LAYOUTS", "Layout"]

LAYOUTS = (TIMM, MMPRETRAIN, HF_VIT, HF_CLIP, OPENAI, MMPRETRAIN_CLIP, ZERO_SHOT)
