"""Look up model cards: a checkpoint's names, geometry, source and published accuracy.

Each row of ``data/zoo.csv`` is a card; to add a checkpoint, add a row.  A geometry without a row
has a card too, whose name is the geometry: ``vit-p14-336px-w1024-d24-h16``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from clipdeploy.core.data_rows import DataRow, read_rows
from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocess,
    Recipe,
)
from clipdeploy.core.values import MOST_EDGE

__all__ = [
    "DEMO",
    "DOWNLOAD_ROOT",
    "ModelCard",
    "all_cards",
    "class_names",
    "demo_file",
    "find",
    "full_card",
    "full_name",
    "geometry_card",
    "imagenet_classes",
    "recipe_notes",
    "takes_any_name",
]

F = TypeVar("F", bound=Callable[..., Any])

DOWNLOAD_ROOT = "https://download.openmmlab.com/mmclassification/v0/clip/"
DEMO = "clip-vit-demo"
# Patch, image size, width, blocks, heads, the MLP's width where it is not four times the width, and
# the width of CLIP's embedding before a zero-shot head.
_GEOMETRY = re.compile(
    r"vit-p(?P<patch>\d+)-(?P<image_size>\d+)px-w(?P<width>\d+)-d(?P<depth>\d+)-h(?P<heads>\d+)"
    r"(?:-m(?P<hidden>\d+))?(?:-e(?P<embed>\d+))?"
)
_MOST_DIGITS = 5
_COLUMNS = "see docs/adding-a-checkpoint.md for the columns"


@dataclass(frozen=True)
class ModelCard:
    """The facts about one checkpoint.

    ``top1`` and ``top5`` are percent on the ImageNet-1k validation set (the demo card: on its own
    test images), ``None`` if unpublished.  ``params`` and ``macs`` are computed, for one image of
    ``image_size`` pixels.  ``hidden`` is the MLP's width, None for four times ``width``.
    ``embed`` is the width of CLIP's embedding that a zero-shot head reads, None for other heads.  A
    ``generic`` card is of a geometry, not of a published checkpoint.
    """

    name: str
    aliases: tuple[str, ...]
    patch: int
    image_size: int
    pretrain: str
    params: int
    macs: int
    top1: float | None
    top5: float | None
    file: str
    sha256_prefix: str
    timm_name: str
    timm_crop_pct: float
    timm_crop_mode: str
    classes: int = 1000
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    embed: int | None = None
    generic: bool = False

    @property
    def tokens(self) -> int:
        """Sequence length, including the class token."""
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def short(self) -> bool:
        """Whether ``aliases[0]`` is the geometry's short name, as for its most accurate card."""
        return self.aliases[:1] == (_short_alias(self.patch, self.image_size),)

    @property
    def shipped(self) -> bool:
        """Whether clipdeploy includes the weights."""
        return self.name == DEMO

    @property
    def url(self) -> str:
        """The URL of the published weights, empty if unpublished."""
        return DOWNLOAD_ROOT + self.file if self.file else ""

    def preprocess(self, recipe: Recipe) -> Preprocess:
        """The preprocessing under ``recipe``."""
        clip = recipe.numerics == "trained"
        timm = recipe.resize == "timm"
        crop_pct = self.timm_crop_pct if timm else 1.0
        return Preprocess(
            size=self.image_size,
            mean=recipe.mean or (CLIP_MEAN if clip else IMAGENET_MEAN),
            std=recipe.std or (CLIP_STD if clip else IMAGENET_STD),
            crop_pct=crop_pct if recipe.crop_pct is None else recipe.crop_pct,
            crop_mode=recipe.crop_mode or (self.timm_crop_mode if timm else "center"),
            # OpenCV, used for the published numbers, applies the EXIF orientation; timm does not.
            exif_orientation=not timm,
        )


def _short_alias(patch: int, image_size: int) -> str:
    suffix = "" if image_size == 224 else f"-{image_size}px"
    return f"clip-vit-base-p{patch}{suffix}"


def _mmpretrain_name(name: str) -> str:
    """The name in mmpretrain 1.x: clip-vit-base-p16_X -> vit-base-p16_clip-X."""
    geometry, _, rest = name.removeprefix("clip-").partition("_")
    return f"{geometry}_clip-{rest}"


def _demo_card() -> ModelCard:
    return ModelCard(
        name=DEMO,
        aliases=("demo",),
        patch=4,
        image_size=32,
        pretrain="handwritten digits",
        params=683_338,
        macs=48_293_952,
        # On the 500 held-out digits in test.zip; printed by scripts/train_demo_checkpoint.py.
        top1=99.4,
        top5=100.0,
        file="",
        sha256_prefix="",
        timm_name="",
        timm_crop_pct=1.0,
        timm_crop_mode="center",
        classes=10,
        width=96,
        depth=6,
        heads=6,
    )


@cache
def all_cards() -> tuple[ModelCard, ...]:
    """All cards in the order of ``zoo.csv``, then the demo card.

    Raises:
        ArtifactError: a row of ``zoo.csv`` is invalid.
    """
    read = [_card(row) for row in read_rows("zoo.csv", hint=_COLUMNS)]
    best: dict[str, ModelCard] = {}
    for card in read:
        alias = _short_alias(card.patch, card.image_size)
        if alias not in best or (card.top1 or 0) > (best[alias].top1 or 0):
            best[alias] = card
    short = {card.name: alias for alias, card in best.items()}
    named = [
        replace(card, aliases=(short[card.name], *card.aliases)) if card.name in short else card
        for card in read
    ]
    return (*named, _demo_card())


def _card(row: DataRow) -> ModelCard:
    """Parse a row of ``zoo.csv`` into a card without its short alias.

    Accuracy, ``file``, its hash and timm's columns may be blank, for unpublished checkpoints.
    """
    value = row.value
    name, timm_name = value("name", str), value("timm_name", str, "")
    return ModelCard(
        name=name,
        aliases=tuple(filter(None, (timm_name, _mmpretrain_name(name)))),
        patch=value("patch", _count),
        image_size=value("image_size", _count),
        pretrain=value("pretrain", str, "-"),
        params=value("true_params", _count),
        macs=value("true_macs", _count),
        # NaN: blank, so unpublished.
        top1=_known(value("published_top1", float, math.nan)),
        top5=_known(value("published_top5", float, math.nan)),
        file=value("file", str, ""),
        sha256_prefix=value("sha256_prefix", str, ""),
        timm_name=timm_name,
        timm_crop_pct=value("timm_crop_pct", float, 1.0),
        timm_crop_mode=value("timm_crop_mode", str, "center"),
    )


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(f"{number} is less than 1")
    return number


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def geometry_card(
    patch: int,
    image_size: int,
    width: int,
    depth: int,
    heads: int,
    hidden: int | None = None,
    embed: int | None = None,
) -> ModelCard:
    """The card of a geometry that no published checkpoint has, named after it.

    Raises:
        UsageError: the sizes do not make a model.
    """
    hidden = None if hidden == 4 * width else hidden
    name = f"vit-p{patch}-{image_size}px-w{width}-d{depth}-h{heads}"
    name += "" if hidden is None else f"-m{hidden}"
    name += "" if embed is None else f"-e{embed}"
    extra = [size for size in (hidden, embed) if size is not None]
    sizes = (patch, image_size, width, depth, heads, *extra)
    if min(sizes) < 1 or image_size > MOST_EDGE or image_size % patch or width % heads:
        raise UsageError(
            f"{name} is no geometry: {image_size} px in patches of {patch}, width {width} in "
            f"{heads} heads",
            hint="the image size must be a multiple of the patch size, the width one of the heads",
        )
    mlp, tokens = hidden or 4 * width, (image_size // patch) ** 2 + 1
    linears = 4 * width**2 + 2 * width * mlp
    kernel, classes = 3 * patch**2 * width, 1000
    features, projection = embed or width, (embed or 0) * width
    # Two LayerNorms and the Linears' biases in each block; two LayerNorms, the class token, the
    # position embedding, the projection and the head around them.
    block = linears + 4 * width + 5 * width + mlp
    around = kernel + width * (tokens + 1) + 4 * width + projection + classes * (features + 1)
    products = tokens * linears + 2 * tokens**2 * width
    return ModelCard(
        name=name,
        aliases=(),
        patch=patch,
        image_size=image_size,
        pretrain="-",
        params=depth * block + around,
        macs=depth * products + (tokens - 1) * kernel + projection + classes * features,
        top1=None,
        top5=None,
        file="",
        sha256_prefix="",
        timm_name="",
        timm_crop_pct=1.0,
        timm_crop_mode="center",
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        embed=embed,
        generic=True,
    )


def _named_geometry(name: str) -> ModelCard | None:
    """The card of a geometry's name; None for other names and impossible geometries."""
    found = _GEOMETRY.fullmatch(name)
    if found is None or any(len(text or "") > _MOST_DIGITS for text in found.groups()):
        return None
    sizes = {key: int(text) for key, text in found.groupdict().items() if text is not None}
    try:
        card = geometry_card(**sizes)
    except UsageError:
        return None
    return card if card.name == name else None


def _by_name() -> dict[str, ModelCard]:
    return {name: card for card in all_cards() for name in (card.name, *card.aliases)}


def full_card(name: str) -> ModelCard | None:
    """The card with this full name; None if there is none, as for an alias."""
    card = _by_name().get(name) or _named_geometry(name)
    return card if card is not None and card.name == name else None


def full_name(name: str) -> str:
    """The full name of a model, which its files use; other names are returned unchanged."""
    card = _by_name().get(name)
    return name if card is None else card.name


def takes_any_name(verb: F) -> F:
    """Decorate ``verb(workspace, model, ...)`` to accept any name that :func:`find` accepts."""

    @wraps(verb)
    def with_full_name(workspace: object, model: str | None, *args: Any, **options: Any) -> Any:
        return verb(workspace, model and find(model).name, *args, **options)

    return cast(F, with_full_name)


def find(name: str) -> ModelCard:
    """Find a card by its full name, timm name, mmpretrain name, short alias or geometry.

    Raises:
        UsageError: no card has that name; the hint lists the most similar names.
    """
    known = _by_name()
    if name in known:
        return known[name]
    if (card := _named_geometry(name)) is not None:
        return card
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise UsageError(f"unknown model {name!r}", hint=f"{hint}`clipdeploy zoo` lists all models")


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """(wnid, label) of ImageNet's 1000 classes in logit order."""
    return tuple(
        (row.value("wnid", str), row.value("label", str))
        for row in read_rows("imagenet_classes.csv")
    )


def recipe_notes(card: ModelCard) -> dict[str, str]:
    """Describe each recipe option for ``card``: option -> phrase."""
    size, grid, trained = card.image_size, card.image_size // card.patch, 224 // card.patch
    resized = size > 224
    resampled = f", position grid {grid}x{grid} resized to {trained}x{trained} and back"
    edge = math.floor(size / card.timm_crop_pct)
    crop = f"short edge {edge}, centre crop {size}"
    if card.timm_crop_mode == "squash":
        crop = f"both edges {edge}, aspect ratio lost" + ("" if edge == size else f", crop {size}")
    return {
        "--numerics trained": f"CLIP mean and std, LayerNorm eps 1e-5, native {grid}x{grid} grid: "
        "as in training",
        "--numerics as-shipped": "ImageNet mean and std, LayerNorm eps 1e-6"
        + (resampled if resized else "")
        + ": as in mmpretrain's current config",
        "--resize published": f"short edge {size}, centre crop {size}, EXIF orientation applied: "
        "as for the published top-1",
        "--resize timm": f"{crop}, EXIF orientation ignored: as in timm's evaluation",
    }


def class_names(card: ModelCard) -> tuple[tuple[str, str], ...]:
    """(folder name, label) of each class in logit order: ImageNet's wnids, or the demo's digits."""
    if card.name == DEMO:
        return tuple((str(digit), str(digit)) for digit in range(10))
    return imagenet_classes()


def demo_file(name: str) -> Path:
    """The path of a demo file in the package (``weights.safetensors``, ``test.zip`` ...)."""
    return Path(str(resources.files("clipdeploy").joinpath("data", "demo", name)))
