"""The cards of the zoo, and tables of data with mistakes.

Covers: clipdeploy/core/data_rows.py, clipdeploy/core/version.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from click.testing import CliRunner

from clipdeploy.cli.main import main
from clipdeploy.core.data_rows import read_rows
from clipdeploy.core.errors import CheckpointError, UsageError
from clipdeploy.core.passport import CLIP_MEAN, IMAGENET_MEAN, Recipe
from clipdeploy.models import cards
from clipdeploy.models.checkpoints import expected_shapes
from clipdeploy.models.download import fetch, is_cached
from clipdeploy.models.vit import ViTConfig


def test_there_are_fourteen_cards_and_the_demo() -> None:
    listed = cards.all_cards()
    assert len(listed) == 15
    assert listed[-1].name == cards.DEMO
    assert len({card.name for card in listed}) == 15


@pytest.mark.parametrize("card", cards.all_cards(), ids=lambda card: card.name)
def test_params_and_macs_follow_from_the_geometry(card: cards.ModelCard) -> None:
    config = ViTConfig(
        card.patch, card.image_size, card.classes, card.width, card.depth, card.heads
    )
    shapes = expected_shapes(config)
    count = 0
    for shape in shapes.values():
        size = 1
        for axis in shape:
            size *= axis
        count += size
    assert count == card.params
    # Multiply-accumulates of the matrix products: patches, Linears, attention, head.
    tokens, width = config.tokens, config.width
    per_block = tokens * 12 * width**2 + 2 * tokens**2 * width
    macs = (tokens - 1) * 3 * config.patch**2 * width + config.depth * per_block
    assert macs + width * config.classes == card.macs


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("clip-vit-base-p16", "clip-vit-base-p16_laion2b-in12k-pre_3rdparty_in1k"),
        ("clip-vit-base-p32-448px", "clip-vit-base-p32_laion2b-in12k-pre_3rdparty_in1k-448px"),
        (
            "vit-base-p16_clip-openai-pre_3rdparty_in1k",
            "clip-vit-base-p16_openai-pre_3rdparty_in1k",
        ),
        ("demo", cards.DEMO),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert cards.find(alias).name == name


@pytest.mark.parametrize("alias", ["p32", "p32-384px", "p32-448px", "p16", "p16-384px"])
def test_a_short_alias_is_the_most_accurate_card_of_its_geometry(alias: str) -> None:
    card = cards.find(f"clip-vit-base-{alias}")
    rivals = [
        other.top1 or 0
        for other in cards.all_cards()
        if (other.patch, other.image_size) == (card.patch, card.image_size)
    ]
    assert (card.top1 or 0) == max(rivals)


def test_every_name_and_alias_is_unique_and_found() -> None:
    seen: dict[str, str] = {}
    for card in cards.all_cards():
        for name in (card.name, *card.aliases):
            assert name not in seen, f"{name} is {seen[name]} and {card.name}"
            seen[name] = card.name
            assert cards.find(name) is card


def test_the_hint_for_an_unknown_name_has_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        cards.find("clip-vit-base-p17")
    assert "clip-vit-base-p17" in caught.value.message
    assert "clip-vit-base-p16" in caught.value.hint
    assert caught.value.exit_code == 2


def test_recipes_decide_preprocessing() -> None:
    card = cards.find("clip-vit-base-p32-448px")
    assert card.preprocess(Recipe()).mean == CLIP_MEAN
    assert card.preprocess(Recipe()).crop_pct == 1.0
    shipped = card.preprocess(Recipe("as-shipped", "timm"))
    assert shipped.mean == IMAGENET_MEAN
    assert (shipped.crop_pct, shipped.crop_mode) == (card.timm_crop_pct, card.timm_crop_mode)


def test_class_names_are_the_thousand_wnids_in_logit_order() -> None:
    names = cards.class_names(cards.all_cards()[0])
    assert len(names) == 1000
    assert names[0] == ("n01440764", "tench, Tinca tinca")
    assert [wnid for wnid, _ in names] == sorted(wnid for wnid, _ in names)
    assert [name for name, _ in cards.class_names(cards.find(cards.DEMO))] == list("0123456789")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces fields of the first row of ``zoo.csv``."""
    first, *others = read_rows("zoo.csv")

    def change(**fields: str | None) -> None:
        edited = [replace(first, columns=first.columns | fields), *others]
        monkeypatch.setattr(cards, "read_rows", lambda name, hint: edited)
        cards.all_cards.cache_clear()

    yield change
    monkeypatch.undo()
    cards.all_cards.cache_clear()


NEEDED = ("name", "patch", "image_size", "true_params", "true_macs")
UNNEEDED = tuple(column for column in read_rows("zoo.csv")[0].columns if column not in NEEDED)


@pytest.mark.parametrize("blank", ["", "  ", None])
@pytest.mark.parametrize("column", UNNEEDED)
def test_a_field_that_may_be_blank(
    column: str, blank: str | None, table: Callable[..., None]
) -> None:
    table(**{column: blank})
    card = cards.all_cards()[0]
    assert cards.find(card.name) is card
    for words in (("zoo",), ("zoo", "--json"), ("zoo", "show", card.name)):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    assert ("not published" in result.stdout) == (column == "file")
    assert "" not in card.aliases
    if column in ("file", "sha256_prefix"):
        assert not is_cached(card)
        with pytest.raises(CheckpointError, match=r"of .* weights is unknown"):
            fetch(card)


@pytest.mark.parametrize("bad", ["", "many", "0", "-4", "1.5"])
@pytest.mark.parametrize("column", NEEDED[1:])
def test_a_required_field(column: str, bad: str, table: Callable[..., None]) -> None:
    table(**{column: bad})
    result = CliRunner().invoke(main, ["zoo"])
    assert result.exit_code == 1
    assert f"zoo.csv, line 2: no valid value in column {column}" in result.stderr
    assert "Traceback" not in result.output
