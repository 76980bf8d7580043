"""The published CLIPs, and what their rows add to their files.

Covers: clipdeploy/models/columns.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from clip_files import clip_tensors, write_clip

from clipdeploy.cli.main import main
from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.passport import CLIP_MEAN, INCEPTION_MEAN, INCEPTION_STD, ModelChoices
from clipdeploy.models import cards, columns
from clipdeploy.models.clip.pair import read_pair
from clipdeploy.models.clips import clip_named, clip_of_file, published_clips

LAION = "models--laion--CLIP-ViT-L-14-laion2B-s32B-b82K"
# ImageNet 1k of open_clip's docs/openclip_results.csv, in percent.
TOP1 = {
    "openai/clip-vit-base-patch32": 63.32,
    "openai/clip-vit-base-patch16": 68.34,
    "openai/clip-vit-large-patch14": 75.54,
    "openai/clip-vit-large-patch14-336": 76.56,
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": 66.56,
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": 70.23,
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": 75.25,
    "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K": 69.17,
    "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K": 73.49,
    "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": 79.21,
}


def test_the_rows_are_those_of_open_clip() -> None:
    assert {each.name: each.top1 for each in published_clips()} == TOP1
    quick = {each.name for each in published_clips() if each.gelu == "quick"}
    assert quick == {name for name in TOP1 if name.startswith("openai/")}
    inception = [each.name for each in published_clips() if each.mean_std[0] == INCEPTION_MEAN]
    assert inception == ["laion/CLIP-ViT-L-14-laion2B-s32B-b82K"]


def test_no_clip_is_a_name_of_a_model() -> None:
    names = {name for card in cards.all_cards() for name in (card.name, *card.aliases)}
    assert not names & {each.name for each in published_clips()}


def test_a_file_is_recognised_by_its_place_and_by_its_hash() -> None:
    found = clip_of_file(Path("/x") / LAION / "snapshots" / "1" / "open_clip_pytorch_model.bin", "")
    assert found == clip_named("laion/CLIP-ViT-L-14-laion2B-s32B-b82K")
    # The address of OpenAI's archive has its hash (openai/CLIP clip.py, _MODELS).
    digest = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    openai = clip_of_file(Path("ViT-B-16.pt"), digest)
    assert openai == clip_named("openai/clip-vit-base-patch16")
    assert clip_of_file(Path("/x/models--laion--other/ViT-B-16.pt"), "0" * 64) is None
    assert clip_named("laion/other") is None


def test_the_row_tells_what_a_lone_file_does_not(tmp_path: Path) -> None:
    """Of a repository, open_clip downloads only the weights."""
    alone = write_clip("open_clip", tmp_path / LAION / "snapshots" / "1")
    pair = read_pair(alone)
    assert pair.image.choices.gelu == "erf"
    stated = pair.image.preprocessing
    assert stated is not None
    assert (stated.mean, stated.std) == (INCEPTION_MEAN, INCEPTION_STD)
    assert read_pair(alone, ModelChoices(gelu="quick")).image.choices.gelu == "quick"
    with pytest.raises(CheckpointError, match="which GELU"):
        read_pair(write_clip("open_clip", tmp_path / "models--laion--other"))


def test_what_is_beside_the_file_comes_before_the_row(tmp_path: Path) -> None:
    folder = write_clip("transformers", tmp_path / LAION, clip_tensors("transformers"))
    (folder / "preprocessor_config.json").write_text(f'{{"image_mean": {list(CLIP_MEAN)}}}')
    pair = read_pair(folder)
    assert pair.image.choices.gelu == "quick"
    assert pair.image.preprocessing is not None
    assert pair.image.preprocessing.mean == CLIP_MEAN


def test_zoo_lists_them() -> None:
    said = CliRunner().invoke(main, ["zoo", "clips"]).stdout
    for name, top1 in TOP1.items():
        assert any(name in line and f"{top1:.2f}" in line for line in said.splitlines())
    assert "zoo clips" in CliRunner().invoke(main, ["zoo"]).stdout


@pytest.mark.parametrize("text", ["openai", "openai/", "/clip", "a/b/c", "a b/c", "../x"])
def test_other_texts_are_no_repository(text: str) -> None:
    with pytest.raises(ValueError, match="is not OWNER/NAME"):
        columns.hub_name(text)
