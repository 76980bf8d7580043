"""Loads the weights of a workspace, and keeps them from being replaced by accident.

Published weights are replaced by any checkpoint or seed that is given, because they can be
downloaded again.  The user's checkpoint or seed is replaced only with ``WeightsChoice.replace``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from clipdeploy.core.errors import ArtifactError, FileError, UsageError
from clipdeploy.core.passport import Precision, Recipe, WeightsOrigin
from clipdeploy.models import cards
from clipdeploy.models.cards import ModelCard
from clipdeploy.models.load import (
    LoadedModel,
    WeightsChoice,
    infer_card,
    load_model,
    reload_model,
)
from clipdeploy.workspace.folder import PRECISIONS, Workspace
from clipdeploy.workspace.passports import is_published
from exporters.headers import read_passport

__all__ = ["chosen_card", "load_weights", "own_weights"]

_GRAPHS: tuple[Precision, ...] = (*PRECISIONS, "int8-cpu")


def chosen_card(
    workspace: Workspace,
    name: str | None,
    choice: WeightsChoice,
    note: Callable[[str], object],
) -> ModelCard:
    """The card called ``name``; if that is None, the one of the checkpoint's geometry, with a note.

    Of several cards with the geometry, the workspace's last model is preferred.

    Raises:
        UsageError: no card has that name, or there is neither a name nor a checkpoint.
        CheckpointError, FileError: see :func:`clipdeploy.models.load.infer_card`.
    """
    if name is not None:
        return cards.find(name)
    try:
        last: str | None = workspace.last_model()
    except (ArtifactError, FileError, UsageError):
        last = None
    card = infer_card(choice, last)
    note(
        f"model: {card.name} (inferred from {choice.checkpoint}: {card.image_size} px in patches "
        f"of {card.patch}, width {card.width}, {card.depth} blocks, {card.heads} heads)"
    )
    return card


def own_weights(workspace: Workspace, card: ModelCard) -> WeightsOrigin | None:
    """The user's checkpoint or seed that the workspace was exported with; None if there is none.

    Read from the FP32 graph; if that is missing or damaged, from the graphs made from it.
    """
    recorded = next(_recorded(workspace, card), None)
    if recorded is None or _is_replaceable(card, recorded):
        return None
    return recorded


def _recorded(workspace: Workspace, card: ModelCard) -> Iterator[WeightsOrigin]:
    for precision in _GRAPHS:
        try:
            passport = read_passport(workspace.graph(card.name, precision))
        except (ArtifactError, FileError):
            continue
        if passport.model == card.name:
            yield passport.weights


def _is_replaceable(card: ModelCard, weights: WeightsOrigin) -> bool:
    own = weights.kind == "random" or weights.resized_position or weights.choices.identity
    return not own and is_published(card, weights)


def load_weights(
    workspace: Workspace, card: ModelCard, choice: WeightsChoice, recipe: Recipe
) -> LoadedModel:
    """The model with the weights of ``choice``; if it names none, with those of the workspace.

    Raises:
        UsageError: ``choice`` names other weights than the workspace's and does not replace them.
        ArtifactError: the checkpoint of the workspace is missing or has changed.
        CheckpointError, FileError: see :func:`clipdeploy.models.load.load_model`.
    """
    own = own_weights(workspace, card)
    if own is None or choice.replace:
        return load_model(card, choice, recipe)
    if not choice.named:
        return reload_model(card, own, recipe, complete=False)
    model = load_model(card, choice, recipe)
    if model.weights.identity != own.identity:
        raise UsageError(
            f"{workspace.folder(card.name)} was exported with {own.description}, not with "
            f"{model.weights.description}",
            hint="pass --replace-weights to use the new ones, or another --workspace",
        )
    return model
