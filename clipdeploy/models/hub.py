"""The names that repositories of the Hugging Face hub and their cache use."""

from __future__ import annotations

from clipdeploy.core.values import is_name

__all__ = [
    "HUB_PREFIX",
    "INDEX",
    "OPEN_CLIP_CONFIG",
    "OPEN_CLIP_NAMES",
    "hub_folder",
    "hub_parts",
]

HUB_PREFIX = "hf://"
# The end of the name of an index of shards.
INDEX = ".index.json"
# open_clip's names of weights and of their configuration (open_clip constants.py, 3.3).
OPEN_CLIP_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"


def hub_folder(repository: str) -> str:
    """The folder of ``OWNER/NAME`` in a cache of huggingface_hub."""
    return f"models--{repository.replace('/', '--')}"


def hub_parts(reference: str) -> tuple[str, str]:
    """The repository and the index that ``hf://OWNER/NAME[/FILE.index.json]`` names.

    The index is empty if none is named.

    Raises:
        ValueError: it names something else.
    """
    parts = reference.removeprefix(HUB_PREFIX).split("/")
    index = parts[2] if len(parts) == 3 else ""
    known = len(parts) == 2 or index.endswith(INDEX)
    if not (known and all(map(is_name, parts))):
        raise ValueError(f"{reference!r} is not hf://OWNER/NAME, nor an index of shards in it")
    return "/".join(parts[:2]), index
