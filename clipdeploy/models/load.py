"""Build the PyTorch reference model from a model card and weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdeploy.core.errors import ArtifactError, CheckpointError, UsageError
from clipdeploy.core.passport import Recipe, WeightsOrigin
from clipdeploy.core.paths import StrPath
from clipdeploy.core.spans import SEED, check_numbers
from clipdeploy.models import cards
from clipdeploy.models.cards import ModelCard
from clipdeploy.models.checkpoints import (
    Checkpoint,
    expected_shapes,
    read_checkpoint,
    resize_position_grid,
    validate,
)
from clipdeploy.models.vit import VisionTransformer, ViTConfig

__all__ = ["LoadedModel", "WeightsChoice", "load_model", "random_tensors", "reload_model"]

_TRAINED_EPS = 1e-5
_MMPRETRAIN_EPS = 1e-6
_MMPRETRAIN_IMAGE = 224


@dataclass(frozen=True)
class WeightsChoice:
    """The weights to use: a checkpoint, random ones, or (by default) the card's published ones.

    Without ``checkpoint`` and ``random_seed``, a model that the workspace has already exported
    keeps its weights.

    Args:
        checkpoint: a file or ``hf://OWNER/NAME``.
        random_seed: the seed of random weights.
        resize_position: resample a position grid of another size.
        offline: forbid downloads.
        show_download: show a progress bar during a download.
        replace: replace the workspace's weights by these, or by the published ones.
        class_names: a file with the checkpoint's class names, see
            :func:`clipdeploy.imaging.classes.read_class_names`.

    Raises:
        UsageError: the seed is invalid, or both a checkpoint and a seed are given.
    """

    checkpoint: StrPath | None = None
    random_seed: int | None = None
    resize_position: bool = False
    offline: bool = False
    show_download: bool = True
    replace: bool = False
    class_names: StrPath | None = None

    def __post_init__(self) -> None:
        check_numbers(self, random_seed=SEED.or_none)
        if self.checkpoint is not None and self.random_seed is not None:
            raise UsageError(
                "a checkpoint and random weights cannot be used together", hint="choose one of them"
            )

    @property
    def named(self) -> bool:
        """Whether a checkpoint or random weights are given."""
        return self.checkpoint is not None or self.random_seed is not None


@dataclass(frozen=True)
class LoadedModel:
    """The reference model: a float32 module in evaluation mode, and the origin of its weights.

    ``class_names`` are the checkpoint's class names, unparsed; None if it has none.
    """

    card: ModelCard
    module: VisionTransformer
    weights: WeightsOrigin
    recipe: Recipe
    class_names: Any = None


def _config(card: ModelCard, recipe: Recipe, classes: int) -> ViTConfig:
    return ViTConfig(
        patch=card.patch,
        image_size=card.image_size,
        classes=classes,
        width=card.width,
        depth=card.depth,
        heads=card.heads,
        eps=_TRAINED_EPS if recipe.numerics == "trained" else _MMPRETRAIN_EPS,
    )


def random_tensors(config: ViTConfig, seed: int) -> dict[str, Tensor]:
    """Random weights on the scale of trained ones, reproducible by seed on every machine.

    Returns float32 tensors with the names and shapes of
    :func:`~clipdeploy.models.checkpoints.expected_shapes`.

    Linear weights are normal with standard deviation fan_in ** -0.5, norm gains vary around 1 and
    biases around 0.  So the logits' spread (about 1.5) and their sensitivity to errors of GELU,
    LayerNorm and position embedding resemble trained weights, unlike a std-0.02 initialisation.
    """
    tensors = {}
    for name, shape in expected_shapes(config).items():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            tensors[name] = noise * 0.1
        elif "norm" in name:
            tensors[name] = 1 + noise * 0.2
        elif name in ("cls_token", "pos_embed"):
            tensors[name] = noise * 0.3
        elif name == "head.weight":
            tensors[name] = noise * 1.5 * shape[1] ** -0.5
        else:
            fan_in = noise[0].numel()
            tensors[name] = noise * fan_in**-0.5
    return tensors


def _state_dict(tensors: dict[str, Tensor], card: ModelCard, recipe: Recipe) -> dict[str, Tensor]:
    position = tensors["pos_embed"]
    trained_grid = _MMPRETRAIN_IMAGE // card.patch
    grid = card.image_size // card.patch
    if recipe.numerics == "as-shipped" and card.image_size > _MMPRETRAIN_IMAGE:
        # mmpretrain's 384/448 configs do not set img_size: loading shrinks the grid, and the
        # forward pass enlarges it again.
        position = resize_position_grid(resize_position_grid(position, trained_grid), grid)
    folded = position.clone()
    folded[:, :1] += tensors["cls_token"]
    renamed = {"position": folded, "patch_embed.weight": tensors["patch_embed.proj.weight"]}
    dropped = ("cls_token", "pos_embed", "patch_embed.proj.weight")
    return renamed | {name: value for name, value in tensors.items() if name not in dropped}


def _assemble(
    tensors: dict[str, Tensor], config: ViTConfig, card: ModelCard, recipe: Recipe
) -> VisionTransformer:
    with torch.device("meta"):
        module = VisionTransformer(config)
    module.load_state_dict(_state_dict(tensors, card, recipe), assign=True)
    return module.eval().requires_grad_(False)


def _fit_position(checkpoint: Checkpoint, config: ViTConfig, choice: WeightsChoice) -> Checkpoint:
    position = checkpoint.tensors.get("pos_embed")
    if position is None or position.ndim != 3 or position.shape[1] == config.tokens:
        return checkpoint
    side = round((position.shape[1] - 1) ** 0.5)
    if side * side + 1 != position.shape[1]:
        return checkpoint
    if not choice.resize_position:
        raise CheckpointError(
            f"{checkpoint.path} has a {side}x{side} position grid, "
            f"but the model has a {config.grid}x{config.grid} one",
            hint="choose the model with the checkpoint's image size, or pass --resize-pos-embed",
        )
    resized = checkpoint.tensors | {"pos_embed": resize_position_grid(position, config.grid)}
    return replace(checkpoint, tensors=resized)


def load_model(card: ModelCard, choice: WeightsChoice, recipe: Recipe) -> LoadedModel:
    """Build the reference model of ``card``.

    Raises:
        CheckpointError: the weights cannot be downloaded or read, or do not fit the card.
        FileError: the checkpoint file cannot be opened.
    """
    if choice.random_seed is not None:
        config = _config(card, recipe, card.classes)
        module = _assemble(random_tensors(config, choice.random_seed), config, card, recipe)
        return LoadedModel(card, module, WeightsOrigin("random", seed=choice.random_seed), recipe)
    read = _read(card, choice)
    config = _config(card, recipe, read.classes or card.classes)
    checkpoint = _fit_position(read, config, choice)
    validate(checkpoint, config, card.name)
    origin = WeightsOrigin(
        "file",
        str(checkpoint.path.absolute()),
        checkpoint.sha256,
        layout=checkpoint.layout,
        resized_position=checkpoint is not read,
    )
    module = _assemble(checkpoint.tensors, config, card, recipe)
    return LoadedModel(card, module, origin, recipe, checkpoint.class_names)


def _read(card: ModelCard, choice: WeightsChoice) -> Checkpoint:
    from clipdeploy.models.download import HUB_PREFIX, fetch, fetch_hub

    chosen = choice.checkpoint
    if isinstance(chosen, str) and chosen.startswith(HUB_PREFIX):
        found = fetch_hub(chosen, offline=choice.offline, progress=choice.show_download)
        return read_checkpoint(found)
    if chosen is not None:
        return read_checkpoint(Path(chosen))
    if card.name == cards.DEMO:
        return read_checkpoint(cards.demo_file("weights.safetensors"))
    checkpoint = read_checkpoint(fetch(card, offline=choice.offline, progress=choice.show_download))
    if not checkpoint.sha256.startswith(card.sha256_prefix):
        raise CheckpointError(
            f"{checkpoint.path} is not the published file: its SHA-256 starts with "
            f"{checkpoint.sha256[:8]}, not {card.sha256_prefix}",
            hint="the cached file is damaged: delete it and run again",
        )
    return checkpoint


def reload_model(card: ModelCard, weights: WeightsOrigin, recipe: Recipe) -> LoadedModel:
    """Build the model of an artifact again from its passport's weights and recipe.

    Raises:
        ArtifactError: the checkpoint is missing or has changed.
    """
    if weights.kind == "random":
        return load_model(card, WeightsChoice(random_seed=weights.seed), recipe)
    path = Path(weights.path)
    if not path.is_file():
        raise ArtifactError(
            f"the checkpoint of this artifact does not exist: {path}",
            hint="restore it, or export it from its new place with --checkpoint FILE",
        )
    choice = WeightsChoice(path, resize_position=weights.resized_position)
    model = load_model(card, choice, recipe)
    if model.weights.sha256 != weights.sha256:
        raise ArtifactError(
            f"{path} has changed since the artifact was made from it",
            hint="restore it, or export the new one with --checkpoint and --replace-weights",
        )
    return model
