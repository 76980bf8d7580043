"""Diagnosis of a missed accuracy: real causes are named, and no cause is invented.

Those that ``test_data_faults`` makes for whole verifications are not made again here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from demo_variants import (
    coloured,
    weights_for_colours,
    weights_for_small_eps,
    write_digits,
)

from clipdeploy.core.passport import IMAGENET_MEAN, IMAGENET_STD, Recipe
from clipdeploy.imaging import ImageFolder, open_images
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel, WeightsChoice, load_model
from clipdeploy.models.vit import VisionTransformer, ViTConfig
from clipdeploy.verification.baseline import check_baseline
from clipdeploy.verification.diagnosis import diagnose
from clipdeploy.verification.records import Answer, ImageId, ImageRecord
from clipdeploy.verification.result import Baseline
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

MISSED = Baseline("missed", "PyTorch misses")
NONE = "none of the usual causes explains it"


@pytest.fixture(autouse=True)
def _small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipdeploy.verification.diagnosis._SAMPLE", 60)


def diagnosed(workspace: Workspace, model: LoadedModel, images: ImageFolder) -> Baseline:
    """The baseline on these images, and its causes even where it is confirmed."""
    passport = read_passport(workspace.graph(cards.DEMO, "fp32"))
    passport = replace(passport, preprocess=model.card.preprocess(model.recipe))
    config = VerifyConfig(batch=50, workers=0)
    results = run_verification(model, passport, (), images, config)
    answers = [record.reference for record in results.records]
    return diagnose(
        check_baseline(answers, results.run_key),
        model,
        passport.preprocess,
        images,
        results.records,
        passport.class_names,
    )


def read(folder: Path) -> ImageFolder:
    return open_images(folder, tuple("0123456789"))


def test_of_a_sound_set_up_nothing_is_blamed(
    demo_workspace: Workspace, demo_model: LoadedModel, tmp_path: Path
) -> None:
    images = read(write_digits(tmp_path, lambda pixels: pixels, 120))
    baseline = diagnosed(demo_workspace, demo_model, images)
    assert baseline.status == "confirmed"
    assert NONE in baseline.sentence
    assert "likely cause" not in baseline.sentence
    # Every one of them was tried, the resize aside, which is the same for this card.
    tried = {cause.what for cause in baseline.causes}
    assert {"ImageNet's mean and std", "red and blue exchanged"} <= tried
    assert "LayerNorm eps and position grid as-shipped" in tried
    assert {"labels counted from 1", "some other order of the classes"} <= tried
    assert not any(what.startswith("resize") for what in tried)
    assert all(cause.gained <= 2 for cause in baseline.causes)


def test_numerics(demo_workspace: Workspace, tmp_path: Path) -> None:
    weights = WeightsChoice(weights_for_small_eps(tmp_path / "weights.safetensors"))
    images = read(write_digits(tmp_path / "digits", lambda pixels: pixels, 120))
    card = cards.find(cards.DEMO)
    baseline = diagnosed(demo_workspace, load_model(card, weights, Recipe()), images)
    assert not baseline
    likely = "likely cause: LayerNorm eps and position grid as-shipped"
    assert likely in baseline.sentence
    assert "--numerics as-shipped" in baseline.sentence
    assert baseline.causes[0].top1 > 95
    assert baseline.causes[0].gained > 50
    assert baseline.causes[0].images == 60
    # And the sentence is true.
    shipped = load_model(card, weights, Recipe(numerics="as-shipped"))
    assert diagnosed(demo_workspace, shipped, images).status == "confirmed"


def test_mean_and_std(demo_workspace: Workspace, tmp_path: Path) -> None:
    path = weights_for_colours(tmp_path / "weights.safetensors", IMAGENET_MEAN, IMAGENET_STD)
    model = load_model(cards.find(cards.DEMO), WeightsChoice(path), Recipe())
    images = read(write_digits(tmp_path / "digits", coloured, 120))
    baseline = diagnosed(demo_workspace, model, images)
    assert not baseline
    assert "likely cause: ImageNet's mean and std" in baseline.sentence


# Labels alone, for models of more classes than there are digits.


def model_of(classes: int, demo_model: LoadedModel) -> LoadedModel:
    config = ViTConfig(patch=4, image_size=8, classes=classes, width=12, depth=1, heads=1)
    return replace(demo_model, module=VisionTransformer(config))


def records(labels: Sequence[int], truth: Sequence[int], classes: int) -> list[ImageRecord]:
    """A model that is always right, and the label given to each image."""
    found = []
    for number, (label, answer) in enumerate(zip(labels, truth, strict=True)):
        top = tuple((answer + i) % classes for i in range(5))
        rank = top.index(label) if label in top else 5
        found.append(
            ImageRecord(
                ImageId(f"{number}.png", f"{number:064x}", "", b""),
                label,
                "",
                1.0,
                Answer(top, rank),
                (),
            )
        )
    return found


TRUTH = [number % 120 for number in range(1200)]
IN_DIGITS = sorted(range(120), key=str)
WORDS = [f"{'zyx'[number % 3]}{number:03d}" for number in range(120)]
IN_WORDS = sorted(range(120), key=WORDS.__getitem__)


def spoilt(order: Sequence[int]) -> list[int]:
    """Labels as positions in ``order``."""
    place = {label: at for at, label in enumerate(order)}
    return [place[label] for label in TRUTH]


@pytest.mark.parametrize(
    ("labels", "likely"),
    [
        ([(label + 1) % 120 for label in TRUTH], "labels counted from 1"),
        ([(label - 1) % 120 for label in TRUTH], "labels one too small"),
        (spoilt(IN_DIGITS), "labels in the order of their digits (0, 1, 10, 100, ...)"),
        (spoilt(IN_WORDS), "labels in the alphabetical order of their words"),
        (
            spoilt(np.random.default_rng(0).permutation(120).tolist()),
            "some other order of the classes",
        ),
    ],
)
def test_orders_of_many_classes(labels: list[int], likely: str, demo_model: LoadedModel) -> None:
    model = model_of(120, demo_model)
    spec = demo_model.card.preprocess(Recipe())
    found = diagnose(MISSED, model, spec, None, records(labels, TRUTH, 120), WORDS)
    assert found.sentence.startswith("PyTorch misses; likely cause: ")
    assert f"likely cause: {likely}, with which it is " in found.sentence
    assert found.causes[0].what == likely
    # Wrapped around at the end, a shift by one loses the label of one class in 120.
    assert found.causes[0].top1 > 99


def test_an_order_that_maps_all_to_one_answer_is_none(demo_model: LoadedModel) -> None:
    """A model that always answers 3 fits an "order of classes" that is not one to one."""
    same = records(TRUTH, [3] * len(TRUTH), 120)
    spec = demo_model.card.preprocess(Recipe())
    found = diagnose(MISSED, model_of(120, demo_model), spec, None, same, WORDS)
    assert NONE in found.sentence


def test_shuffled_labels_have_no_cause(demo_model: LoadedModel) -> None:
    labels = np.random.default_rng(0).permutation(TRUTH).tolist()
    spec = demo_model.card.preprocess(Recipe())
    found = diagnose(
        MISSED, model_of(120, demo_model), spec, None, records(labels, TRUTH, 120), WORDS
    )
    assert NONE in found.sentence
    assert found.status == "missed"


def test_a_class_put_in_the_middle_is_another_order(demo_model: LoadedModel) -> None:
    """Half of the labels are one too large: a shift explains half, the order all of them."""
    labels = [label + (label >= 60) for label in TRUTH]
    labels = [60 if label == 120 else label for label in labels]
    spec = demo_model.card.preprocess(Recipe())
    found = diagnose(
        MISSED, model_of(120, demo_model), spec, None, records(labels, TRUTH, 120), WORDS
    )
    assert "likely cause: some other order of the classes" in found.sentence
