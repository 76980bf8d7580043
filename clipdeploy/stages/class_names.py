"""Whose names the classes of a model have, in the order of its logits.

file         the user's, --class-names
checkpoint   of the data set that it was trained on, where the file holds them
card         of the published weights, and of random ones
assumed      the card's, for a checkpoint of somebody's own with as many classes: said aloud
(nobody)     any other number of classes; folders or labels name them when images are judged
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.passport import NamesFrom, Passport
from clipdeploy.imaging.classes import NamesError, names_from, read_class_names
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel, WeightsChoice
from clipdeploy.workspace.passports import is_published

__all__ = ["ClassNames", "name_classes"]


@dataclass(frozen=True)
class ClassNames:
    """The names, who gave them, and what may be wrong with that, as a sentence or empty."""

    names: tuple[str, ...] = ()
    source: NamesFrom = ""
    doubt: str = ""


def name_classes(
    model: LoadedModel, weights: WeightsChoice, before: Passport | None = None
) -> ClassNames:
    """The names of the model's classes; ``before`` is the passport of the graph that is there.

    Names that the user gave once are kept with the same weights.

    Raises:
        FileError, DatasetError: the user's file cannot be read, or has other names or numbers.
        CheckpointError: the checkpoint names another number of classes than its head has.
    """
    card, count = model.card, model.module.config.classes
    if weights.class_names is not None:
        names = read_class_names(Path(weights.class_names), count, cards.class_names(card))
        return ClassNames(names, "file")
    kept = before is not None and before.weights.identity == model.weights.identity
    if before and kept and before.class_names_from == "file" and len(before.class_names) == count:
        return ClassNames(before.class_names, "file")
    own = tuple(name for name, _ in cards.class_names(card))
    if is_published(card, model.weights):
        return ClassNames(own, "card") if len(own) == count else ClassNames()
    if model.class_names is not None:
        return ClassNames(_of_checkpoint(model, count), "checkpoint")
    if len(own) != count:
        return ClassNames(
            doubt=f"nobody named the {count} classes of this checkpoint: verify takes the names of "
            "folders or labels, predict and packages number them; name them with --class-names FILE"
        )
    return ClassNames(
        own,
        "assumed",
        f"the checkpoint does not name its {count} classes: those of {card.name} are assumed "
        f"({own[0]}, {own[1]}, ...); if it has others, name them with --class-names FILE",
    )


def _of_checkpoint(model: LoadedModel, count: int) -> tuple[str, ...]:
    path = model.weights.path
    try:
        names = names_from(model.class_names, cards.class_names(model.card))
    except NamesError as error:
        raise CheckpointError(
            f"the class names in {path} cannot be used: {error}",
            hint="name them in the order of the logits: --class-names FILE",
        ) from error
    if len(names) != count:
        raise CheckpointError(
            f"{path} names {len(names)} classes, its head has {count}",
            hint="name them in the order of the logits: --class-names FILE",
        )
    return names
