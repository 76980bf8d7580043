"""The preprocessing that a checkpoint's own configuration states.

Covers: clipdeploy/models/checkpoints/preprocessing.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import mmpretrain_keys, write_nested_zip
from safetensors.torch import load_file

from clipdeploy.core.errors import CheckpointError, UsageError
from clipdeploy.core.passport import CLIP_MEAN, Recipe
from clipdeploy.models import cards
from clipdeploy.models.checkpoints import read_checkpoint
from clipdeploy.models.load import LoadedModel, WeightsChoice, load_model, reload_model

CARD = cards.find(cards.DEMO)
HALF = (0.5, 0.5, 0.5)


def load(folder: Path, recipe: Recipe = Recipe()) -> LoadedModel:
    return load_model(CARD, WeightsChoice(folder), recipe)


def folder_with(path: Path, **files: dict[str, Any]) -> Path:
    shutil.copy(cards.demo_file("weights.safetensors"), path / "model.safetensors")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("flat", [False, True])
def test_timms_configuration_is_used_and_said(flat: bool, tmp_path: Path) -> None:
    cfg = {"mean": HALF, "std": HALF, "crop_pct": 0.9, "interpolation": "bilinear"}
    inside = cfg if flat else {"pretrained_cfg": cfg}
    model = load(folder_with(tmp_path, config={"architecture": "vit", **inside}))
    made = model.card.preprocess(model.recipe)
    assert (made.mean, made.std, made.crop_pct, made.crop_mode) == (HALF, HALF, 0.9, "center")
    assert "from config.json: mean 0.5, 0.5, 0.5" in model.notes[-1]
    assert made.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("content", "crop"),
    [
        ({"size": {"height": 32, "width": 32}, "resample": 2}, (1.0, "squash")),
        (
            {
                "size": {"shortest_edge": 40},
                "crop_size": {"height": 32, "width": 32},
                "do_center_crop": True,
            },
            (0.8, "center"),
        ),
        # As in openai/clip-vit-base-patch32 and google/vit-base-patch16-224.
        ({"size": 40, "crop_size": 32, "do_center_crop": True}, (0.8, "center")),
        ({"size": 32}, (1.0, "squash")),
    ],
)
def test_the_configuration_of_transformers_is_used(
    content: dict[str, Any], crop: tuple[float, str], tmp_path: Path
) -> None:
    content |= {"image_mean": HALF, "image_std": HALF}
    model = load(folder_with(tmp_path, preprocessor_config=content))
    made = model.card.preprocess(model.recipe)
    assert (made.mean, made.std) == (HALF, HALF)
    assert (made.crop_pct, made.crop_mode) == crop


def test_mmpretrains_buffers_are_used(tmp_path: Path) -> None:
    tensors = mmpretrain_keys(load_file(cards.demo_file("weights.safetensors")))
    tensors["data_preprocessor.mean"] = torch.full((3, 1, 1), 127.5)
    tensors["data_preprocessor.std"] = torch.full((3, 1, 1), 127.5)
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").recipe.mean == HALF


def test_options_come_before_the_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, preprocessor_config={"image_mean": HALF, "image_std": HALF})
    assert load(folder, Recipe(mean=(0.4, 0.4, 0.4))).recipe.mean == (0.4, 0.4, 0.4)


# transformers' ViT of version 4 resizes bilinear: Pillow's number 2.
@pytest.mark.parametrize(
    ("beside", "stated"),
    [
        ({"config": {"pretrained_cfg": {"interpolation": "bilinear"}}}, "bilinear"),
        ({"preprocessor_config": {"resample": 2}}, "bilinear"),
        ({"config": {"pretrained_cfg": {"interpolation": "lanczos"}}}, "lanczos"),
        ({"preprocessor_config": {"resample": 4}}, "box"),
    ],
)
def test_the_interpolation_of_the_configuration(
    beside: dict[str, Any], stated: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, **beside)
    given = load(folder, Recipe(interpolation="bicubic"))
    assert given.card.preprocess(given.recipe).interpolation == "bicubic"
    assert f"(bicubic), crop 32; the configuration states {stated}" in given.notes[-1]
    if stated == "bilinear":
        model = load(folder)
        assert model.card.preprocess(model.recipe).interpolation == "bilinear"
        assert "(bilinear), crop 32" in model.notes[-1]
    else:
        with pytest.raises(CheckpointError, match=f"states the interpolation '{stated}'") as caught:
            load(folder)
        assert "--interpolation bicubic or bilinear" in caught.value.hint


def test_no_other_interpolation_can_be_chosen() -> None:
    with pytest.raises(UsageError, match="'lanczos' is not supported"):
        Recipe(interpolation="lanczos")  # type: ignore[arg-type]


def test_what_follows_from_the_recipe_is_not_recorded(tmp_path: Path) -> None:
    content = {"mean": list(CLIP_MEAN), "crop_pct": 1.0}
    folder = folder_with(tmp_path, config={"pretrained_cfg": content})
    assert load(folder).recipe == Recipe()


def test_without_a_configuration_it_says_what_is_assumed(tmp_path: Path) -> None:
    model = load(folder_with(tmp_path))
    assert model.recipe == Recipe()
    assert "assumed" in model.notes[-1]
    assert "as-shipped" not in model.notes[-1]


def test_mmpretrains_fine_tunes_are_stated_of_their_numerics(tmp_path: Path) -> None:
    tensors = load_file(cards.demo_file("weights.safetensors"))
    model = load(write_nested_zip(tensors, tmp_path / "x.pth"))
    assert "as-shipped" in model.notes[-1]


def test_odd_configurations_state_nothing(tmp_path: Path) -> None:
    cfg = {"mean": ["x", 1, 2], "std": [float("inf")] * 3, "crop_pct": True, "crop_mode": 7}
    folder = folder_with(tmp_path, config={"pretrained_cfg": cfg})
    found = read_checkpoint(folder).preprocessing
    assert found is not None
    assert (found.mean, found.std, found.crop_pct, found.crop_mode) == (None,) * 4


def test_values_out_of_range_are_refused_with_their_source(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, preprocessor_config={"image_std": [0, 0, 0], "resample": [1]})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json .*std\[0\] is 0"):
        load(folder)
    assert load(folder, Recipe(std=HALF)).recipe.std == HALF


def test_means_for_samples_to_255_are_refused() -> None:
    with pytest.raises(UsageError, match="mean") as caught:
        Recipe(mean=(123.675, 116.28, 103.53))
    assert "255" in caught.value.hint


def test_an_artifacts_recipe_is_not_completed_again(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    model = load(folder)
    folder_with(tmp_path, preprocessor_config={"image_mean": HALF, "image_std": HALF})
    assert reload_model(CARD, model.weights, model.recipe).recipe == model.recipe
    assert reload_model(CARD, model.weights, model.recipe, complete=False).recipe.mean == HALF
