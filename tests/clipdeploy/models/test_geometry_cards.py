"""Cards of geometries that no published checkpoint has, and the inference of a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice, infer_card, load_model, random_tensors
from clipdeploy.models.vit import ViTConfig


@pytest.mark.parametrize(
    "card", [card for card in cards.all_cards() if card.name != cards.DEMO], ids=lambda c: c.name
)
def test_sizes_are_counted_as_for_the_published_checkpoints(card: cards.ModelCard) -> None:
    made = cards.geometry_card(card.patch, card.image_size, card.width, card.depth, card.heads)
    assert (made.params, made.macs) == (card.params, card.macs)


@pytest.mark.parametrize(
    "name", ["vit-p14-336px-w1024-d24-h16", "vit-p14-224px-w1408-d40-h16-m6144"]
)
def test_a_name_is_a_geometry(name: str) -> None:
    card = cards.find(name)
    assert (card.name, card.generic, card.top1) == (name, True, None)
    assert cards.full_card(name) == card
    assert cards.full_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "vit-p14-225px-w1024-d24-h16",  # no whole number of patches
        "vit-p14-224px-w1000-d24-h16",  # no whole number of channels a head
        "vit-p0-224px-w1024-d24-h16",
        "vit-p16-224px-w768-d12-h12-m3072",  # four times the width is not written
        "vit-p016-224px-w768-d12-h12",
        "vit-p14-99999999999px-w1024-d24-h16",
    ],
)
def test_impossible_names_are_unknown(name: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        cards.find(name)
    assert cards.full_card(name) is None


def saved(config: ViTConfig, path: Path) -> WeightsChoice:
    save_file(random_tensors(config, 0), path)
    return WeightsChoice(path)


def test_the_shipped_weights_are_the_demo() -> None:
    choice = WeightsChoice(cards.demo_file("weights.safetensors"))
    assert infer_card(choice).name == cards.DEMO


def test_a_fine_tune_gets_the_card_of_its_geometry(tmp_path: Path) -> None:
    tensors = load_file(cards.demo_file("weights.safetensors"))
    tensors |= {"head.weight": torch.zeros(5, 96), "head.bias": torch.zeros(5)}
    save_file(tensors, tmp_path / "five.safetensors")
    assert infer_card(WeightsChoice(tmp_path / "five.safetensors")).name == cards.DEMO


def test_the_preferred_card_is_taken_if_it_fits(tmp_path: Path) -> None:
    fitting = [c for c in cards.all_cards() if (c.patch, c.image_size) == (32, 224)]
    config = ViTConfig(32, 224, classes=3)
    choice = saved(config, tmp_path / "x.safetensors")
    assert len(fitting) > 1
    assert infer_card(choice).short
    other = next(card for card in fitting if not card.short)
    assert infer_card(choice, other.name) == other
    assert infer_card(choice, cards.DEMO).short


def test_a_card_of_timm_describes_only_its_own_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "cards.csv"
    table.write_text(
        "name,alias,patch,image_size,width,depth,heads,measured_by,file\n"
        "acme,acme-short,8,40,64,1,1,timm,hf://acme/vit\n"
    )
    choice = saved(ViTConfig(8, 40, width=64, depth=1, heads=1), tmp_path / "x.safetensors")
    before = infer_card(choice)
    monkeypatch.setenv("CLIPDEPLOY_CARDS", str(table))
    assert infer_card(choice) == before == cards.find("vit-p8-40px-w64-d1-h1")
    # The workspace's last model is kept, whichever of the two it is.
    assert infer_card(choice, "acme") == cards.find("acme-short")
    assert infer_card(choice, before.name) == before
    downloaded = tmp_path / "models--acme--vit" / "snapshots" / "1" / "model.safetensors"
    downloaded.parent.mkdir(parents=True)
    Path(str(choice.checkpoint)).rename(downloaded)
    assert infer_card(WeightsChoice(downloaded)).name == "acme"


def test_another_image_size_is_another_model(tmp_path: Path) -> None:
    config = ViTConfig(8, 40, classes=3, width=64, depth=1, heads=1)
    choice = saved(config, tmp_path / "x.safetensors")
    card = infer_card(choice)
    assert card.name == "vit-p8-40px-w64-d1-h1"
    assert load_model(card, choice, Recipe()).module.config.grid == 5
    with pytest.raises(UsageError, match="has heads 1, not 2"):
        load_model(card, WeightsChoice(choice.checkpoint, heads=2), Recipe())


def test_without_a_checkpoint_nothing_is_inferred() -> None:
    with pytest.raises(UsageError, match="no model is named"):
        infer_card(WeightsChoice())
