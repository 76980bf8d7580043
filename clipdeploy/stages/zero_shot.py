"""Makes the zero-shot classifier that the other stages use as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from clipdeploy.core.errors import CheckpointError, FileError, UsageError
from clipdeploy.core.passport import ModelChoices
from clipdeploy.core.printable import printable
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.models import cards
from clipdeploy.models.cards import ModelCard
from clipdeploy.models.checkpoints import read_checkpoint
from clipdeploy.models.clip.pair import ClipPair, read_pair
from clipdeploy.models.clip.prompts import Prompts, read_prompts
from clipdeploy.models.clip.zero_shot import write_zero_shot, zero_shot_origin
from clipdeploy.models.load import WeightsChoice, card_for, checkpoint_file
from clipdeploy.stages.weights import chosen_card
from clipdeploy.workspace.folder import Workspace

__all__ = ["prepare_weights"]


def prepare_weights(
    workspace: Workspace,
    name: str | None,
    choice: WeightsChoice,
    note: Callable[[str], object],
    progress: Progress = SILENT,
) -> tuple[ModelCard, WeightsChoice]:
    """The card and the weights to load; a zero-shot classifier is written into the workspace first.

    For a zero-shot classifier or an embedding model, CLIP is ``choice.checkpoint``, or the
    repository ``name`` (``OWNER/NAME``) of the Hugging Face hub.  The classifier is written again
    only if CLIP, the texts or the templates have changed.

    Raises:
        UsageError: there is no CLIP for ``choice.zero_shot``, or its texts are invalid.
        CheckpointError, FileError: see :func:`clipdeploy.models.clip.pair.read_pair`.
    """
    wanted = choice.zero_shot
    if choice.embedding is not None:
        name, choice = _embedding_source(name, choice)
    if wanted is None:
        return chosen_card(workspace, name, choice, note), choice
    name, choice = _with_source(name, choice)
    prompts = read_prompts(wanted.classes, wanted.templates)
    source = checkpoint_file(choice)
    with progress.task(f"read {source.name}"):
        pair = _with_classes(read_pair(source, choice.choices), prompts)
    card = card_for(pair.image, choice)
    if name is not None and cards.find(name).name != card.name:
        raise UsageError(
            f"{source} makes the model {card.name}, not {name}", hint="leave the model's name out"
        )
    note(f"model: {card.name} (inferred from {source}: a zero-shot classifier)")
    made = workspace.zero_shot(card.name)
    if not _is_made(made, pair, prompts):
        # Written only if export may use it: the graph's reference must not change below it.
        if made.exists() and not choice.replace:
            raise UsageError(
                f"{made} was made with another checkpoint, other texts or other templates",
                hint="pass --replace-weights to make it again, or another --workspace",
            )
        _write(made, pair, prompts, card, note, progress)
    own = replace(choice, checkpoint=made, zero_shot=None, heads=None)
    return card, replace(own, choices=ModelChoices(resampling=choice.choices.resampling))


def _with_source(name: str | None, choice: WeightsChoice) -> tuple[str | None, WeightsChoice]:
    """The model's name and the choice, with the checkpoint that the name stands for."""
    if choice.class_names is not None:
        raise UsageError(
            "a zero-shot classifier is named by its class texts",
            hint="leave the class names out, or write them before the texts, with a tab between",
        )
    if choice.checkpoint is not None:
        return name, choice
    if name is None or "/" not in name:
        raise _no_clip("a zero-shot classifier")
    return None, replace(choice, checkpoint=cards.HUB_PREFIX + name)


def _embedding_source(name: str | None, choice: WeightsChoice) -> tuple[str | None, WeightsChoice]:
    """As :func:`_with_source`; ``name`` may also be that of an embedding model."""
    if choice.class_names is not None:
        raise UsageError(
            "an embedding model has no classes", hint="leave out the class names or --embeddings"
        )
    if choice.named:
        return name, choice
    if name is None:
        raise _no_clip("an embedding model")
    if "/" in name:
        return None, replace(choice, checkpoint=cards.HUB_PREFIX + name)
    return name, choice


def _no_clip(what: str) -> UsageError:
    return UsageError(
        f"{what} needs the checkpoint of a CLIP",
        hint="pass --checkpoint FILE, or --model OWNER/NAME of the Hugging Face hub",
    )


def _with_classes(pair: ClipPair, prompts: Prompts) -> ClipPair:
    shape = replace(pair.image.shape, classes=len(prompts.names))
    return replace(pair, image=replace(pair.image, shape=shape))


def _is_made(path: Path, pair: ClipPair, prompts: Prompts) -> bool:
    try:
        return path.exists() and read_checkpoint(path).zero_shot == zero_shot_origin(pair, prompts)
    except (CheckpointError, FileError):
        return False


def _write(
    path: Path,
    pair: ClipPair,
    prompts: Prompts,
    card: ModelCard,
    note: Callable[[str], object],
    progress: Progress,
) -> None:
    count = sum(map(len, prompts.texts)) * len(prompts.templates)
    with progress.task(f"embed {count} prompts", count) as advance:
        cut = write_zero_shot(pair, prompts, card, path, zero_shot_origin(pair, prompts), advance)
    if cut:
        note(
            f"{len(cut)} of {count} prompts are longer than CLIP's 77 tokens and are cut, "
            f"the first: {printable(cut[0])}"
        )
