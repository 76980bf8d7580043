from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference_vit import reference_logits
from torch import Tensor

from clipdeploy.models import cards
from clipdeploy.models.load import _assemble, random_tensors
from clipdeploy.models.vit import ViTConfig

CARD = cards.find(cards.DEMO)
CONFIG = ViTConfig(CARD.patch, CARD.image_size, CARD.classes, CARD.width, CARD.depth, CARD.heads)

# float32 against float64 costs about 3e-6 on logits of spread 1.5; the smallest of the mistakes
# below costs 1e-3.
TOLERANCE = 1e-4

Tensors = dict[str, Tensor]


def images(count: int = 3) -> NDArray[np.float32]:
    generator = np.random.default_rng(5)
    return generator.standard_normal((count, 3, 32, 32), np.float32)


def logits(tensors: Tensors, pixels: NDArray[np.float32], config: ViTConfig = CONFIG) -> Tensor:
    module = _assemble(dict(tensors), config)
    with torch.inference_mode():
        return module(torch.from_numpy(pixels))


def reference(tensors: Tensors, pixels: NDArray[np.float32]) -> NDArray[np.float64]:
    return reference_logits(
        tensors, pixels, patch=CONFIG.patch, heads=CONFIG.heads, depth=CONFIG.depth
    )


def difference(tensors: Tensors, other: Tensors | None = None) -> float:
    pixels = images()
    return float(
        np.abs(logits(other or tensors, pixels).numpy() - reference(tensors, pixels)).max()
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_an_independent_float64_implementation(seed: int) -> None:
    assert difference(random_tensors(CONFIG, seed)) < TOLERANCE


def test_logits_have_a_trained_spread() -> None:
    # The tolerance above assumes logits of this spread.
    spread = float(logits(random_tensors(CONFIG, 0), images(16)).std())
    assert 0.5 < spread < 5


def _transpose_grid(tensors: Tensors) -> None:
    position = tensors["pos_embed"]
    grid = position[:, 1:].reshape(1, CONFIG.grid, CONFIG.grid, -1).transpose(1, 2)
    tensors["pos_embed"] = torch.cat([position[:, :1], grid.flatten(1, 2)], dim=1)


def _token_last(tensors: Tensors) -> None:
    tensors["pos_embed"] = tensors["pos_embed"].roll(-1, dims=1)


def _swap_q_and_v(tensors: Tensors) -> None:
    for part in ("weight", "bias"):
        q, k, v = tensors[f"blocks.0.attn.qkv.{part}"].chunk(3)
        tensors[f"blocks.0.attn.qkv.{part}"] = torch.cat([v, k, q])


@pytest.mark.parametrize("mistake", [_transpose_grid, _token_last, _swap_q_and_v])
def test_the_comparison_detects_a_wrong_order_of_tokens(mistake: Callable[[Tensors], None]) -> None:
    tensors = random_tensors(CONFIG, 0)
    wrong = dict(tensors)
    mistake(wrong)
    assert difference(tensors, wrong) > 10 * TOLERANCE


def test_the_comparison_detects_tanh_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(CONFIG, 0)
    exact = torch.nn.functional.gelu
    monkeypatch.setattr(
        "clipdeploy.models.vit.F.gelu", lambda x: exact(x, approximate="tanh"), raising=True
    )
    assert difference(tensors) > 2 * TOLERANCE


def test_the_comparison_detects_another_layernorm_epsilon() -> None:
    tensors = random_tensors(CONFIG, 0)
    # The patches of a flat image have a variance near 1e-5 before the first LayerNorm, where
    # epsilon decides; trained position embeddings are that small, the random ones are not.
    tensors["pos_embed"] = tensors["pos_embed"] * 1e-2
    tensors["cls_token"] = tensors["cls_token"] * 1e-2
    pixels = images() * np.float32(1e-2)
    expected = reference(tensors, pixels)
    right = np.abs(logits(tensors, pixels).numpy() - expected).max()
    other = ViTConfig(
        CARD.patch, CARD.image_size, CARD.classes, CARD.width, CARD.depth, CARD.heads, eps=1e-6
    )
    wrong = np.abs(logits(tensors, pixels, other).numpy() - expected).max()
    assert right < TOLERANCE
    assert wrong > 10 * TOLERANCE


def test_any_batch_size_gives_the_same_rows() -> None:
    tensors, pixels = random_tensors(CONFIG, 0), images(7)
    together = logits(tensors, pixels)
    alone = torch.cat([logits(tensors, pixels[i : i + 1]) for i in range(7)])
    # The order of a matrix product's sums depends on the batch: rounding only.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
