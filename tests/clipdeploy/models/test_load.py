from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write_legacy_flat, write_nested_zip
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from clipdeploy.core.errors import ArtifactError, CheckpointError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import ModelChoices, Recipe, WeightsOrigin, from_json, to_json
from clipdeploy.models import cards
from clipdeploy.models.load import (
    LoadedModel,
    WeightsChoice,
    infer_card,
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


def test_an_old_passport_does_not_change_to_the_averaged_weights(tmp_path: Path) -> None:
    """Passports without ``choices`` are of versions that read ``state_dict``."""
    tensors, path = demo_tensors(), tmp_path / "best.pth"
    averaged = tensors | {"head.bias": tensors["head.bias"] + 1}
    torch.save({"state_dict": tensors, "state_dict_ema": averaged}, path)
    old = WeightsOrigin("file", str(path), sha256_file(path), layout="timm (nested pth)")
    for complete in (True, False):
        with pytest.raises(ArtifactError, match="in another way") as caught:
            reload_model(CARD, old, Recipe(), complete=complete)
    assert "--no-ema" in caught.value.hint
    # A file with one kind of weights is read as before.
    torch.save({"state_dict": tensors}, path)
    same = WeightsOrigin("file", str(path), sha256_file(path), layout="timm (nested pth)")
    assert reload_model(CARD, same, Recipe()).weights.identity == same.identity


# Choices, number of heads, image size, numerics.
CHOSEN: list[tuple[ModelChoices, int, int, str]] = [
    (ModelChoices(gelu="quick"), 6, 32, "trained"),
    (ModelChoices(pooling="avg"), 6, 32, "trained"),
    (ModelChoices(eps=1e-3), 6, 32, "trained"),
    (ModelChoices(), 8, 32, "trained"),
    (ModelChoices(), 6, 16, "trained"),
    (ModelChoices(resampling="timm"), 6, 16, "trained"),
    (ModelChoices(), 6, 64, "as-shipped"),
]


@pytest.mark.parametrize(("choices", "heads", "size", "numerics"), CHOSEN)
def test_a_passport_gives_the_same_reference_again(
    choices: ModelChoices, heads: int, size: int, numerics: str
) -> None:
    choice = WeightsChoice(
        cards.demo_file("weights.safetensors"), choices=choices, heads=heads, image_size=size
    )
    recipe = Recipe(numerics, mean=(0.5, 0.5, 0.5))  # type: ignore[arg-type]
    model = load_model(infer_card(choice), choice, recipe)
    stored = from_json(to_json(model.weights), WeightsOrigin, "a passport")
    again = reload_model(cards.find(model.card.name), stored, model.recipe)
    generator = np.random.default_rng(0)
    images = generator.standard_normal((2, 3, size, size)).astype(np.float32)
    np.testing.assert_array_equal(run(again, images), run(model, images))
    # Without the choices, it would be another model.
    if choices != ModelChoices():
        plain = replace(stored, choices=ModelChoices())
        other = reload_model(model.card, plain, model.recipe, complete=False)
        assert not np.array_equal(run(other, images), run(model, images))


def test_a_resampling_without_effect_is_refused() -> None:
    path, timm = cards.demo_file("weights.safetensors"), ModelChoices(resampling="timm")
    with pytest.raises(UsageError, match=r"has no effect: .* 8x8 position grid"):
        load_model(CARD, WeightsChoice(path, choices=timm, image_size=32), Recipe())
    choice = WeightsChoice(path, choices=timm, image_size=64, heads=6)
    with pytest.raises(UsageError, match="no effect with numerics 'as-shipped'"):
        load_model(infer_card(choice), choice, Recipe("as-shipped"))
    exported = load_model(infer_card(choice), choice, Recipe())
    assert exported.weights.choices.resampling == "timm"
    # The numerics of an existing model can be changed.
    shipped = reload_model(exported.card, exported.weights, Recipe("as-shipped"), complete=False)
    assert shipped.weights.choices.resampling == "mmpretrain"


def test_choices_for_random_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="no effect"):
        WeightsChoice(random_seed=3, choices=ModelChoices(gelu="quick"))
