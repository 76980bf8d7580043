"""Loads ``scripts/make_outlier_variants.py`` as a module."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from script_module import load_script

from clipdeploy.models import cards


def channel_outliers(target: Path, seed: int) -> None:
    """Return the demo's weights with the channel outliers of real CLIP ViTs; equivalent."""
    tensors = load_file(cards.demo_file("weights.safetensors"))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(load_script("make_outlier_variants").add_channel_outliers(tensors, seed), target)
