"""Variants of the demo's weights and digits that are sensitive to preprocessing mistakes.

The digits are grey and small: red and blue are equal, and another mean or filter changes one or two
of 500 answers.  Each variant is as accurate as the demo model, but only if its preprocessing is
correct.
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
    """Write ``count`` of the demo's test digits to class folders, changed by ``change``.

    ``change`` maps the (8, 8) pixels to (H, W) or (H, W, 3).
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
    """Return the digit in red and green, its negative in blue."""
    return np.stack([grey, grey, 255 - grey], axis=-1)


def framed(grey: Pixels) -> Pixels:
    """Return the digit in the middle of an image of twice the size."""
    return np.pad(grey, 4)


def dithered(grey: Pixels) -> Pixels:
    """Return the digit dithered to 320 x 320; an antialiased resize recovers the grey levels."""
    large = np.asarray(Image.fromarray(grey).resize((320, 320), Image.Resampling.BICUBIC))
    thresholds = np.random.default_rng(0).integers(1, 256, large.shape)
    return np.where(large >= thresholds, 255, 0).astype(np.uint8)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def weights_for_colours(
    path: Path, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Path:
    """Return weights that use red, and the difference of red and green, with this mean and std.

    With p the grey level, x_c = (p - mean_c) / std_c, and any A

        sum_c W_c x_c = S std_0 x_0 + A (std_0 x_0 - std_1 x_1) + const,   S = sum_c W_c / std_c

    where the factor of A is constant if mean and std are the given ones, and depends on p
    otherwise.  W and the constant are the demo's with CLIP's mean and std.
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
    """Return weights with a small residual stream, which require LayerNorm's eps of 1e-6.

    LN(s x; eps) = LN(x; eps / s^2): with s^2 = 1e-6 / 0.3 an eps of 1e-6 acts like 0.3 in the
    demo, which keeps its accuracy, and 1e-5 like 3, which reduces it to chance.
    """
    tensors = load_file(cards.demo_file("weights.safetensors"))
    scale = (1e-6 / 0.3) ** 0.5
    for name in tensors:
        if name.startswith("norm_pre") or ".attn.proj." in name or ".mlp.fc2." in name:
            tensors[name] = tensors[name] * scale
    return _save(tensors, path)
