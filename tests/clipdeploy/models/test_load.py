from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write_legacy_flat, write_nested_zip
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from clipdeploy.core.errors import ArtifactError, CheckpointError
from clipdeploy.core.passport import Recipe, WeightsOrigin
from clipdeploy.models import cards
from clipdeploy.models.load import (
    LoadedModel,
    WeightsChoice,
    load_model,
    random_tensors,
    reload_model,
)

CARD = cards.find(cards.DEMO)


def demo_tensors() -> dict[str, torch.Tensor]:
    return load_file(cards.demo_file("weights.safetensors"))


def run(model: LoadedModel, images: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model.module(torch.from_numpy(images)).numpy()
    return logits


def test_both_wrappings_give_the_same_logits(
    demo_images: NDArray[np.float32], demo_model: LoadedModel, tmp_path: Path
) -> None:
    tensors = demo_tensors()
    for path in (
        write_legacy_flat(tensors, tmp_path / "legacy.pth"),
        write_nested_zip(tensors, tmp_path / "nested.pth"),
    ):
        model = load_model(CARD, WeightsChoice(path), Recipe())
        np.testing.assert_array_equal(run(model, demo_images), run(demo_model, demo_images))
        assert model.weights.kind == "file"


def test_random_weights_depend_only_on_the_seed() -> None:
    config = load_model(CARD, WeightsChoice(random_seed=3), Recipe()).module.config
    first, again, other = (random_tensors(config, seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_random_weights_are_stamped() -> None:
    weights = load_model(CARD, WeightsChoice(random_seed=3), Recipe()).weights
    assert weights == WeightsOrigin("random", seed=3)
    assert weights.identity == "random:3"


def test_as_shipped_changes_the_logits(
    demo_images: NDArray[np.float32], demo_model: LoadedModel
) -> None:
    shipped = load_model(CARD, WeightsChoice(), Recipe("as-shipped"))
    assert shipped.module.config.eps == 1e-6
    assert not np.array_equal(run(shipped, demo_images), run(demo_model, demo_images))


def test_another_number_of_classes_loads(tmp_path: Path) -> None:
    tensors = demo_tensors()
    tensors["head.weight"], tensors["head.bias"] = torch.zeros(37, 96), torch.zeros(37)
    save_file(tensors, tmp_path / "pets.safetensors")
    model = load_model(CARD, WeightsChoice(tmp_path / "pets.safetensors"), Recipe())
    assert model.module.config.classes == 37


def test_another_position_grid_needs_the_option(
    demo_images: NDArray[np.float32], tmp_path: Path
) -> None:
    tensors = demo_tensors()
    tensors["pos_embed"] = torch.randn(1, 1 + 36, 96, generator=torch.Generator().manual_seed(0))
    save_file(tensors, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"6x6 .* grid, but the model has a 8x8") as caught:
        load_model(CARD, WeightsChoice(tmp_path / "small.safetensors"), Recipe())
    assert "--resize-pos-embed" in caught.value.hint
    choice = WeightsChoice(tmp_path / "small.safetensors", resize_position=True)
    assert np.isfinite(run(load_model(CARD, choice, Recipe()), demo_images)).all()


def test_reload_refuses_a_changed_or_missing_checkpoint(tmp_path: Path) -> None:
    tensors = demo_tensors()
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    origin = load_model(CARD, WeightsChoice(path), Recipe()).weights
    assert reload_model(CARD, origin, Recipe()).weights == origin
    tensors["head.bias"] += 1
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="changed since"):
        reload_model(CARD, origin, Recipe())
    path.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        reload_model(CARD, origin, Recipe())
