"""The types that travel with every artifact: what it is, and what it was made from.

A passport is a JSON block: inside an ONNX graph's metadata, inside ``calibration.json``, and beside
an engine as ``*.engine.json``.  A later stage reads it instead of asking the user again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, TypeVar

import msgspec

from exporters.errors import ArtifactError

__all__ = [
    "BATCH_AXIS",
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PASSPORT_KEY",
    "PASSPORT_SCHEMA",
    "Passport",
    "Precision",
    "Preprocess",
    "Recipe",
    "TensorSpec",
    "WeightsOrigin",
    "from_json",
    "settings_of",
    "to_json",
]

# The name of a symbolic batch axis.
BATCH_AXIS = "batch"
PASSPORT_SCHEMA = 1
PASSPORT_KEY = "clipdeploy.passport"

# openai/CLIP clip.py `_transform`, and the ImageNet statistics of torchvision's model zoo; both
# in units of 1/255 of a uint8 sample.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)

Precision = Literal["fp32", "fp16", "int8", "int8-cpu"]


@dataclass(frozen=True)
class Recipe:
    """The two choices that decide what "the model" means.

    ``numerics``: ``trained`` is CLIP's mean/std, the native position grid and LayerNorm eps 1e-5,
    as the weights were trained; ``as-shipped`` is what mmpretrain's present configs do.
    ``resize``: ``published`` is the crop behind the published top-1, ``timm`` the card's own.
    """

    numerics: Literal["trained", "as-shipped"] = "trained"
    resize: Literal["published", "timm"] = "published"


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes the network's input; see ``clipdeploy.imaging.preprocess``.

    ``size`` is the crop's edge in pixels; ``mean`` and ``std`` are per RGB channel in units of
    1/255; the short edge (``center``) or both edges (``squash``) are resized to size / crop_pct.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash"] | str = "center"
    exif_orientation: bool = True


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: ``TensorSpec("image", "float32", ("batch", 3, 224, 224))``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class WeightsOrigin:
    """Where the weights came from.

    ``kind`` is ``file`` (``path`` and ``sha256`` of a checkpoint) or ``random`` (``seed``).  No
    accuracy verdict is given on random weights.  ``resized_position`` says that the position
    embedding was resampled to the model's grid.
    """

    kind: Literal["file", "random"]
    path: str = ""
    sha256: str = ""
    seed: int | None = None
    layout: str = ""
    resized_position: bool = False

    @property
    def identity(self) -> str:
        """What makes two origins the same weights, wherever the file lies."""
        if self.kind == "random":
            return f"random:{self.seed}"
        return f"{self.sha256}:resized" if self.resized_position else self.sha256

    @property
    def description(self) -> str:
        """The weights in words: file, layout and the start of the hash, or the seed."""
        if self.kind == "random":
            return f"random weights, seed {self.seed}"
        resized = ", position grid resized" if self.resized_position else ""
        return f"{self.path}, {self.layout}, SHA-256 {self.sha256[:8]}{resized}"


@dataclass(frozen=True)
class Passport:
    """What an artifact is and what it was made from.

    ``parents`` maps a role (``source_graph``, ``calibration``) to the SHA-256 of that file;
    ``settings`` holds the options of the stage that wrote the artifact; ``classes`` is the number
    of logits and ``class_names`` their folder names in order, empty where nobody said.
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
    parents: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = PASSPORT_SCHEMA


T = TypeVar("T")


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration as a passport's ``settings`` holds it: what JSON gives back for it."""
    settings: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    return settings


def to_json(value: Any) -> bytes:
    """Any of these types as readable JSON, keys in the order of their declaration."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_encode), indent=2)


def _encode(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no JSON form")


def from_json(data: bytes | str, kind: type[T], where: str, newest: int = PASSPORT_SCHEMA) -> T:
    """Read a ``kind`` back from JSON, every field checked.

    Raises:
        ArtifactError: not JSON, a field of the wrong type, or a schema newer than this clipdeploy.
    """
    try:
        raw = msgspec.json.decode(data)
        schema = raw.get("schema", 0) if isinstance(raw, dict) else 0
        if isinstance(schema, int) and schema > newest:
            raise ArtifactError(
                f"{where} was written by a newer clipdeploy (schema {schema}, "
                f"this one reads up to {newest})",
                hint="upgrade clipdeploy, or make the artifact again",
            )
        return msgspec.convert(raw, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(
            f"{where} cannot be read: {error}",
            hint="it was cut short or edited by hand: make it again",
        ) from error
