"""Build the PyTorch reference model from a model card and weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdeploy.core.errors import ArtifactError, CheckpointError, UsageError
from clipdeploy.core.passport import (
    INTERPOLATIONS,
    Embedding,
    ModelChoices,
    Recipe,
    WeightsOrigin,
)
from clipdeploy.core.paths import StrPath
from clipdeploy.core.printable import printable
from clipdeploy.core.spans import HEADS, IMAGE_SIZE, SEED, check_numbers
from clipdeploy.models import cards
from clipdeploy.models.cards import ModelCard
from clipdeploy.models.checkpoints import (
    Checkpoint,
    expected_shapes,
    read_checkpoint,
    resize_position_grid,
    validate,
)
from clipdeploy.models.checkpoints.position import Resampling
from clipdeploy.models.checkpoints.preprocessing import Preprocessing
from clipdeploy.models.clip.embedding import image_tower, text_embedder
from clipdeploy.models.clip.pair import read_pair
from clipdeploy.models.clip.text import TextTower
from clipdeploy.models.vit import VisionTransformer, ViTConfig

__all__ = [
    "LoadedModel",
    "LoadedText",
    "WeightsChoice",
    "ZeroShot",
    "card_for",
    "checkpoint_file",
    "infer_card",
    "load_model",
    "random_tensors",
    "reload_model",
    "reload_text",
]

_TRAINED_EPS = 1e-5
_MMPRETRAIN_EPS = 1e-6
_MMPRETRAIN_IMAGE = 224
# Widths of open_clip's ViT-H, ViT-g and ViT-bigG, whose heads do not have 64 channels: heads.
_HEADS = {1280: 16, 1408: 16, 1664: 16}
_HEAD_WIDTH = 64
# The maximum in training, which CLIP's models reach: openai/CLIP, "Learning Transferable Visual
# Models From Natural Language Supervision", section 2.5.
_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class ZeroShot:
    """Class texts for a zero-shot classifier: ``classes`` and ``templates`` are files or names.

    See :func:`clipdeploy.models.clip.prompts.read_prompts`.
    """

    classes: StrPath
    templates: StrPath = "openai80"


@dataclass(frozen=True)
class WeightsChoice:
    """The weights to use: a checkpoint, random ones, or (by default) the card's published ones.

    Without ``checkpoint`` and ``random_seed``, a model that the workspace has already exported
    keeps its weights.

    Args:
        checkpoint: a file, ``hf://OWNER/NAME`` or ``hf://OWNER/NAME/FILE.index.json``.
        random_seed: the seed of random weights.
        resize_position: resample a position grid of another size.
        offline: forbid downloads.
        show_download: show a progress bar during a download.
        replace: replace the workspace's weights by these, or by the published ones.
        class_names: a file with the checkpoint's class names, see
            :func:`clipdeploy.imaging.classes.read_class_names`.
        choices: what the checkpoint's tensors do not tell.
        heads: the number of attention heads; None takes that of the file, of the card or of CLIP.
        image_size: the edge of the image in pixels; the position grid is resampled to it.
        probe: a file with inputs and their logits in the user's framework, with which the model
            must agree, see :mod:`clipdeploy.models.probe`.
        zero_shot: makes a zero-shot classifier of the checkpoint, which is a CLIP.
        embedding: makes an embedding model of the checkpoint, which is a CLIP.

    Raises:
        UsageError: a number is invalid, or a seed is given with a checkpoint or with choices for
            one.
    """

    checkpoint: StrPath | None = None
    random_seed: int | None = None
    resize_position: bool = False
    offline: bool = False
    show_download: bool = True
    replace: bool = False
    class_names: StrPath | None = None
    choices: ModelChoices = field(default_factory=ModelChoices)
    heads: int | None = None
    image_size: int | None = None
    probe: StrPath | None = None
    zero_shot: ZeroShot | None = None
    embedding: Embedding | None = None

    def __post_init__(self) -> None:
        check_numbers(
            self, random_seed=SEED.or_none, heads=HEADS.or_none, image_size=IMAGE_SIZE.or_none
        )
        if self.checkpoint is not None and self.random_seed is not None:
            raise UsageError(
                "a checkpoint and random weights cannot be used together", hint="choose one of them"
            )
        if self.random_seed is not None and self.choices != ModelChoices():
            raise UsageError(
                f"{self.choices} would have no effect: random weights have no checkpoint",
                hint="leave the choices or the seed out",
            )

    @property
    def named(self) -> bool:
        """Whether a checkpoint or random weights are given."""
        return self.checkpoint is not None or self.random_seed is not None


@dataclass(frozen=True)
class LoadedModel:
    """The reference model: a float32 module in evaluation mode, and the origin of its weights.

    ``class_names`` are the checkpoint's class names, unparsed; None if it has none.  ``notes`` are
    sentences about the checkpoint for the user.
    """

    card: ModelCard
    module: VisionTransformer
    weights: WeightsOrigin
    recipe: Recipe
    class_names: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedText:
    """CLIP's text tower in evaluation mode, and what multiplies the cosines."""

    module: TextTower
    logit_scale: float


def _recipe_eps(recipe: Recipe) -> float:
    return _TRAINED_EPS if recipe.numerics == "trained" else _MMPRETRAIN_EPS


def _config(card: ModelCard, recipe: Recipe, classes: int) -> ViTConfig:
    return ViTConfig(
        patch=card.patch,
        image_size=card.image_size,
        classes=classes,
        width=card.width,
        depth=card.depth,
        heads=card.heads,
        hidden=card.hidden,
        eps=_recipe_eps(recipe),
        embed=card.embed,
        embedding=card.embedding,
    )


def _checkpoint_config(card: ModelCard, recipe: Recipe, checkpoint: Checkpoint) -> ViTConfig:
    shape, choices = checkpoint.shape, checkpoint.choices
    base = _config(card, recipe, checkpoint.classes or card.classes)
    return replace(
        base,
        eps=base.eps if choices.eps is None else choices.eps,
        gelu=choices.gelu or base.gelu,
        pooling=choices.pooling or base.pooling,
        # The published checkpoints' architecture; other geometries may have another one.
        pre_norm=shape.pre_norm if card.generic else True,
        final_norm=shape.final_norm,
        fc_norm=shape.fc_norm,
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
            # A zero-shot head has texts' embeddings of length 1, times CLIP's logit scale.
            spread = 1.5 if config.embed is None else _LOGIT_SCALE
            tensors[name] = noise * spread * shape[1] ** -0.5
        else:
            fan_in = noise[0].numel()
            tensors[name] = noise * fan_in**-0.5
    return tensors


def _state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    folded = tensors["pos_embed"].clone()
    folded[:, :1] += tensors["cls_token"]
    renamed = {"position": folded, "patch_embed.weight": tensors["patch_embed.proj.weight"]}
    dropped = ("cls_token", "pos_embed", "patch_embed.proj.weight")
    return renamed | {name: value for name, value in tensors.items() if name not in dropped}


def _assemble(tensors: dict[str, Tensor], config: ViTConfig) -> VisionTransformer:
    with torch.device("meta"):
        module = VisionTransformer(config)
    module.load_state_dict(_state_dict(tensors), assign=True)
    return module.eval().requires_grad_(False)


def _shrinks(card: ModelCard, recipe: Recipe) -> bool:
    # mmpretrain's 384/448 configs do not set img_size: loading shrinks the grid to that of 224
    # pixels, and the forward pass enlarges it again.
    return recipe.numerics == "as-shipped" and card.image_size > _MMPRETRAIN_IMAGE


def _resized(position: Tensor, grids: tuple[int, ...], resampling: Resampling) -> Tensor:
    for grid in grids:
        if position.shape[1] != 1 + grid**2:
            position = resize_position_grid(position, grid, resampling)
    return position


def _grids(card: ModelCard, recipe: Recipe) -> tuple[int, ...]:
    """The grids that a position embedding goes through, the last of which is the model's."""
    shrunk = (_MMPRETRAIN_IMAGE // card.patch,) if _shrinks(card, recipe) else ()
    return (*shrunk, card.image_size // card.patch)


def _fit_position(
    checkpoint: Checkpoint, card: ModelCard, choice: WeightsChoice, recipe: Recipe
) -> tuple[Checkpoint, bool]:
    """The checkpoint with the position grid of ``card``, and whether it had another one."""
    side, grid = checkpoint.shape.grid, card.image_size // card.patch
    if not side:
        return checkpoint, False
    other = side != grid
    if other and not choice.resize_position and choice.image_size is None:
        raise CheckpointError(
            f"{checkpoint.path} has a {side}x{side} position grid, "
            f"but the model has a {grid}x{grid} one",
            hint="leave out --model to use the checkpoint's image size, or pass --resize-pos-embed",
        )
    trained = recipe.numerics == "trained"
    chosen = checkpoint.choices.resampling
    if chosen is not None and not other:
        raise UsageError(
            f"resampling {chosen!r} has no effect: {checkpoint.path} has the model's "
            f"{grid}x{grid} position grid",
            hint="leave out --resampling, or choose another --image-size",
        )
    if chosen == "timm" and not trained:
        raise UsageError(
            "resampling 'timm' has no effect with numerics 'as-shipped', which are mmpretrain's",
            hint="leave out --resampling, or pass --numerics trained",
        )
    resampling: Resampling = chosen or (checkpoint.resampling if trained else "mmpretrain")
    position = _resized(checkpoint.tensors["pos_embed"], _grids(card, recipe), resampling)
    choices = replace(checkpoint.choices, resampling=resampling if other else None)
    tensors = checkpoint.tensors | {"pos_embed": position}
    return replace(checkpoint, tensors=tensors, choices=choices), other


def _with_eps(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with its epsilon, None if that is both the recipe's and its library's."""
    usual = _recipe_eps(recipe)
    default = checkpoint.native_eps if recipe.numerics == "trained" else usual
    given = checkpoint.choices.eps
    eps = given or (None if default == usual else default)
    return replace(checkpoint, choices=replace(checkpoint.choices, eps=eps))


def infer_card(choice: WeightsChoice, preferred: str | None = None) -> ModelCard:
    """The card for the checkpoint of ``choice``: that of its geometry.

    A published checkpoint is recognised by its hash, or by its place in the cache of the Hugging
    Face hub.  Of several cards with the geometry, ``preferred`` is taken, else the one with a short
    name that mmpretrain has measured; if there is none, the geometry's own.  timm's cards differ
    in crop, mean and std, so none of them describes another checkpoint.

    Raises:
        UsageError: ``choice`` has no checkpoint.
        CheckpointError: it cannot be read, or the number of heads is unknown.
    """
    if choice.checkpoint is None:
        raise UsageError("no model is named", hint="name a model, or a checkpoint to infer it from")
    return card_for(_read_file(choice, choice.embedding), choice, preferred)


def card_for(
    checkpoint: Checkpoint, choice: WeightsChoice, preferred: str | None = None
) -> ModelCard:
    """As :func:`infer_card`, for a checkpoint that has been read.

    Raises:
        CheckpointError: the geometry is not complete, or the number of heads is unknown.
    """
    shape = checkpoint.shape
    if not shape.known:
        raise CheckpointError(
            f"{checkpoint.path} has no complete geometry: patches of {shape.patch} px, position "
            f"grid {shape.grid}, width {shape.width}, {shape.depth} blocks, "
            f"{shape.classes} classes",
            hint="save the whole classifier's state dict; patches and position grid must be square",
        )
    size = choice.image_size or shape.image_size
    heads = choice.heads or shape.heads
    fitting = [
        card
        for card in cards.all_cards()
        if (card.patch, card.image_size, card.width, card.depth)
        == (shape.patch, size, shape.width, shape.depth)
        and shape.pre_norm
        and shape.hidden == 4 * shape.width
        and (shape.embed, choice.embedding) == (card.embed, card.embedding)
        and heads in (None, card.heads)
    ]
    published = [
        card
        for card in fitting
        if (card.sha256_prefix and checkpoint.sha256.startswith(card.sha256_prefix))
        or card.is_downloaded(checkpoint.path)
    ]
    usual = [card for card in fitting if card.short and card.measured_by == "mmpretrain"]
    known = [card for card in fitting if card.name == preferred]
    for card in (*published, *known):
        return card
    heads = heads or (usual[0].heads if usual else _clip_heads(checkpoint))
    sizes = (shape.patch, size, shape.width, shape.depth, heads, shape.hidden, shape.embed)
    own = cards.geometry_card(*sizes, choice.embedding)
    return own if own.name == preferred or not usual else usual[0]


def _clip_heads(checkpoint: Checkpoint) -> int:
    width = checkpoint.shape.width
    if width not in _HEADS and width % _HEAD_WIDTH:
        raise CheckpointError(
            f"{checkpoint.path} does not tell its number of heads, and its width {width} is not "
            f"made of heads of {_HEAD_WIDTH} channels as CLIP's",
            hint="pass --heads COUNT",
        )
    return _HEADS.get(width, width // _HEAD_WIDTH)


def load_model(card: ModelCard, choice: WeightsChoice, recipe: Recipe) -> LoadedModel:
    """Build the reference model of ``card``.

    Raises:
        CheckpointError: the weights cannot be downloaded or read, or do not fit the card.
        UsageError: the heads or the image size of ``choice`` are not the card's, or a resampling
            is chosen that would have no effect.
        FileError: the checkpoint file cannot be opened.
    """
    _check_choice(card, choice)
    if choice.random_seed is not None:
        config = _config(card, recipe, card.classes)
        tensors = random_tensors(config, choice.random_seed)
        position = _resized(tensors["pos_embed"], _grids(card, recipe), "mmpretrain")
        module = _assemble(tensors | {"pos_embed": position}, config)
        return LoadedModel(card, module, WeightsOrigin("random", seed=choice.random_seed), recipe)
    read = _read(card, choice)
    recipe = _own_recipe(card, recipe, read.preprocessing)
    read = _with_eps(read, recipe)
    checkpoint, resized = _fit_position(read, card, choice, recipe)
    config = _checkpoint_config(card, recipe, checkpoint)
    _check_heads(checkpoint, card)
    validate(checkpoint, config, card.name)
    origin = WeightsOrigin(
        "file",
        str(checkpoint.path.absolute()),
        checkpoint.sha256,
        layout=checkpoint.layout,
        resized_position=resized,
        choices=checkpoint.choices,
        zero_shot=checkpoint.zero_shot,
    )
    module = _assemble(checkpoint.tensors, config)
    notes = checkpoint.notes
    if choice.checkpoint is not None:
        notes = (*notes, _preprocessing_note(card, recipe, checkpoint))
    return LoadedModel(card, module, origin, recipe, checkpoint.class_names, notes)


def _own_recipe(card: ModelCard, recipe: Recipe, stated: Preprocessing | None) -> Recipe:
    """The recipe with what the checkpoint's configuration states, where the caller states nothing.

    Values that follow from the recipe anyway are left out.

    Raises:
        CheckpointError: the configuration states a value out of range, or an interpolation that is
            not supported.
    """
    if stated is None:
        return recipe
    resize = stated.interpolation
    if recipe.interpolation is None and resize is not None and resize not in INTERPOLATIONS:
        raise CheckpointError(
            f"{stated.source} states the interpolation {printable(resize)!r}, which is not "
            "supported",
            hint=f"pass --interpolation {' or '.join(INTERPOLATIONS)}, the one that is closer",
        )
    usual = card.preprocess(recipe)
    own = {
        name: getattr(stated, name)
        for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")
        if getattr(recipe, name) is None
        and getattr(stated, name) not in (None, getattr(usual, name))
    }
    try:
        return replace(recipe, **own)
    except UsageError as error:
        raise CheckpointError(
            f"{stated.source} states an {error.message}",
            hint="correct it, or pass --mean, --std and --crop-pct",
        ) from error


def _preprocessing_note(card: ModelCard, recipe: Recipe, checkpoint: Checkpoint) -> str:
    made, stated = card.preprocess(recipe), checkpoint.preprocessing
    resize = "both edges" if made.crop_mode == "squash" else "short edge"
    mean, std = (", ".join(f"{value:.4g}" for value in triple) for triple in (made.mean, made.std))
    source = "assumed" if stated is None else f"from {stated.source}"
    text = (
        f"preprocessing, {source}: mean {mean}, std {std}, {resize} "
        f"{int(made.size / made.crop_pct)} ({made.interpolation}), crop {made.size}"
    )
    other = stated and stated.interpolation
    if other and other != made.interpolation:
        text += f"; the configuration states {printable(other)}"
    if checkpoint.layout.startswith("mmpretrain") and recipe.numerics == "trained":
        text += "; fine-tunes made with mmpretrain's present configs need --numerics as-shipped"
    return text


def _check_choice(card: ModelCard, choice: WeightsChoice) -> None:
    for name, option, own in (
        ("heads", choice.heads, card.heads),
        ("image size", choice.image_size, card.image_size),
        ("the output", choice.embedding, card.embedding),
    ):
        if option not in (None, own):
            raise UsageError(
                f"{card.name} has {name} {own or 'logits'}, not {option}",
                hint="leave out the model's name, so that it is inferred from the checkpoint",
            )


def _check_heads(checkpoint: Checkpoint, card: ModelCard) -> None:
    if checkpoint.shape.heads not in (None, card.heads):
        raise CheckpointError(
            f"{checkpoint.path} has {checkpoint.shape.heads} heads according to config.json, "
            f"{card.name} has {card.heads}",
            hint="leave out --model to infer the geometry",
        )


def checkpoint_file(choice: WeightsChoice) -> Path:
    """The path of the checkpoint of ``choice``, which is downloaded if it is on a hub.

    Raises:
        UsageError: ``choice`` has none.
        CheckpointError: it cannot be downloaded.
    """
    from clipdeploy.models.download import fetch_hub

    chosen = choice.checkpoint
    if chosen is None:
        raise UsageError("no checkpoint is given", hint="pass a file or hf://OWNER/NAME")
    if isinstance(chosen, str) and chosen.startswith(cards.HUB_PREFIX):
        chosen = fetch_hub(
            chosen,
            both_towers=choice.zero_shot is not None or choice.embedding is not None,
            offline=choice.offline,
            progress=choice.show_download,
        )
    return Path(chosen)


def _read_file(choice: WeightsChoice, embedding: Embedding | None) -> Checkpoint:
    path = checkpoint_file(choice)
    if embedding is None:
        return read_checkpoint(path, choice.choices)
    return image_tower(read_pair(path, choice.choices), embedding)


def _read(card: ModelCard, choice: WeightsChoice) -> Checkpoint:
    from clipdeploy.models.download import fetch

    if choice.checkpoint is not None:
        return _read_file(choice, card.embedding)
    if card.name == cards.DEMO:
        return read_checkpoint(cards.demo_file("weights.safetensors"), choice.choices)
    path = fetch(card, offline=choice.offline, progress=choice.show_download)
    checkpoint = read_checkpoint(path, choice.choices)
    if not checkpoint.sha256.startswith(card.sha256_prefix):
        raise CheckpointError(
            f"{checkpoint.path} is not the published file: its SHA-256 starts with "
            f"{checkpoint.sha256[:8]}, not {card.sha256_prefix}",
            hint="the cached file is damaged: delete it and run again",
        )
    return checkpoint


def reload_model(
    card: ModelCard, weights: WeightsOrigin, recipe: Recipe, *, complete: bool = True
) -> LoadedModel:
    """Build the model of an artifact again from its passport's weights and recipe.

    ``complete`` says that ``recipe`` is the artifact's; otherwise the configuration beside the
    checkpoint completes it, as in :func:`load_model`, and epsilon and position grid follow from it
    where they were not chosen.

    Raises:
        ArtifactError: the checkpoint is missing or has changed, or is read in another way than
            when the artifact was made.
    """
    if weights.kind == "random":
        return load_model(card, WeightsChoice(random_seed=weights.seed), recipe)
    path = _origin_file(weights)
    choices = weights.choices
    if weights.resized_position:
        chosen = choices.resampling if recipe.numerics == "trained" else None
        choices = replace(choices, resampling=chosen or "mmpretrain")
    choice = WeightsChoice(path, resize_position=weights.resized_position, choices=choices)
    model = load_model(card, choice, recipe)
    _check_unchanged(path, model.weights.sha256, weights)
    if _reading(model.weights, complete=complete) != _reading(weights, complete=complete):
        raise ArtifactError(
            f"this version reads {path} in another way than the one that made the artifact: "
            f"{model.weights.description}; it was {weights.description}",
            hint="export it again with --checkpoint and --replace-weights; --ema, --no-ema, "
            "--gelu, --pooling and --layernorm-eps choose how it is read",
        )
    return replace(model, recipe=recipe) if complete else model


def _origin_file(weights: WeightsOrigin) -> Path:
    path = Path(weights.path)
    if not path.is_file():
        raise ArtifactError(
            f"the checkpoint of this artifact does not exist: {path}",
            hint="restore it, or export it from its new place with --checkpoint FILE",
        )
    return path


def _check_unchanged(path: Path, sha256: str, weights: WeightsOrigin) -> None:
    if sha256 != weights.sha256:
        raise ArtifactError(
            f"{path} has changed since the artifact was made from it",
            hint="restore it, or export the new one with --checkpoint and --replace-weights",
        )


def reload_text(weights: WeightsOrigin, embedding: Embedding) -> LoadedText:
    """Build the text tower of the CLIP that an embedding model was made from.

    Raises:
        UsageError: the weights are random, and so of an image tower alone.
        ArtifactError: the checkpoint is missing or has changed.
        CheckpointError, FileError: see :func:`clipdeploy.models.clip.pair.read_pair`.
    """
    if weights.kind == "random":
        raise UsageError(
            f"{weights.description}, have no text tower", hint="export CLIP with --checkpoint FILE"
        )
    path = _origin_file(weights)
    pair = read_pair(path, replace(weights.choices, pooling=None, resampling=None))
    _check_unchanged(path, pair.image.sha256, weights)
    return LoadedText(text_embedder(pair, embedding), pair.logit_scale)


def _reading(weights: WeightsOrigin, *, complete: bool) -> str:
    """The identity; not ``complete``, without the choices that follow from the recipe."""
    choices = replace(weights.choices, eps=None, resampling=None)
    return (weights if complete else replace(weights, choices=choices)).identity
