"""CLIP's image tower as an embedding model, against open_clip and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import LIBRARIES, TOLERANCE, error, oracles, write_clip

from clipdeploy.core.errors import CheckpointError, UsageError
from clipdeploy.core.passport import Embedding, ModelChoices, Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import (
    LoadedModel,
    WeightsChoice,
    infer_card,
    load_model,
    reload_model,
)
from clipdeploy.models.probe import prove, read_probe

ORACLES = oracles()
IMAGES = torch.from_numpy(ORACLES["images"].astype(np.float32))


def tower(
    library: str, folder: Path, embedding: Embedding, choices: ModelChoices | None = None
) -> LoadedModel:
    path = write_clip(library, folder)
    choice = WeightsChoice(path, choices=choices or LIBRARIES[library], embedding=embedding)
    return load_model(infer_card(choice), choice, Recipe())


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_embeddings_are_those_of_the_library(library: str, tmp_path: Path) -> None:
    model, expected = tower(library, tmp_path, "raw"), ORACLES[f"{library}-image"]
    assert error(model.module(IMAGES), expected) < TOLERANCE
    # Without the mean of the channels they are others.
    assert error(model.module(IMAGES - 0.5), expected) > 100 * TOLERANCE
    assert model.card.name.endswith("-e48-raw")
    assert model.card.classes == 48
    again = reload_model(model.card, model.weights, model.recipe)
    assert torch.equal(again.module(IMAGES), model.module(IMAGES))


@pytest.mark.parametrize("library", LIBRARIES)
def test_normalised_embeddings_have_length_1(library: str, tmp_path: Path) -> None:
    found = tower(library, tmp_path, "normalised").module(IMAGES)
    raw = ORACLES[f"{library}-image"]
    assert error(found, raw / np.linalg.norm(raw, axis=1, keepdims=True)) < TOLERANCE
    assert error(found, raw) > 100 * TOLERANCE


def test_a_name_tells_the_output(tmp_path: Path) -> None:
    model = tower("open_clip", tmp_path, "normalised")
    assert cards.find(model.card.name) == model.card
    choice = WeightsChoice(
        tmp_path / "open_clip.pt", choices=LIBRARIES["open_clip"], embedding="raw"
    )
    with pytest.raises(UsageError, match="has the output normalised, not raw"):
        load_model(model.card, choice, Recipe())
    with pytest.raises(UsageError, match="unknown model"):
        cards.find(model.card.name.replace("-e48", ""))


def test_random_weights_embed(tmp_path: Path) -> None:
    card = cards.find("vit-p8-32px-w128-d2-h2-e48-normalised")
    module = load_model(card, WeightsChoice(random_seed=0), Recipe()).module
    assert torch.allclose(module(IMAGES).norm(dim=1), torch.ones(2))
    assert sum(each.numel() for each in module.parameters()) + 128 == card.params


def test_a_classifier_is_no_clip(tmp_path: Path) -> None:
    choice = WeightsChoice(cards.demo_file("weights.safetensors"), embedding="raw")
    with pytest.raises(CheckpointError, match=r"is no CLIP|no whole CLIP|classifier"):
        infer_card(choice)


def test_a_probe_of_the_library_agrees(tmp_path: Path) -> None:
    path = tmp_path / "probe.npz"
    np.savez(path, inputs=IMAGES.numpy(), logits=ORACLES["open_clip-image"])
    probe = read_probe(path)
    assert prove(tower("open_clip", tmp_path, "raw"), probe) < TOLERANCE
    with pytest.raises(CheckpointError, match="with raw embeddings they agree") as caught:
        prove(tower("open_clip", tmp_path, "normalised"), probe)
    assert caught.value.hint == "pass --embeddings raw"


def test_a_probe_names_two_wrong_choices(tmp_path: Path) -> None:
    path = tmp_path / "probe.npz"
    np.savez(path, inputs=IMAGES.numpy(), logits=ORACLES["open_clip-image"])
    wrong = tower("open_clip", tmp_path, "normalised", ModelChoices(gelu="quick"))
    with pytest.raises(CheckpointError, match="erf GELU and raw embeddings they agree") as caught:
        prove(wrong, read_probe(path))
    assert caught.value.hint == "pass --gelu erf and pass --embeddings raw"
