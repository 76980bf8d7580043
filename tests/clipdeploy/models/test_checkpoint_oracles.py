"""Checkpoints that the training libraries wrote, against the logits of these libraries.

The files come from ``scripts/write_checkpoint_oracles.py``.

Covers: clipdeploy/models/checkpoints/canonical.py, clipdeploy/models/checkpoints/stated.py,
    clipdeploy/models/checkpoints/layouts/hf_clip.py,
    clipdeploy/models/checkpoints/layouts/hf_vit.py,
    clipdeploy/models/checkpoints/layouts/layout.py,
    clipdeploy/models/checkpoints/layouts/mmpretrain.py,
    clipdeploy/models/checkpoints/layouts/openai.py, clipdeploy/models/checkpoints/layouts/timm.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.passport import ModelChoices, Recipe
from clipdeploy.models.load import (
    LoadedModel,
    WeightsChoice,
    infer_card,
    load_model,
    reload_model,
)

DATA = Path(__file__).with_name("data") / "oracles"
LOGITS = np.load(DATA / "logits.npz")
HEADS = 2
# Of the largest logit.
TOLERANCE = 1e-4

# Logits -> file, and options beside the number of heads.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "timm-flat": ("timm-flat.pth", {}),
    "timm-flat-16px": ("timm-flat.pth", {"image_size": 16}),
    "timm-flat-48px": ("timm-flat.pth", {"image_size": 48}),
    "timm-best-ema": ("timm-best.pth.tar", {}),
    "timm-best-raw": ("timm-best.pth.tar", {"averaged": False}),
    "timm-hub": ("timm-hub", {}),
    "timm-plain": ("timm-plain.pth", {}),
    "timm-large": ("timm-large.pth", {}),
    "torch-averaged": ("torch-averaged.pth", {}),
    "timm-whole": ("timm-whole.pth", {}),
    "hf-vit": ("hf-vit", {}),
    "hf-clip": ("hf-clip", {}),
    "openai-head": ("openai-head.pt", {"gelu": "quick"}),
    "open-clip-tower": ("open-clip-tower.pt", {"gelu": "erf"}),
    "lightning": ("lightning.ckpt", {}),
    "mm-release": ("mm-release.pth", {"numerics": "as-shipped"}),
    "mm-release-48px": ("mm-release.pth", {"numerics": "as-shipped", "image_size": 48}),
    "mm-train-ema": ("mm-train.pth", {}),
    "mm-train-raw": ("mm-train.pth", {"averaged": False}),
}


def load(path: Path, **options: Any) -> LoadedModel:
    recipe = Recipe(options.pop("numerics", "trained"))
    size, heads = options.pop("image_size", None), options.pop("heads", HEADS)
    choice = WeightsChoice(path, choices=ModelChoices(**options), heads=heads, image_size=size)
    return load_model(infer_card(choice), choice, recipe)


def run(model: LoadedModel) -> NDArray[np.float32]:
    images = LOGITS[f"images-{model.card.image_size}"].astype(np.float32)
    with torch.inference_mode():
        found: NDArray[np.float32] = model.module(torch.from_numpy(images)).numpy()
    return found


def error(model: LoadedModel, name: str) -> float:
    expected = LOGITS[name]
    return float(np.abs(run(model) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_the_library(name: str) -> None:
    file, options = CASES[name]
    model = load(DATA / file, **options)
    assert error(model, name) < TOLERANCE
    again = reload_model(model.card, model.weights, model.recipe)
    assert np.array_equal(run(again), run(model))


# Logits -> options that are wrong for the file.
MISTAKES: dict[str, dict[str, Any]] = {
    "timm-flat": {"gelu": "quick"},
    "timm-flat-16px": {"image_size": 16, "resampling": "mmpretrain"},
    "timm-flat-48px": {"image_size": 48, "heads": 4},
    "timm-best-ema": {"averaged": False},
    "timm-best-raw": {"averaged": True},
    "timm-hub": {"gelu": "erf"},
    "hf-clip": {"pooling": "token"},
    "openai-head": {"gelu": "erf"},
    "mm-train-ema": {"averaged": False},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_choice_is_visible(name: str) -> None:
    model = load(DATA / CASES[name][0], **MISTAKES[name])
    assert error(model, name) > 10 * TOLERANCE


def test_both_namings_of_transformers_are_one_model() -> None:
    saved, state = load(DATA / "hf-vit"), load(DATA / "hf-vit-state.bin")
    assert np.array_equal(run(saved), run(state))


def test_a_shard_leads_to_its_index() -> None:
    shard = sorted((DATA / "hf-vit").glob("model-*.safetensors"))[0]
    assert np.array_equal(run(load(shard)), run(load(DATA / "hf-vit")))


def test_a_shard_without_its_index_is_refused(tmp_path: Path) -> None:
    shard = sorted((DATA / "hf-vit").glob("model-*.safetensors"))[0]
    shutil.copy(shard, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json does not exist"):
        load(tmp_path / shard.name)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("timm-best.pth.tar", "averaged (EMA) weights of state_dict_ema; --no-ema"),
        ("mm-train.pth", "averaged (EMA) weights of state_dict; --no-ema"),
        ("lightning.ckpt", "left out: criterion.weight"),
    ],
)
def test_what_was_chosen_is_said(file: str, words: str) -> None:
    assert words in " ".join(load(DATA / file).notes)


def test_class_names_come_from_the_configuration() -> None:
    assert dict(load(DATA / "hf-vit").class_names)["3"] == "bird 3"
    assert load(DATA / "mm-train.pth").class_names == list("abcde")


def test_a_gelu_that_nothing_tells_must_be_given() -> None:
    with pytest.raises(CheckpointError, match="which GELU") as caught:
        load(DATA / "openai-head.pt")
    assert "--gelu quick" in caught.value.hint


def test_weights_without_averaging_cannot_be_asked_for_where_there_are_none() -> None:
    with pytest.raises(CheckpointError, match="has no averaged"):
        load(DATA / "timm-flat.pth", averaged=True)


def test_heads_that_nothing_tells_must_be_given() -> None:
    with pytest.raises(CheckpointError, match="number of heads") as caught:
        load(DATA / "timm-flat.pth", heads=None)
    assert "--heads" in caught.value.hint
    assert load(DATA / "hf-vit", heads=None).card.heads == HEADS
