"""A tiny ViT, its images, its passport and its exported graph, for the exporters' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shared_traces import shared_traces

from clipdeploy.core.passport import (
    CLIP_MEAN,
    CLIP_STD,
    Passport,
    Preprocess,
    Recipe,
    TensorSpec,
    WeightsOrigin,
)
from clipdeploy.models.load import random_tensors
from clipdeploy.models.vit import VisionTransformer, ViTConfig
from exporters.onnx import export_graph
from exporters.samples import Samples


def _make_vit(heads: int = 2, seed: int = 0, small_residual: bool = False) -> VisionTransformer:
    config = ViTConfig(patch=4, image_size=16, classes=5, width=32, depth=2, heads=heads)
    tensors = random_tensors(config, seed)
    position = tensors.pop("pos_embed").clone()
    position[:, :1] += tensors.pop("cls_token")
    patch = tensors.pop("patch_embed.proj.weight")
    if small_residual:
        # A residual stream whose variance is near LayerNorm's eps: there eps decides the logits.
        position, patch = position * 0.01, patch * 0.01
    module = VisionTransformer(config)
    module.load_state_dict({"position": position, "patch_embed.weight": patch, **tensors})
    return module.eval().requires_grad_(False)


def _make_passport(module: VisionTransformer) -> Passport:
    size, classes = module.config.image_size, module.config.classes
    return Passport(
        kind="graph",
        model="tiny",
        precision="fp32",
        weights=WeightsOrigin("random", seed=0),
        recipe=Recipe(),
        preprocess=Preprocess(size, CLIP_MEAN, CLIP_STD),
        input=TensorSpec("image", "float32", ("batch", 3, size, size)),
        output=TensorSpec("logits", "float32", ("batch", classes)),
        classes=classes,
    )


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., VisionTransformer]:
    """``make_vit(heads=2, seed=0, small_residual=False)``: width 32, depth 2, 16 px, 5 classes."""
    return _make_vit


@pytest.fixture(scope="session")
def make_passport() -> Callable[[VisionTransformer], Passport]:
    """The FP32 passport of a module."""
    return _make_passport


@pytest.fixture(scope="session")
def tiny_samples() -> Samples:
    """Seven images of noise, 16 px."""
    crops = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    return Samples(crops, Preprocess(16, CLIP_MEAN, CLIP_STD))


@pytest.fixture(scope="session")
def tiny_images(tiny_samples: Samples) -> NDArray[np.float32]:
    """The same normalised, float32 (7, 3, 16, 16)."""
    return tiny_samples.pixels


@pytest.fixture(scope="session")
def tiny_logits(tiny_images: NDArray[np.float32]) -> dict[int, NDArray[np.float32]]:
    """PyTorch's logits of the tiny model at batches 1, 2 and 7."""
    module = _make_vit()
    return {n: module(torch.from_numpy(tiny_images[:n])).numpy() for n in (1, 2, 7)}


@pytest.fixture
def traced_once() -> Iterator[None]:
    """Exports share the trace of an architecture, for tests of what comes behind it."""
    with shared_traces():
        yield


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory, tiny_samples: Samples) -> Path:
    """The tiny model's FP32 graph.  Read only."""
    module = _make_vit()
    path = tmp_path_factory.mktemp("tiny") / "tiny.fp32.onnx"
    export_graph(module, path, _make_passport(module), tiny_samples)
    return path
