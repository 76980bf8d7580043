"""Look up model cards: a checkpoint's names, geometry, source and published accuracy.

Each row of ``data/zoo.csv`` is a card; to add a checkpoint, add a row.  A short name such as
``clip-vit-base-p16`` is a field of one row, so that no other row can move it.  A geometry without a
row has a card too, whose name is the geometry: ``vit-p14-336px-w1024-d24-h16``.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from clipdeploy.core.data_rows import DataRow, read_rows, read_table
from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.core.files import file_errors
from clipdeploy.core.passport import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INCEPTION_MEAN,
    INCEPTION_STD,
    Embedding,
    Preprocess,
    Recipe,
)
from clipdeploy.core.values import MOST_EDGE
from clipdeploy.models import columns
from clipdeploy.models.hub import HUB_PREFIX, hub_folder, hub_parts

__all__ = [
    "CARDS_VARIABLE",
    "DEMO",
    "DOWNLOAD_ROOT",
    "HUB_PREFIX",
    "NORMALISATIONS",
    "TOP1_ROUNDING",
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
    "shipped_cards",
    "takes_any_name",
]

F = TypeVar("F", bound=Callable[..., Any])

DOWNLOAD_ROOT = "https://download.openmmlab.com/mmclassification/v0/clip/"
DEMO = "clip-vit-demo"
# Published accuracies have two decimals.
TOP1_ROUNDING = 0.005
# Patch, image size, width, blocks, heads, the MLP's width where it is not four times the width, and
# the width of CLIP's embedding before a zero-shot head, or as the output.
_GEOMETRY = re.compile(
    r"vit-p(?P<patch>\d+)-(?P<image_size>\d+)px-w(?P<width>\d+)-d(?P<depth>\d+)-h(?P<heads>\d+)"
    r"(?:-m(?P<hidden>\d+))?(?:-e(?P<embed>\d+)(?:-(?P<embedding>normalised|raw))?)?"
)
_MOST_DIGITS = 5
# Names a file of the user's cards, with the columns of ``zoo.csv``.
CARDS_VARIABLE = "CLIPDEPLOY_CARDS"
# The columns of a card's geometry; those of ViT-B where a row leaves them blank.
_SIZES = {"patch": None, "image_size": None, "width": 768, "depth": 12, "heads": 12}
_COLUMNS = "see docs/adding-a-checkpoint.md for the columns"
# Mean and std of the samples that a checkpoint was trained with, by the name in ``zoo.csv``.
NORMALISATIONS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "inception": (INCEPTION_MEAN, INCEPTION_STD),
}


@dataclass(frozen=True)
class ModelCard:
    """The facts about one checkpoint.

    ``top1`` and ``top5`` are percent on the ImageNet-1k validation set (the demo card: on its own
    test images), ``None`` if unpublished; ``measured_by`` is the library that measured them, whose
    crop the recipe ``published`` uses.  ``params`` and ``macs`` are computed, for one image of
    ``image_size`` pixels.  ``file`` is a path below :data:`DOWNLOAD_ROOT` or ``hf://OWNER/NAME``,
    empty if unpublished.  ``short`` is the short name, which ``aliases`` has too; empty if the card
    has none.  ``normalisation`` names the mean and std of the training: ``clip``, ``imagenet`` or
    ``inception``.  ``hidden`` is the MLP's width, None for four times ``width``.  ``embed`` is the
    width of CLIP's embedding that a zero-shot head reads, None for other heads; with ``embedding``
    it is the output, of length 1 or raw, and there is no head.  A ``generic`` card is of a
    geometry, not of a published checkpoint.
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
    embedding: Embedding | None = None
    generic: bool = False
    short: str = ""
    normalisation: str = "clip"
    measured_by: str = "mmpretrain"

    @property
    def tokens(self) -> int:
        """Sequence length, including the class token."""
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def shipped(self) -> bool:
        """Whether clipdeploy includes the weights."""
        return self.name == DEMO

    @property
    def on_hub(self) -> bool:
        """Whether the weights are published on the Hugging Face hub."""
        return self.file.startswith(HUB_PREFIX)

    @property
    def hub_folder(self) -> str:
        """The folder of the weights in a cache of huggingface_hub; empty if timm has none."""
        if self.on_hub:
            return hub_folder(hub_parts(self.file)[0])
        return hub_folder(f"timm/{self.timm_name}") if self.timm_name else ""

    def is_downloaded(self, path: Path) -> bool:
        """Whether ``path`` is the card's file in a cache of huggingface_hub."""
        return bool(self.hub_folder) and self.hub_folder in path.parts

    @property
    def url(self) -> str:
        """The address of the published weights, empty if unpublished."""
        return DOWNLOAD_ROOT + self.file if self.file and not self.on_hub else self.file

    def preprocess(self, recipe: Recipe) -> Preprocess:
        """The preprocessing under ``recipe``."""
        used = self.normalisation if recipe.numerics == "trained" else "imagenet"
        mean, std = NORMALISATIONS[used]
        timm = "timm" in (recipe.resize, self.measured_by)
        crop_pct = self.timm_crop_pct if timm else 1.0
        return Preprocess(
            size=self.image_size,
            mean=recipe.mean or mean,
            std=recipe.std or std,
            crop_pct=crop_pct if recipe.crop_pct is None else recipe.crop_pct,
            crop_mode=recipe.crop_mode or (self.timm_crop_mode if timm else "center"),
            # OpenCV, used for the published numbers, applies the EXIF orientation; timm does not.
            exif_orientation=not timm,
            interpolation=recipe.interpolation or "bicubic",
        )


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
        short="demo",
    )


@cache
def shipped_cards() -> tuple[ModelCard, ...]:
    """The cards in the order of ``zoo.csv``, then the demo card.

    Raises:
        ArtifactError: a row of ``zoo.csv`` is invalid.
    """
    return (*_distinct(read_rows("zoo.csv", hint=_COLUMNS), _demo_card()), _demo_card())


def all_cards() -> tuple[ModelCard, ...]:
    """The shipped cards, then those of the file that ``CLIPDEPLOY_CARDS`` names.

    Raises:
        ArtifactError: a row is invalid, or has a name or an alias of another card.
        FileError: the file cannot be read.
    """
    shipped, named = shipped_cards(), os.environ.get(CARDS_VARIABLE)
    if not named:
        return shipped
    path = Path(named).expanduser()
    with file_errors("read", path):
        stamp = path.stat()
    return (*shipped, *_own_cards(path, (stamp.st_mtime_ns, stamp.st_size, stamp.st_ino)))


@cache
def _own_cards(path: Path, stamp: tuple[int, ...]) -> tuple[ModelCard, ...]:
    """The cards of the user's file, read again when its ``stamp`` changes."""
    columns = tuple(read_rows("zoo.csv")[0].columns)
    return _distinct(read_table(path, columns, hint=_COLUMNS), *shipped_cards())


def _distinct(rows: list[DataRow], *others: ModelCard) -> tuple[ModelCard, ...]:
    """The cards of ``rows``, none of which has a name or an alias of another card."""
    known = {name: card.name for card in others for name in (card.name, *card.aliases)}
    found = []
    for row in rows:
        card = _card(row)
        for name in (card.name, *card.aliases):
            if name in known or _named_geometry(name) is not None:
                owner = f"of {known[name]}" if name in known else "of a geometry"
                raise ArtifactError(
                    f"{row.file}, line {row.line}: {name} is a name {owner} already",
                    hint="choose another name or alias",
                )
            known[name] = card.name
        found.append(card)
    return tuple(found)


def _card(row: DataRow) -> ModelCard:
    """Parse a row of ``zoo.csv``, of which only name, patch and image size are required.

    Raises:
        ArtifactError: a value is invalid.
    """
    value = row.value
    name = value("name", columns.name_text)
    timm_name, short = (value(column, columns.name_text, "") for column in ("timm_name", "alias"))
    mm_name = _mmpretrain_name(name) if value("mm_config", str, "") else ""
    sizes: dict[str, Any] = {
        column: value(column, columns.count, usual) for column, usual in _SIZES.items()
    }
    try:
        card = geometry_card(**sizes)
    except UsageError as error:
        where = f"{row.file}, line {row.line}"
        raise ArtifactError(f"{where}: {error.message}", hint=error.hint) from error
    return replace(
        card,
        name=name,
        aliases=tuple(filter(None, (short, timm_name, mm_name))),
        pretrain=value("pretrain", str, "-"),
        params=value("true_params", columns.count, card.params),
        macs=value("true_macs", columns.count, card.macs),
        # NaN: blank, so unpublished.
        top1=columns.known(value("published_top1", columns.percent, math.nan)),
        top5=columns.known(value("published_top5", columns.percent, math.nan)),
        file=value("file", columns.address, ""),
        sha256_prefix=value("sha256_prefix", columns.hash_prefix, ""),
        timm_name=timm_name,
        timm_crop_pct=value("timm_crop_pct", columns.crop_pct, 1.0),
        timm_crop_mode=value("timm_crop_mode", columns.one_of("center", "squash"), "center"),
        generic=False,
        short=short,
        normalisation=value("normalisation", columns.one_of(*NORMALISATIONS), "clip"),
        measured_by=value("measured_by", columns.one_of("mmpretrain", "timm"), "mmpretrain"),
    )


def geometry_card(
    patch: int,
    image_size: int,
    width: int,
    depth: int,
    heads: int,
    hidden: int | None = None,
    embed: int | None = None,
    embedding: Embedding | None = None,
) -> ModelCard:
    """The card of a geometry that no published checkpoint has, named after it.

    Raises:
        UsageError: the sizes do not make a model.
    """
    hidden = None if hidden == 4 * width else hidden
    name = f"vit-p{patch}-{image_size}px-w{width}-d{depth}-h{heads}"
    name += "" if hidden is None else f"-m{hidden}"
    name += "" if embed is None else f"-e{embed}"
    name += "" if embedding is None else f"-{embedding}"
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
    kernel, classes = 3 * patch**2 * width, 0 if embedding else 1000
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
        embedding=embedding,
        classes=embed if embedding and embed else classes,
        generic=True,
    )


def _named_geometry(name: str) -> ModelCard | None:
    """The card of a geometry's name; None for other names and impossible geometries."""
    found = _GEOMETRY.fullmatch(name)
    if found is None or any(len(text or "") > _MOST_DIGITS for text in found.groups()[:-1]):
        return None
    texts = found.groupdict()
    embedding = cast(Embedding | None, texts.pop("embedding"))
    sizes: dict[str, Any] = {k: int(text) for k, text in texts.items() if text is not None}
    try:
        card = geometry_card(**sizes, embedding=embedding)
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
    mean = {"clip": "CLIP mean and std", "imagenet": "ImageNet mean and std"}.get(
        card.normalisation, "mean and std 0.5"
    )
    by_timm = card.measured_by == "timm"
    published = f"short edge {size}, centre crop {size}, EXIF orientation applied"
    if by_timm:
        published = f"{crop}, EXIF orientation ignored"
    return {
        "--numerics trained": f"{mean}, LayerNorm eps 1e-5, native {grid}x{grid} grid: "
        "as in training",
        "--numerics as-shipped": "ImageNet mean and std, LayerNorm eps 1e-6"
        + (resampled if resized else "")
        + f": as in mmpretrain's current config{'s' if by_timm else ''}",
        "--resize published": f"{published}: as for the published top-1",
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
