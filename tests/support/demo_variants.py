"""Variants of the demo's weights and digits on which a mistake in the preprocessing tells.

The digits are grey and small: red and blue are the same, and other means or filters move an image
or two of 500.  Each variant answers as the demo model does, but only if it is fed rightly.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from clipdeploy.imaging import open_images, select
from clipdeploy.models import cards

__all__ = [
    "coloured",
    "dithered",
    "framed",
    "weights_for_colours",
    "weights_for_small_eps",
    "write_digits",
]

Pixels = NDArray[np.uint8]


def write_digits(folder: Path, change: Callable[[Pixels], Pixels], count: int) -> Path:
    """``count`` of the demo's test digits in class folders, ``change`` being their (8, 8) pixels.

    ``change`` gives (H, W) or (H, W, 3).
    """
    chosen = select(open_images(cards.demo_file("test.zip"), tuple("0123456789")), count, seed=0)
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        for entry in chosen.entries:
            grey = np.asarray(Image.open(io.BytesIO(archive.read(entry.name))).convert("L"))
            path = folder / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(change(grey)).save(path)
    return folder


def coloured(grey: Pixels) -> Pixels:
    """The digit in red and green, its negative in blue."""
    return np.stack([grey, grey, 255 - grey], axis=-1)


def framed(grey: Pixels) -> Pixels:
    """The digit in the middle of a picture of twice its edge."""
    return np.pad(grey, 4)


def dithered(grey: Pixels) -> Pixels:
    """The digit in black and white dots of 320 x 320: an antialiased resize sees the grey again."""
    large = np.asarray(Image.fromarray(grey).resize((320, 320), Image.Resampling.BICUBIC))
    thresholds = np.random.default_rng(0).integers(1, 256, large.shape)
    return np.where(large >= thresholds, 255, 0).astype(np.uint8)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def weights_for_colours(
    path: Path, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Path:
    """Weights that read red, and compare red with green, under this mean and std.

    With p the grey level, x_c = (p - mean_c) / std_c, and any A

        sum_c W_c x_c = S std_0 x_0 + A (std_0 x_0 - std_1 x_1) + const,   S = sum_c W_c / std_c

    in which A is multiplied with a constant if mean and std are these, and with p otherwise.
    W and the constant are the demo's under CLIP's mean and std.
    """
    from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD

    tensors = load_file(cards.demo_file("weights.safetensors"))
    trained = tensors["patch_embed.proj.weight"].double()
    his_mean, his_std = (
        torch.tensor(each).double()[None, :, None, None] for each in (CLIP_MEAN, CLIP_STD)
    )
    levels = (trained / his_std).sum(1)
    other = 100 * torch.randn(
        levels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    weight = torch.stack(
        [(levels + other) * std[0], -other * std[1], torch.zeros_like(levels)], dim=1
    )
    constant = (levels * mean[0]).sum((1, 2)) - (trained * his_mean / his_std).sum((1, 2, 3))
    constant -= (other * (mean[1] - mean[0])).sum((1, 2))
    tensors["patch_embed.proj.weight"] = weight.float()
    tensors["pos_embed"][:, 1:] += constant.float()
    return _save(tensors, path)


def weights_for_small_eps(path: Path) -> Path:
    """Weights with so small a residual stream that they need LayerNorm's eps of 1e-6.

    LN(s x; eps) = LN(x; eps / s^2): with s^2 = 1e-6 / 0.3 the demo's norms have an eps of 0.3, at
    which it is as accurate as ever, and for 1e-5 one of 3, at which it guesses.
    """
    tensors = load_file(cards.demo_file("weights.safetensors"))
    scale = (1e-6 / 0.3) ** 0.5
    for name in tensors:
        if name.startswith("norm_pre") or ".attn.proj." in name or ".mlp.fc2." in name:
            tensors[name] = tensors[name] * scale
    return _save(tensors, path)
