"""Read a checkpoint file into a state dict with timm's names, and check every tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from clipdeploy.core.errors import CheckpointError, UsageError, first_line
from clipdeploy.core.passport import ModelChoices, ZeroShotOrigin
from clipdeploy.core.values import first_fault
from clipdeploy.models.checkpoints.archive import Archive, read_archive
from clipdeploy.models.checkpoints.canonical import canonical, is_square
from clipdeploy.models.checkpoints.foreign import listed
from clipdeploy.models.checkpoints.layouts.layout import Pooling
from clipdeploy.models.checkpoints.preprocessing import (
    STATED,
    Preprocessing,
    stated_preprocessing,
)
from clipdeploy.models.checkpoints.select import FoundModel, select_model
from clipdeploy.models.checkpoints.stated import Stated, stated_by
from clipdeploy.models.clips import PublishedClip, clip_of_file
from clipdeploy.models.vit import ViTConfig

__all__ = ["Checkpoint", "Shape", "expected_shapes", "read_checkpoint", "read_tower", "validate"]

StateDict = dict[str, Tensor]

# Keys of mmengine (dataset_meta), mmcv, torchvision and Hugging Face.
_CLASS_KEYS = ("classes", "CLASSES", "class_names", "class_to_idx", "id2label", "idx_to_class")
_UNNAMED = re.compile(r"LABEL_\d+")
# Numbers that only OpenAI's archives contain, whose models all use QuickGELU (openai/CLIP model.py,
# build_model).
_OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})
# Whole numbers that a CLIP's file may contain.
_COUNTS = _OPENAI | {"position_ids"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Shape:
    """A model's geometry, from its tensors; None or 0 for what they do not tell.

    ``grid`` is the number of patches along a side of the position grid, ``hidden`` the MLP's width,
    ``embed`` that of the embedding that a zero-shot head reads, or that is the output; None for
    other heads.
    """

    width: int = 0
    depth: int = 0
    patch: int = 0
    grid: int = 0
    hidden: int = 0
    classes: int = 0
    heads: int | None = None
    pre_norm: bool = True
    final_norm: bool = True
    fc_norm: bool = False
    embed: int | None = None

    @property
    def known(self) -> bool:
        """Whether all sizes are known."""
        return all((self.width, self.depth, self.patch, self.grid, self.hidden, self.classes))

    @property
    def image_size(self) -> int:
        """Pixels of the image's edge for the position grid."""
        return self.grid * self.patch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file's tensors, float32, in the form of :mod:`.canonical`.

    ``choices`` are those that the caller, the file or the layout made.  ``class_names`` are the
    file's class names, unparsed; None if it has none.  ``notes`` say what the user should know.
    """

    path: Path
    sha256: str
    layout: str
    tensors: StateDict
    class_names: Any = None
    choices: ModelChoices = field(default_factory=ModelChoices)
    shape: Shape = field(default_factory=Shape)
    notes: tuple[str, ...] = ()
    eps: tuple[float, float] = (1e-5, 1e-6)
    resampling: Literal["timm", "mmpretrain"] = "mmpretrain"
    preprocessing: Preprocessing | None = None
    zero_shot: ZeroShotOrigin | None = None

    @property
    def classes(self) -> int | None:
        """The number of classes of the head, None if it has no valid head."""
        return self.shape.classes or None

    @property
    def native_eps(self) -> float:
        """LayerNorm's epsilon of the library that trained such a model."""
        return self.eps[0] if self.shape.pre_norm else self.eps[1]


def expected_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """timm name -> shape of every tensor in a checkpoint of this geometry."""
    width, hidden = config.width, config.mlp_width
    norms = {"norm_pre": config.pre_norm, "norm": config.final_norm, "fc_norm": config.fc_norm}
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, config.tokens, width),
        "patch_embed.proj.weight": (width, 3, config.patch, config.patch),
    }
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    names = [name for name, present in norms.items() if present]
    for index in range(config.depth):
        names += [f"blocks.{index}.norm1", f"blocks.{index}.norm2"]
        for name, shape in linears.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    for name in names:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    features = config.embed or width
    if config.embed is not None:
        shapes["embed.weight"] = (config.embed, width)
    if config.embedding is not None:
        return shapes
    return shapes | {"head.weight": (config.classes, features), "head.bias": (config.classes,)}


def read_checkpoint(path: Path, choices: ModelChoices = ModelChoices()) -> Checkpoint:
    """Read a checkpoint file in any of the formats and layouts of this package.

    Raises:
        FileError: the file does not exist or cannot be opened.
        CheckpointError: it is truncated, has an unknown layout or architecture, needs a choice, or
            contains other tensors than dense float32, float16, bfloat16 or float64.
    """
    archive = read_archive(path)
    return _checkpoint(
        archive, select_model(archive.loaded, archive.path, choices.averaged), choices
    )


def read_tower(
    path: Path, choices: ModelChoices = ModelChoices()
) -> tuple[Checkpoint, dict[str, Tensor], Mapping[str, Any]]:
    """Read CLIP's image tower, which has no head and is read at the class token.

    Returns it, the other tensors of the file, float32, of any shape, under their own names, and the
    configuration beside the file.  What neither tensors nor configuration tell about a published
    CLIP is that of its row in ``data/clips.csv``.

    Raises:
        FileError, CheckpointError: see :func:`read_checkpoint`; or the file is a classifier.
    """
    archive = read_archive(path)
    found = select_model(archive.loaded, archive.path, choices.averaged, tower=True)
    published = clip_of_file(archive.path, archive.sha256)
    if (
        choices.gelu is None
        and stated_by(found.layout, archive.config, archive.loaded).gelu is None
    ):
        names = {name.rpartition(".")[2] for name in found.beside}
        usual = published.gelu if published else None
        choices = replace(choices, gelu="quick" if names >= _OPENAI else usual)
    made = _checkpoint(archive, found, replace(choices, pooling="token"))
    if made.preprocessing is None and published:
        made = replace(made, preprocessing=_preprocessing_of(published))
    beside = {
        name: value
        for name, value in found.beside.items()
        if name.rpartition(".")[2] not in _COUNTS
    }
    _refuse_unsupported(beside, archive.path)
    return made, {name: value.float() for name, value in beside.items()}, archive.config


def _preprocessing_of(clip: PublishedClip) -> Preprocessing:
    mean, std = clip.mean_std
    return Preprocessing(f"the row of {clip.name}", mean, std, 1.0, "center", "bicubic")


def _checkpoint(archive: Archive, found: FoundModel, choices: ModelChoices) -> Checkpoint:
    path = archive.path
    declared = {n: v for n, v in found.inside.items() if n.startswith(STATED)}
    _refuse_unsupported(found.tensors | declared, path)
    tensors = canonical(found.tensors)
    tensors |= {name: torch.empty(0) for name in found.unknown}
    stated = stated_by(found.layout, archive.config, archive.loaded)
    made = _made(found, stated, tensors, choices, path)
    unread = made.pooling == "avg" and not found.layout.final_norm
    _drop_unread_norm(tensors, made, unread=unread)
    shape = _shape(tensors)
    shape = replace(shape, heads=stated.heads, final_norm=shape.final_norm and not unread)
    nested = "nested" if found.nested else "flat"
    weights = {None: "", True: ", averaged weights", False: ", without averaging"}[found.averaged]
    return Checkpoint(
        path,
        archive.sha256,
        f"{found.layout.name} ({nested} {archive.kind}{weights})",
        tensors,
        _class_names(archive.loaded, archive.config),
        made,
        shape,
        tuple(_notes(found)),
        found.layout.eps,
        found.layout.resampling,
        stated_preprocessing(archive.config, archive.preprocessor, found.inside),
        _zero_shot(archive) if shape.embed is not None else None,
    )


def _zero_shot(archive: Archive) -> ZeroShotOrigin:
    try:
        origin = msgspec.convert(archive.config.get("zero_shot"), ZeroShotOrigin)
        fault = str(first_fault(origin) or "")
    except (msgspec.ValidationError, UsageError) as error:
        fault = first_line(error)
    if fault:
        raise CheckpointError(
            f"{archive.path} does not say what its zero-shot classifier was made from: {fault}",
            hint="create it again with --zero-shot",
        )
    return origin


def _made(
    found: FoundModel, stated: Stated, tensors: StateDict, choices: ModelChoices, path: Path
) -> ModelChoices:
    """The choices, with those of the file and the layout where the caller made none."""
    layout = found.layout
    gelu = choices.gelu or stated.gelu or layout.gelu
    if gelu is None:
        raise CheckpointError(
            f"{path} does not tell which GELU its model uses",
            hint="pass --gelu quick for OpenAI's weights and models named quickgelu, else "
            "--gelu erf",
        )
    by_norm: Pooling | None = "avg" if "fc_norm.weight" in tensors else None
    pooling = choices.pooling or stated.pooling or by_norm or layout.pooling
    eps = choices.eps if choices.eps is not None else stated.eps
    return replace(choices, averaged=found.averaged, gelu=gelu, pooling=pooling, eps=eps)


def _drop_unread_norm(tensors: StateDict, made: ModelChoices, *, unread: bool) -> None:
    if unread:
        tensors.pop("norm.weight", None)
        tensors.pop("norm.bias", None)
        return
    if made.pooling == "token" and "norm.weight" not in tensors:
        # A norm behind the choice of the token is the same as one before it.
        for part in ("weight", "bias"):
            if (value := tensors.pop(f"fc_norm.{part}", None)) is not None:
                tensors[f"norm.{part}"] = value


def _shape(tensors: StateDict) -> Shape:
    patches, position = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    head, fc1 = tensors.get("head.weight"), tensors.get("blocks.0.mlp.fc1.weight")
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    square = patches is not None and patches.ndim == 4 and patches.shape[2] == patches.shape[3]
    rows = position.shape[1] - 1 if position is not None and position.ndim == 3 else 0
    parts = {name.partition(".")[0] for name in tensors}
    return Shape(
        width=patches.shape[0] if patches is not None and patches.ndim else 0,
        depth=max(blocks, default=-1) + 1,
        patch=patches.shape[2] if patches is not None and square else 0,
        grid=round(rows**0.5) if is_square(rows) else 0,
        hidden=fc1.shape[0] if fc1 is not None and fc1.ndim else 0,
        classes=head.shape[0] if head is not None and head.ndim == 2 else 0,
        pre_norm="norm_pre" in parts,
        final_norm="norm" in parts or "fc_norm" not in parts,
        fc_norm="fc_norm" in parts,
        embed=tensors["embed.weight"].shape[0] if "embed.weight" in tensors else None,
    )


def _notes(found: FoundModel) -> list[str]:
    notes = []
    place = found.place or "the file"
    if found.averaged is not None:
        kind = "averaged (EMA) weights" if found.averaged else "weights without averaging"
        other = "--no-ema" if found.averaged else "--ema"
        notes.append(f"weights: the {kind} of {place}; {other} selects the others")
    if found.left_out:
        notes.append(f"not part of the model, left out: {listed(found.left_out)}")
    if found.head:
        notes.append(f"head: {found.head}, on features that are not normalised")
    return notes


def _refuse_unsupported(tensors: Mapping[str, Tensor], path: Path) -> None:
    unsupported = [
        f"{name} is {what}" for name, value in tensors.items() if (what := _unsupported(value))
    ]
    if unsupported:
        raise CheckpointError(
            f"{path} contains tensors that are not dense floating-point: {listed(unsupported)}",
            hint="save the weights as dense float32, float16, bfloat16 or float64; dequantise a "
            "quantised model first",
        )


def _unsupported(tensor: Tensor) -> str:
    """Describe a tensor that cannot be cast to float32 without loss; empty if it can."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized:
        return f"quantised {dtype}"
    if tensor.is_nested:
        return f"a nested tensor of {dtype}"
    if tensor.layout != torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')} {dtype}"
    if tensor.is_meta:
        return f"{dtype} without data (device meta)"
    if tensor.dtype not in _FLOATS:
        return dtype
    # Strides of 0 make a huge shape out of one number, which the cast would allocate.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{dtype} {tuple(tensor.shape)} with only {tensor.untyped_storage().nbytes()} bytes"
    return ""


def _class_names(loaded: Any, config: Mapping[str, Any]) -> Any:
    """The class names in a training checkpoint or config.json, unparsed; None without any."""
    places = [loaded, config]
    for name in ("meta", "dataset_meta", "hyper_parameters"):
        places += [place[name] for place in places if isinstance(place, Mapping) and name in place]
    for place in places:
        for name in _CLASS_KEYS:
            if isinstance(place, Mapping) and (found := place.get(name)):
                # A tensor under such a key is not a list of names.
                named = isinstance(found, Mapping | list | tuple)
                return found if named and not _placeholders(found) else None
    return None


def _placeholders(names: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> bool:
    """Whether these are transformers' names for classes that were not named: LABEL_0 ..."""
    values = names.values() if isinstance(names, Mapping) else names
    return all(isinstance(each, str) and _UNNAMED.fullmatch(each) for each in values)


def validate(checkpoint: Checkpoint, config: ViTConfig, model: str) -> None:
    """Check a checkpoint's tensor names, shapes and values against a geometry.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape or not finite.
    """
    expected = expected_shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing: {listed(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected: {listed(extra)}")
    wrong = [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if wrong:
        problems.append(f"wrong shape: {listed(wrong)}")
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {model}: {'; '.join(problems)}",
            hint="leave out --model to infer the geometry, or pass the one of this checkpoint",
        )
    broken = [name for name, tensor in checkpoint.tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{checkpoint.path} contains NaN or infinite values in {listed(broken)}",
            hint="the training diverged or the file is damaged: use another checkpoint",
        )
