"""The names that repositories of the Hugging Face hub and their cache use."""

from __future__ import annotations

__all__ = ["HUB_PREFIX", "OPEN_CLIP_CONFIG", "OPEN_CLIP_NAMES", "hub_folder"]

HUB_PREFIX = "hf://"
# open_clip's names of weights and of their configuration (open_clip constants.py, 3.3).
OPEN_CLIP_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"


def hub_folder(repository: str) -> str:
    """The folder of ``OWNER/NAME`` in a cache of huggingface_hub."""
    return f"models--{repository.replace('/', '--')}"
