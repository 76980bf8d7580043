"""Chooses the names of a model's classes, in the order of its logits.

source       names
file         those of the file given with --class-names
checkpoint   those stored in the checkpoint
card         those of the model card, for published and for random weights
assumed      those of the model card, for other weights with as many classes; with a note
(empty)      none, for any other number of classes; folders or labels name them in `verify`
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
    """The names, their source, and a sentence if they may be wrong, else an empty one."""

    names: tuple[str, ...] = ()
    source: NamesFrom = ""
    doubt: str = ""


def name_classes(
    model: LoadedModel, weights: WeightsChoice, before: Passport | None = None
) -> ClassNames:
    """The names of the model's classes; ``before`` is the passport of the existing graph.

    Names from a file are kept as long as the weights are the same.

    Raises:
        FileError, DatasetError: the file cannot be read, or its names do not fit the model.
        CheckpointError: the checkpoint has another number of class names than its head has classes.
    """
    card, count = model.card, model.module.config.classes
    if card.embedding is not None:
        return ClassNames()
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
            doubt=f"the {count} classes of this checkpoint have no names: verify takes those of "
            "folders or labels, predict and packages use numbers; pass --class-names FILE"
        )
    return ClassNames(
        own,
        "assumed",
        f"the checkpoint does not name its {count} classes: those of {card.name} are assumed "
        f"({own[0]}, {own[1]}, ...); if that is wrong, pass --class-names FILE",
    )


def _of_checkpoint(model: LoadedModel, count: int) -> tuple[str, ...]:
    path = model.weights.path
    try:
        names = names_from(model.class_names, cards.class_names(model.card))
    except NamesError as error:
        raise CheckpointError(
            f"the class names in {path} cannot be used: {error}",
            hint="pass the names in the order of the logits with --class-names FILE",
        ) from error
    if len(names) != count:
        raise CheckpointError(
            f"{path} names {len(names)} classes, its head has {count}",
            hint="pass the names in the order of the logits with --class-names FILE",
        )
    return names
