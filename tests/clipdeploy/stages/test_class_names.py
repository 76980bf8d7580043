from __future__ import annotations

from typing import Any

import pytest
import torch

from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.passport import Recipe, WeightsOrigin
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel, WeightsChoice
from clipdeploy.models.vit import VisionTransformer, ViTConfig
from clipdeploy.stages.class_names import name_classes

CARD = cards.find("clip-vit-base-p32")
KNOWN = cards.class_names(CARD)
WNIDS = tuple(name for name, _ in KNOWN)
LABELS = [label for _, label in KNOWN]


def fine_tune(names: Any, classes: int = 1000) -> LoadedModel:
    """Weights of somebody's own whose checkpoint has these class names."""
    with torch.device("meta"):
        module = VisionTransformer(ViTConfig(patch=32, image_size=224, classes=classes))
    return LoadedModel(CARD, module, WeightsOrigin("file", "own.pth", "a" * 64), Recipe(), names)


def test_the_words_for_imagenets_classes_are_its_wnids() -> None:
    """mmpretrain's checkpoints name classes by words, people's folders are called by wnids."""
    found = name_classes(fine_tune(LABELS), WeightsChoice())
    assert (found.names, found.source) == (WNIDS, "checkpoint")
    # Some lists of the labels differ in a few words, or in how they are written.
    other = [label.replace(" ", "_").upper() for label in LABELS]
    other[7] = "another word"
    assert name_classes(fine_tune(other), WeightsChoice()).names == WNIDS


def test_a_thousand_other_classes_are_not_imagenets() -> None:
    own = [f"breed {number}" for number in range(1000)]
    assert name_classes(fine_tune(own), WeightsChoice()).names == tuple(own)
    # The same words in another order are other classes, of which two have the same name.
    turned = LABELS[1:] + LABELS[:1]
    with pytest.raises(CheckpointError, match="2 classes are named"):
        name_classes(fine_tune(turned), WeightsChoice())
    apart = [f"{label} {number}" for number, label in enumerate(turned)]
    assert name_classes(fine_tune(apart), WeightsChoice()).names[0] == f"{LABELS[1]} 0"


def test_names_that_nobody_gave_are_assumed_aloud_or_missing() -> None:
    found = name_classes(fine_tune(None), WeightsChoice())
    assert (found.names, found.source) == (WNIDS, "assumed")
    assert "does not name its 1000 classes" in found.doubt
    found = name_classes(fine_tune(None, 20), WeightsChoice())
    assert (found.names, found.source) == ((), "")
    assert "nobody named the 20 classes" in found.doubt


@pytest.mark.parametrize("names", ["words", 3, ["a"] * 1000, {"a": "b"}, LABELS[:-1]])
def test_names_of_a_checkpoint_that_cannot_be_are_refused(names: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        name_classes(fine_tune(names), WeightsChoice())
    assert "--class-names" in caught.value.hint
