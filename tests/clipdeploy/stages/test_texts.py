"""``predict`` compares images with texts: the demo's digits with their words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_workspaces import EMBEDDER
from passport_edits import put, restamp

from clipdeploy.core.errors import ClipdeployError
from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.clip.pair import read_pair
from clipdeploy.models.clip.prompts import read_texts
from clipdeploy.models.clip.tokenizer import tokenize
from clipdeploy.models.load import WeightsChoice, load_model
from clipdeploy.stages.predict import predict_images
from clipdeploy.stages.texts import embed_texts
from clipdeploy.workspace.folder import Workspace
from exporters.samples import normalise

TEST = cards.demo_file("test.zip")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXTS = tuple(f"a photo of the digit {word}" for word in WORDS)


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 7 of the test images."""
    images = open_images(TEST)
    name = next(entry.name for entry in images.entries if entry.name.startswith("7/"))
    path = tmp_path_factory.mktemp("digit") / "seven.png"
    path.write_bytes(images.reader().read(name))
    return path


def test_digits_are_most_like_their_own_words(towers: Workspace) -> None:
    found = predict_images(towers, EMBEDDER, TEST, texts=TEXTS, top=1)
    right = sum(each.guesses[0].index == int(each.image.split("/")[-2]) for each in found.images)
    assert len(found.images) == 500
    assert right / 500 > 0.97
    assert found.text_artifact == str(towers.graph(EMBEDDER, "fp32", "text"))
    # With the words turned by one, hardly any is right.
    turned = predict_images(towers, EMBEDDER, TEST, texts=(*TEXTS[1:], TEXTS[0]), top=1)
    wrong = sum(each.guesses[0].index == int(each.image.split("/")[-2]) for each in turned.images)
    assert wrong / 500 < 0.03


def test_the_numbers_are_those_of_clip(towers: Workspace, digit: Path) -> None:
    """Computed by CLIP's definition, with the raw towers."""
    [found] = predict_images(towers, EMBEDDER, digit, texts=TEXTS, top=10).images
    pair = read_pair(cards.demo_file("clip"))
    choice = WeightsChoice(cards.demo_file("clip"), embedding="raw")
    model = load_model(cards.find(EMBEDDER.replace("normalised", "raw")), choice, Recipe())
    spec = model.card.preprocess(model.recipe)
    [crop] = iter_crops(select(open_images(digit.parent), 1, seed=0), spec)
    with torch.inference_mode():
        image = model.module(torch.from_numpy(normalise(crop.pixels[None], spec)))
        texts = pair.text(torch.from_numpy(tokenize(TEXTS).ids))
        cosines = torch.nn.functional.cosine_similarity(image, texts)
        shares = (pair.logit_scale * cosines).softmax(dim=0)
    by_text = sorted(found.guesses, key=lambda guess: guess.index)
    np.testing.assert_allclose([guess.cosine for guess in by_text], cosines, atol=1e-5)
    np.testing.assert_allclose([guess.percent / 100 for guess in by_text], shares, atol=1e-4)
    assert [guess.label for guess in by_text] == list(TEXTS)
    assert found.guesses[0].label == "a photo of the digit seven"


def test_an_artifact_finds_the_text_tower_beside_it(towers: Workspace, digit: Path) -> None:
    artifact = towers.graph(EMBEDDER, "fp16")
    found = predict_images(Workspace("nowhere"), None, digit, artifact, texts=TEXTS[:2])
    assert (found.artifact, found.text_artifact) == (
        str(artifact),
        str(towers.graph(EMBEDDER, "fp32", "text")),
    )


def test_a_long_text_is_cut_with_a_note(towers: Workspace) -> None:
    passport = towers.source(EMBEDDER)[1]
    found = embed_texts(towers.folder(EMBEDDER), passport, ("seven", "seven " * 80))
    assert found.notes == (
        "1 of 2 texts are longer than CLIP's 77 tokens and are cut, the first: " + "seven " * 80,
    )
    assert embed_texts(towers.folder(EMBEDDER), passport, ("seven",)).notes == ()


def test_texts_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("a dog\n\n  ein Hund \n", encoding="utf-8")
    assert read_texts(path) == ("a dog", "ein Hund")
    for text, message in (("", "there are no texts"), ("a\nb\na\n", "2 texts are 'a'")):
        path.write_text(text)
        with pytest.raises(ClipdeployError, match=message):
            read_texts(path)
    with pytest.raises(ClipdeployError, match="is no file"):
        read_texts(tmp_path / "gone.txt")


def without_text_tower(workspace: Workspace) -> None:
    for path in workspace.folder(EMBEDDER).glob("text-*"):
        path.unlink()


FAULTS: dict[str, tuple[Callable[[Workspace], object], tuple[str, ...], str, str]] = {
    "no texts": (lambda w: None, (), "gives embeddings, not classes", "--texts FILE or --text"),
    "a text twice": (lambda w: None, ("a", "a"), "2 texts are 'a'", "once"),
    "an empty text": (lambda w: None, ("a", " "), "one is empty", "one text a line"),
    "no text tower": (
        without_text_tower,
        TEXTS,
        "the text tower of .* has not been exported",
        f"clipdeploy export --model {EMBEDDER} --text-tower",
    ),
    "another tokenizer": (
        lambda w: restamp(
            w.graph(EMBEDDER, "fp32", "text"), put("settings.tokenizer_sha256", "0" * 64)
        ),
        TEXTS,
        "another tokenizer",
        "--text-tower --force",
    ),
    "an image tower under its name": (
        lambda w: shutil.copy(w.graph(EMBEDDER, "fp32"), w.graph(EMBEDDER, "fp32", "text")),
        TEXTS,
        "is no text tower",
        "is a text tower",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, copied_towers: Workspace, digit: Path) -> None:
    change, texts, message, hint = FAULTS[fault]
    change(copied_towers)
    with pytest.raises(ClipdeployError, match=message) as caught:
        predict_images(copied_towers, EMBEDDER, digit, texts=texts)
    assert hint in caught.value.hint


def test_a_classifier_takes_no_texts(demo_workspace: Workspace, digit: Path) -> None:
    with pytest.raises(ClipdeployError, match="gives logits of its classes"):
        predict_images(demo_workspace, cards.DEMO, digit, texts=TEXTS)


def test_a_text_tower_takes_no_images(towers: Workspace, digit: Path) -> None:
    artifact = towers.graph(EMBEDDER, "fp32", "text")
    with pytest.raises(ClipdeployError, match="takes token ids, not images"):
        predict_images(towers, EMBEDDER, digit, artifact, texts=TEXTS)
