"""The cards of the zoo, and tables of data with mistakes.

Covers: clipdeploy/core/data_rows.py, clipdeploy/core/version.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from clipdeploy.cli.main import main
from clipdeploy.core.data_rows import read_rows
from clipdeploy.core.errors import ArtifactError, CheckpointError, FileError, UsageError
from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, Recipe, WeightsOrigin
from clipdeploy.models import cards
from clipdeploy.models.checkpoints import expected_shapes
from clipdeploy.models.download import fetch, is_cached
from clipdeploy.models.vit import ViTConfig
from clipdeploy.workspace.passports import is_published


def test_there_are_24_cards_and_the_demo() -> None:
    listed = cards.all_cards()
    assert len(listed) == 25
    assert listed[-1].name == cards.DEMO
    assert len({card.name for card in listed}) == 25


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


# What a short name means does not change: workspaces, scripts and settings contain it.
SHORT = {
    "demo": cards.DEMO,
    "clip-vit-base-p32": "clip-vit-base-p32_laion2b-in12k-pre_3rdparty_in1k",
    "clip-vit-base-p32-384px": "clip-vit-base-p32_laion2b-in12k-pre_3rdparty_in1k-384px",
    "clip-vit-base-p32-448px": "clip-vit-base-p32_laion2b-in12k-pre_3rdparty_in1k-448px",
    "clip-vit-base-p16": "clip-vit-base-p16_laion2b-in12k-pre_3rdparty_in1k",
    "clip-vit-base-p16-384px": "clip-vit-base-p16_laion2b-in12k-pre_3rdparty_in1k-384px",
    "clip-vit-large-p14": "clip-vit-large-p14_openai-in12k-pre_in1k",
    "clip-vit-large-p14-336px": "clip-vit-large-p14_openai-in12k-pre_in1k-336px",
    "clip-vit-huge-p14": "clip-vit-huge-p14_laion2b-in12k-pre_in1k",
    "clip-vit-huge-p14-336px": "clip-vit-huge-p14_laion2b-in12k-pre_in1k-336px",
}


def test_the_short_names() -> None:
    assert {card.short: card.name for card in cards.all_cards() if card.short} == SHORT


@pytest.mark.parametrize("card", [c for c in cards.all_cards() if c.on_hub], ids=lambda c: c.name)
def test_a_card_of_timm(card: cards.ModelCard) -> None:
    assert card.url == card.file == f"hf://timm/{card.timm_name}"
    # timm measured with its own crop, without the EXIF orientation.
    published = card.preprocess(Recipe())
    assert published == card.preprocess(Recipe(resize="timm"))
    assert published.crop_mode == ("squash" if card.image_size == 336 else "center")
    assert not published.exif_orientation
    laion = card.timm_name.startswith("vit_large") and "laion2b" in card.timm_name
    assert published.mean == ((0.5, 0.5, 0.5) if laion else CLIP_MEAN)
    assert published.std == ((0.5, 0.5, 0.5) if laion else CLIP_STD)
    assert card.preprocess(Recipe("as-shipped")).mean == IMAGENET_MEAN
    assert cards.recipe_notes(card)["--resize published"].startswith(
        "both edges 336" if card.image_size == 336 else "short edge 224"
    )


def test_the_weights_of_a_card_of_timm_are_in_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDEPLOY_HOME", str(tmp_path))
    card, other = (cards.find(f"clip-vit-large-p14{size}") for size in ("", "-336px"))
    assert not is_cached(card)
    path = tmp_path / "hub" / card.hub_folder / "snapshots" / "1" / "model.safetensors"
    path.parent.mkdir(parents=True)
    (path.parent / "config.json").touch()
    assert not is_cached(card)
    path.touch()
    assert is_cached(card)
    assert not is_cached(other)
    origin = WeightsOrigin("file", str(path), "0" * 64)
    assert is_published(card, origin)
    assert not is_published(other, origin)
    assert not is_published(card, replace(origin, path=str(tmp_path / "model.safetensors")))


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
        monkeypatch.setattr(cards, "read_rows", lambda name, hint="": edited)
        cards.shipped_cards.cache_clear()

    yield change
    monkeypatch.undo()
    cards.shipped_cards.cache_clear()


NEEDED = ("name", "patch", "image_size")
COUNTS = ("patch", "image_size", "width", "depth", "heads", "true_params", "true_macs")
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


WRONG = {
    **dict.fromkeys(COUNTS, ("many", "0", "-4", "1.5")),
    **dict.fromkeys(("name", "alias", "timm_name"), ("a/b", "-x", "a b", ".")),
    **dict.fromkeys(("published_top1", "published_top5"), ("high", "-1", "100.5", "nan")),
    "timm_crop_pct": ("wide", "0", "nan"),
    "timm_crop_mode": ("middle",),
    "normalisation": ("CLIP", "none"),
    "measured_by": ("me",),
    "file": ("../x.pth", "/x.pth", "hf://x", "hf://a/b/c", "hf://../x", "x.bin.index.json"),
    "sha256_prefix": ("abc", "wrong-hash", "ABCDEF01"),
}


@pytest.mark.parametrize(
    ("column", "bad"),
    [(column, "") for column in NEEDED]
    + [(column, bad) for column in WRONG for bad in WRONG[column]],
)
def test_a_wrong_field(column: str, bad: str, table: Callable[..., None]) -> None:
    table(**{column: bad})
    result = CliRunner().invoke(main, ["zoo"])
    assert result.exit_code == 1
    assert f"zoo.csv, line 2: no valid value in column {column}" in result.stderr
    assert "Traceback" not in result.output


def test_sizes_that_make_no_model(table: Callable[..., None]) -> None:
    table(image_size="225")
    with pytest.raises(ArtifactError, match=r"zoo.csv, line 2: .* is no geometry: 225 px in patch"):
        cards.all_cards()


# --- cards of the user ----------------------------------------------------------------------------

ROW = {"name": "acme-vit", "patch": "16", "image_size": "224", "published_top1": "99.9"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a file of cards, a dict a row, and makes it the user's."""

    def write(*rows: dict[str, str]) -> Path:
        path = tmp_path / "cards.csv"
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
        path.write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8")
        monkeypatch.setenv("CLIPDEPLOY_CARDS", str(path))
        return path

    return write


def test_own_cards_follow_the_shipped_ones(own: Callable[..., Path]) -> None:
    shipped = cards.all_cards()
    own(ROW, ROW | {"name": "second", "alias": "two", "width": "1024", "depth": "2", "heads": "16"})
    assert [card.name for card in cards.all_cards()[len(shipped) :]] == ["acme-vit", "second"]
    assert cards.all_cards()[: len(shipped)] == shipped
    first, second = cards.find("acme-vit"), cards.find("two")
    assert (first.params, first.macs, first.top1) == (86_568_424, 17_563_828_224, 99.9)
    assert (second.width, second.depth, second.short) == (1024, 2, "two")
    # A better model of the same geometry moves no name.
    assert {card.short: card.name for card in cards.all_cards() if card.short} == SHORT | {
        "two": "second"
    }


def test_a_changed_file_is_read_again(own: Callable[..., Path]) -> None:
    own(ROW)
    assert cards.full_name("acme-vit") == "acme-vit"
    own(ROW | {"name": "other"})
    assert cards.find("other").top1 == 99.9
    with pytest.raises(UsageError, match="unknown model 'acme-vit'"):
        cards.find("acme-vit")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROW | {"name": "clip-vit-base-p16"}], "line 2: clip-vit-base-p16 is a name of clip-vit-"),
        ([ROW | {"name": SHORT["clip-vit-base-p16"]}], "is a name of clip-vit-base-p16_laion2b"),
        ([ROW | {"alias": "demo"}], "line 2: demo is a name of clip-vit-demo already"),
        ([ROW | {"timm_name": "vit-p16-224px-w768-d12-h12"}], "is a name of a geometry already"),
        ([ROW, ROW], "line 3: acme-vit is a name of acme-vit already"),
        ([ROW, ROW | {"name": "x", "alias": "acme-vit"}], "line 3: acme-vit is a name of acme-vit"),
        ([ROW | {"top1": "3"}], "line 1: column 'top1' is unknown"),
        ([ROW | {"patch": "x"}], "line 2: no valid value in column patch"),
        ([ROW | {"published_top1": "101"}], "line 2: no valid value in column published_top1"),
        ([ROW | {"patch": "15"}], "line 2: vit-p15-224px-w768-d12-h12 is no geometry"),
        ([ROW | {"name": "a,b"}], "line 2: 5 values in 4 columns"),
    ],
)
def test_a_wrong_file_of_cards(
    rows: list[dict[str, str]], said: str, own: Callable[..., Path]
) -> None:
    path = own(*rows)
    result = CliRunner().invoke(main, ["zoo"])
    assert result.exit_code == 1
    assert f"{path}, line" in result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_files_that_are_no_table(own: Callable[..., Path]) -> None:
    path = own(ROW)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="is not a CSV file in UTF-8"):
        cards.all_cards()
    path.write_text("name,patch,patch\n")
    with pytest.raises(ArtifactError, match="column 'patch' is there twice"):
        cards.all_cards()
    path.write_text("")
    assert cards.all_cards() == cards.shipped_cards()
    path.unlink()
    with pytest.raises(FileError, match="cannot read"):
        cards.all_cards()


def test_the_setting_names_the_file_and_a_model_in_it(
    own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own(ROW)
    monkeypatch.delenv("CLIPDEPLOY_CARDS")
    monkeypatch.delenv("CLIPDEPLOY_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    settings = Path("clipdeploy.toml")
    settings.write_text('model = "acme-vit"\ncards = "cards.csv"\n')
    result = CliRunner().invoke(main, ["zoo", "show", "acme-vit"])
    assert result.exit_code == 0, result.output
    assert "published     top-1 99.90 %\n" in result.stdout
    Path("cards.csv").write_text("name,patch\nacme-vit,x\n")
    result = CliRunner().invoke(main, ["zoo"])
    assert result.exit_code == 2
    assert "cards.csv, line 2: no valid value in column patch" in result.stderr
    settings.write_text('model = "acme-vit"\n')
    result = CliRunner().invoke(main, ["zoo"])
    assert result.exit_code == 2
    assert 'clipdeploy.toml: model = "acme-vit": unknown model' in result.stderr
