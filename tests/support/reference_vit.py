"""A second, independent implementation of the classifier: textbook formulas, float64 numpy.

It reads the tensors of a checkpoint (timm's names) and shares no code with
``clipdeploy.models.vit``: the class token is concatenated, every block computes every token, and
nothing is folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

F64 = NDArray[np.float64]


def _norm(x: F64, gain: F64, bias: F64, eps: float) -> F64:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gain + bias


def _gelu(x: F64) -> F64:
    return 0.5 * x * (1 + erf(x / np.sqrt(2.0)))


def _softmax(x: F64) -> F64:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _patches(images: F64, patch: int) -> F64:
    """(B, 3, S, S) -> (B, G * G, 3 * patch * patch), patches in row-major order."""
    batch, channels, size, _ = images.shape
    rows = []
    for top in range(0, size - patch + 1, patch):
        for left in range(0, size - patch + 1, patch):
            window = images[:, :, top : top + patch, left : left + patch]
            rows.append(window.reshape(batch, channels * patch * patch))
    return np.stack(rows, axis=1)


def reference_logits(
    tensors: Mapping[str, Any],
    images: NDArray[np.floating[Any]],
    *,
    patch: int,
    heads: int,
    depth: int,
    eps: float = 1e-5,
) -> F64:
    """Return logits (B, classes) of normalised images (B, 3, S, S)."""
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}

    def linear(x: F64, name: str) -> F64:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: F64, name: str) -> F64:
        return _norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    kernel = w["patch_embed.proj.weight"].reshape(len(w["patch_embed.proj.weight"]), -1)
    x = _patches(images.astype(np.float64), patch) @ kernel.T
    token = np.broadcast_to(w["cls_token"], (len(x), 1, x.shape[-1]))
    x = norm(np.concatenate([token, x], axis=1) + w["pos_embed"], "norm_pre")
    for block in range(depth):
        at = f"blocks.{block}"
        qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv")
        batch, tokens, width = x.shape
        q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
        mixed = _softmax(q @ k.swapaxes(-1, -2) / np.sqrt(width // heads)) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(batch, tokens, width), f"{at}.attn.proj")
        x = x + linear(_gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")
