"""The passport of an artifact: what it is and what it was made from.

A passport is JSON in an ONNX graph's metadata, in ``calibration.json``, or in ``*.engine.json``
next to an engine.  Later stages read it, so the user gives each setting once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar

import msgspec

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.core.files import read_regular
from clipdeploy.core.spans import CROP_PCT, EPS, MEAN, STD
from clipdeploy.core.values import (
    MOST_BATCH,
    MOST_CLASSES,
    MOST_EDGE,
    Fault,
    first_fault,
    is_hash,
    is_name,
    unless,
    unless_lines,
)

__all__ = [
    "BATCH_AXIS",
    "CLIP_MEAN",
    "CLIP_STD",
    "CONTEXT",
    "FINDINGS_KEY",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INTERPOLATIONS",
    "LOGIT_SCALE_KEY",
    "PASSPORT_KEY",
    "PASSPORT_SCHEMA",
    "QUANTISED",
    "TOKENIZER_KEY",
    "TOKENS",
    "WEIGHTS_ROLE",
    "ModelChoices",
    "NamesFrom",
    "Passport",
    "Precision",
    "Preprocess",
    "Recipe",
    "ScaleForm",
    "TensorSpec",
    "Tower",
    "WeightsOrigin",
    "ZeroShotOrigin",
    "from_json",
    "read_json",
    "settings_of",
    "to_json",
]

# The name of a symbolic batch axis.
BATCH_AXIS = "batch"
# A text tower's input: its name, and CLIP's number of tokens of a text (openai/CLIP model.py).
TOKENS = "ids"
CONTEXT = 77
# Its settings: what multiplies the cosines, and the SHA-256 of the tokenizer's vocabulary.
LOGIT_SCALE_KEY, TOKENIZER_KEY = "logit_scale", "tokenizer_sha256"
PASSPORT_SCHEMA = 1
PASSPORT_KEY = "clipdeploy.passport"
# The setting of a quantised graph that holds what was found about its calibration, as sentences.
FINDINGS_KEY = "calibration_findings"

# openai/CLIP clip.py `_transform`, and the ImageNet statistics of torchvision's model zoo, for
# samples scaled to 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)

# timm/data/constants.py, IMAGENET_INCEPTION_MEAN and _STD.
INCEPTION_MEAN = (0.5, 0.5, 0.5)
INCEPTION_STD = (0.5, 0.5, 0.5)

# Source of the class names: the model card, the user's file or the checkpoint.  "assumed" are the
# card's names for fine-tuned weights with the same number of classes; empty if there are none.
NamesFrom = Literal["", "card", "file", "checkpoint", "assumed"]
Precision = Literal["fp32", "fp16", "int8", "int8-cpu", "fp8"]
# Precisions whose ranges come from calibration images; the first two have engines.
QUANTISED: tuple[Precision, ...] = ("int8", "fp8", "int8-cpu")
# CLIP's embedding as the output: of length 1, or as the projection gives it.
Embedding = Literal["normalised", "raw"]
# What the output is: a logit for each class, or an embedding.
Task = Literal["classification", "embedding"]
# CLIP's image tower, or any classifier, takes images; its text tower takes token ids.
Tower = Literal["image", "text"]
# How a weight's scales are stored: see calibration/write.py.
ScaleForm = Literal["channel", "ratio", "tensor"]

# The parent that is the file of a graph's weights.
WEIGHTS_ROLE = "weights"

_CROP_MODES = ("center", "squash")
# Of those in configurations of timm and transformers, the ones whose pixels Pillow computes as they
# do: both libraries resize PIL images with it.
INTERPOLATIONS = ("bicubic", "bilinear")
_DTYPES = ("float32", "float16", "bfloat16", "float64", "uint8", "int8", "int32", "int64", "bool")
_MOST_AXES = 8
_AGAIN = "the file is damaged or was edited by hand: create it again"
_NAME = "a name of letters, digits and _.-"


@dataclass(frozen=True)
class Recipe:
    """Numerics and preprocessing of a model.

    ``numerics``: ``trained`` is CLIP's mean/std, the native position grid and LayerNorm eps 1e-5,
    as in training; ``as-shipped`` follows mmpretrain's current configs.  ``resize``: ``published``
    is the crop of the published top-1, ``timm`` that of timm's model card.  The other fields
    replace values of :class:`Preprocess` that would follow from these two; None replaces nothing.

    Raises:
        UsageError: a replacement is out of range.
    """

    numerics: Literal["trained", "as-shipped"] = "trained"
    resize: Literal["published", "timm"] = "published"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash"] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise UsageError(
                f"the interpolation {self.interpolation!r} is not supported",
                hint=f"choose {' or '.join(INTERPOLATIONS)}",
            )
        crop_pct = 1.0 if self.crop_pct is None else self.crop_pct
        made = Preprocess(1, self.mean or CLIP_MEAN, self.std or CLIP_STD, crop_pct)
        for fault in made.faults():
            raise UsageError(
                f"invalid preprocessing: {fault}",
                hint="mean and std are for samples scaled to 0..1: divide by 255 those for 0..255",
            )


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of image files, see ``clipdeploy.imaging.preprocess``.

    ``size`` is the edge of the crop in pixels; ``mean`` and ``std`` are per RGB channel for samples
    scaled to 0..1.  The short edge (``center``) or both edges (``squash``) are resized to
    size / crop_pct, with Pillow's ``interpolation`` of uint8 samples.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash"] | str = "center"
    exif_orientation: bool = True
    interpolation: Literal["bicubic", "bilinear"] | str = "bicubic"

    def faults(self) -> Iterator[Fault]:
        """Yield invalid values, see :mod:`clipdeploy.core.values`."""
        edge = 1 <= self.size <= MOST_EDGE
        yield from unless(edge, "size", self.size, f"from 1 to {MOST_EDGE}")
        for index, value in enumerate(self.mean):
            yield from unless(value in MEAN, f"mean[{index}]", value, f"from {MEAN.text}")
        for index, value in enumerate(self.std):
            yield from unless(value in STD, f"std[{index}]", value, f"from {STD.text}")
        crop = self.crop_pct in CROP_PCT
        yield from unless(crop, "crop_pct", self.crop_pct, f"from {CROP_PCT.text}")
        mode = self.crop_mode in _CROP_MODES
        yield from unless(mode, "crop_mode", self.crop_mode, " or ".join(_CROP_MODES))
        known, names = self.interpolation in INTERPOLATIONS, " or ".join(INTERPOLATIONS)
        yield from unless(known, "interpolation", self.interpolation, names)


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: ``TensorSpec("image", "float32", ("batch", 3, 224, 224))``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def faults(self) -> Iterator[Fault]:
        """Yield invalid values, see :mod:`clipdeploy.core.values`."""
        yield from unless(is_name(self.name), "name", self.name, _NAME)
        yield from unless(self.dtype in _DTYPES, "dtype", self.dtype, f"one of {_DTYPES}")
        axes = 1 <= len(self.shape) <= _MOST_AXES
        yield from unless(axes, "shape", self.shape, f"of 1 to {_MOST_AXES} axes")
        for index, axis in enumerate(self.shape):
            most = MOST_CLASSES if index else MOST_BATCH
            valid = is_name(axis) if isinstance(axis, str) else 1 <= axis <= most
            yield from unless(valid, f"shape[{index}]", axis, f"from 1 to {most}, or {_NAME}")


@dataclass(frozen=True)
class ModelChoices:
    """What the tensors of a checkpoint do not tell; None chooses what the file or its layout says.

    Args:
        averaged: the averaged (EMA) weights of a file that has both kinds, or the others.
        gelu: exact GELU (``erf``) or CLIP's QuickGELU.
        pooling: the head reads the class token, or the mean of the patch tokens.
        eps: LayerNorm's epsilon; None is that of :class:`Recipe`.
        resampling: how a position grid is resampled: as timm, with antialiasing, or as mmpretrain.

    Raises:
        UsageError: an unknown choice, or ``eps`` out of range.
    """

    averaged: bool | None = None
    gelu: Literal["erf", "quick"] | None = None
    pooling: Literal["token", "avg"] | None = None
    eps: float | None = None
    resampling: Literal["timm", "mmpretrain"] | None = None

    @property
    def identity(self) -> str:
        """The choices that differ from those of the published checkpoints; empty if none does."""
        words = {
            "averaged": {None: "", True: "averaged", False: "not averaged"}[self.averaged],
            "gelu": "quick gelu" if self.gelu == "quick" else "",
            "pooling": "average pooling" if self.pooling == "avg" else "",
            "eps": "" if self.eps is None else f"eps {self.eps:g}",
            "resampling": "antialiased grid" if self.resampling == "timm" else "",
        }
        return ", ".join(filter(None, words.values()))

    def __post_init__(self) -> None:
        EPS.or_none.check(self.eps, "eps")
        for name, known in (
            ("averaged", (True, False)),
            ("gelu", ("erf", "quick")),
            ("pooling", ("token", "avg")),
            ("resampling", ("timm", "mmpretrain")),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                names = " or ".join(map(str, known))
                raise UsageError(f"{name} cannot be {value!r}", hint=f"choose {names}")


@dataclass(frozen=True)
class ZeroShotOrigin:
    """What a zero-shot classifier was made from: a CLIP, class texts and templates.

    ``checkpoint`` and its ``sha256`` are CLIP's file, ``reading`` how it was read.
    ``prompts_sha256`` is the hash of class names, texts and templates, ``tokenizer_sha256`` that of
    the tokenizer's vocabulary.  ``logit_scale`` multiplies the cosines.
    """

    checkpoint: str
    sha256: str
    reading: ModelChoices
    templates: tuple[str, ...]
    prompts_sha256: str
    tokenizer_sha256: str
    logit_scale: float

    def faults(self) -> Iterator[Fault]:
        """Yield invalid values; ``checkpoint`` may be any file name."""
        for name in ("sha256", "prompts_sha256", "tokenizer_sha256"):
            digest = getattr(self, name)
            yield from unless(is_hash(digest), name, digest, "a SHA-256 in hex")
        yield from unless_lines("templates", self.templates)


@dataclass(frozen=True)
class WeightsOrigin:
    """The source of the weights.

    ``kind`` is ``file`` (``path`` and ``sha256`` of a checkpoint) or ``random`` (``seed``), for
    which no accuracy verdict is given.  ``resized_position`` is True if the position embedding was
    resampled to the model's grid.  ``choices`` are those with which the checkpoint was read.
    ``probed`` says whether the model's logits were compared with those of another framework.
    ``zero_shot`` is what the checkpoint of a zero-shot classifier was made from; None for others.
    """

    kind: Literal["file", "random"]
    path: str = ""
    sha256: str = ""
    seed: int | None = None
    layout: str = ""
    resized_position: bool = False
    choices: ModelChoices = field(default_factory=ModelChoices)
    probed: bool = False
    zero_shot: ZeroShotOrigin | None = None

    @property
    def identity(self) -> str:
        """Equal for origins with the same weights, independent of the path."""
        if self.kind == "random":
            return f"random:{self.seed}"
        resized = "resized" if self.resized_position else ""
        return ":".join(filter(None, (self.sha256, resized, self.choices.identity)))

    @property
    def description(self) -> str:
        """The weights as text: path, layout and start of the hash, or the seed."""
        if self.kind == "random":
            return f"random weights, seed {self.seed}"
        resized = ", position grid resized" if self.resized_position else ""
        if self.zero_shot is not None:
            made = self.zero_shot
            return (
                f"zero-shot classifier of {made.checkpoint}, SHA-256 {made.sha256[:8]}, "
                f"{len(made.templates)} templates, texts {made.prompts_sha256[:8]}{resized}"
            )
        chosen = f", {self.choices.identity}" if self.choices.identity else ""
        return f"{self.path}, {self.layout}, SHA-256 {self.sha256[:8]}{resized}{chosen}"

    def faults(self) -> Iterator[Fault]:
        """Yield invalid values; ``path`` may be any file name."""
        known = not self.sha256 or is_hash(self.sha256)
        yield from unless(known, "sha256", self.sha256, "a SHA-256 in hex")
        yield from unless_lines("layout", self.layout)


@dataclass(frozen=True)
class Passport:
    """Description of an artifact and of what it was made from.

    ``parents`` maps a role (``source_graph``, ``calibration``) to the SHA-256 of that file; the
    role ``weights`` is the file beside a graph that holds its weights, if they are not inside.
    ``settings`` holds the options of the stage that wrote the artifact.  ``classes`` is the number
    of logits, or the width of the embedding; ``class_names`` are the classes' names in order, empty
    if unknown, and ``class_names_from`` their source.  ``tower`` is ``text`` for the text tower of
    an embedding model, whose recipe and preprocessing are those of its image tower.
    """

    kind: Literal["graph", "calibration", "engine"]
    model: str
    precision: Precision
    weights: WeightsOrigin
    recipe: Recipe
    preprocess: Preprocess
    input: TensorSpec
    output: TensorSpec
    classes: int
    class_names: tuple[str, ...] = ()
    class_names_from: NamesFrom = ""
    parents: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    task: Task = "classification"
    tower: Tower = "image"
    schema: int = PASSPORT_SCHEMA

    @property
    def embeds(self) -> bool:
        """Whether the output is an embedding, not logits."""
        return self.task == "embedding"

    @property
    def made_from(self) -> dict[str, str]:
        """The parents without the artifact's own weights."""
        return {role: digest for role, digest in self.parents.items() if role != WEIGHTS_ROLE}

    @property
    def calibration_findings(self) -> tuple[str, ...]:
        """What was found about the calibration of a quantised graph, as sentences."""
        found = self.settings.get(FINDINGS_KEY)
        return tuple(str(each) for each in found) if isinstance(found, list) else ()

    def faults(self) -> Iterator[Fault]:
        """Yield invalid values, see :mod:`clipdeploy.core.values`.

        :mod:`clipdeploy.workspace.passports` checks fields against each other.
        """
        yield from unless(is_name(self.model), "model", self.model, _NAME)
        counted = 1 <= self.classes <= MOST_CLASSES
        yield from unless(counted, "classes", self.classes, f"from 1 to {MOST_CLASSES}")
        yield from unless_lines("class_names", self.class_names)
        for role, digest in self.parents.items():
            yield from unless_lines("parents", role)
            yield from unless(is_hash(digest), f"parents.{role}", digest, "a SHA-256 in hex")
        yield from unless_lines("settings", self.settings)
        yield from unless_lines("versions", self.versions)


T = TypeVar("T")


def settings_of(config: Any) -> dict[str, Any]:
    """Convert a configuration to the ``settings`` of a passport, as decoded from JSON."""
    settings: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    return settings


def to_json(value: Any) -> bytes:
    """Encode as indented JSON, keys in the order of their declaration."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_encode), indent=2)


def _encode(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise NotImplementedError(f"cannot encode {type(value).__name__} as JSON")


def from_json(
    data: bytes | str,
    kind: type[T],
    where: str,
    newest: int = PASSPORT_SCHEMA,
    prepare: Callable[[Any], Any] = lambda raw: raw,
) -> T:
    """Decode a ``kind`` from JSON and check the type and the value of every field.

    ``prepare`` may change the decoded JSON first, such as the names of its keys.

    Raises:
        ArtifactError: the data is not JSON, a field has a wrong type or an invalid value, or the
            schema is newer than this version of clipdeploy.
    """
    try:
        raw = msgspec.json.decode(data)
        schema = raw.get("schema", 0) if isinstance(raw, dict) else 0
        if isinstance(schema, int) and schema > newest:
            raise ArtifactError(
                f"{where} was written by a newer clipdeploy (schema {schema}, "
                f"this one reads up to {newest})",
                hint="upgrade clipdeploy, or create the artifact again",
            )
        found = msgspec.convert(prepare(raw), kind)
    except UsageError as error:
        raise ArtifactError(f"{where} is invalid: {error.message}", hint=_AGAIN) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(
            f"{where} cannot be read: {error}",
            hint="the file is truncated or was edited by hand: create it again",
        ) from error
    if fault := first_fault(found):
        raise ArtifactError(
            f"{where} is invalid: {fault}",
            hint=_AGAIN,
        )
    return found


def read_json(path: Path, kind: type[T], newest: int = PASSPORT_SCHEMA) -> T:
    """Decode a ``kind`` from a JSON file, see :func:`from_json`.

    Raises:
        FileError: the file cannot be read, or is not a regular file.
        ArtifactError: see :func:`from_json`.
    """
    return from_json(read_regular(path), kind, str(path), newest)
