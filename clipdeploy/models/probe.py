"""Compares the reference with the user's own framework, on a few inputs and their logits.

A wrong GELU, pooling, epsilon or kind of weights is invisible as long as the reference is only
compared with itself.  A probe is an ``.npz`` file with ``logits`` (N, classes) and one of

    inputs   float (N, 3, S, S), normalised, as the user's model took them
    images   uint8 (N, S, S, 3), RGB crops, which are normalised as in deployment

If the logits differ, the usual causes are tried one at a time, then two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from clipdeploy.core.errors import CheckpointError, ClipdeployError, first_line
from clipdeploy.core.files import open_regular
from clipdeploy.core.passport import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Embedding,
    Preprocess,
    Recipe,
)
from clipdeploy.models.cards import ModelCard, geometry_card
from clipdeploy.models.checkpoints.layouts.layout import Gelu, Pooling
from clipdeploy.models.checkpoints.position import Resampling
from clipdeploy.models.load import LoadedModel, reload_model
from exporters.samples import normalise

__all__ = ["PROBE_TOLERANCE", "Probe", "prove", "read_probe"]

# Of the largest logit, in float32 on both sides: rounding costs about 1e-6 of it, an approximate
# GELU about 1e-4.
PROBE_TOLERANCE = 1e-4
_MOST_INPUTS = 64
# Each may read the checkpoint again.
_MOST_PAIRS = 48
_EPSILONS = (1e-5, 1e-6, 1e-12)
_HALF = (0.5, 0.5, 0.5)
_CONTENT = "logits (N, classes), and inputs (N, 3, S, S) or uint8 images (N, S, S, 3)"

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Probe:
    """A few inputs, and the logits (N, classes) of the user's framework.

    Either ``inputs``, float32 (N, 3, S, S), or ``images``, uint8 (N, S, S, 3), is None.
    """

    path: Path
    logits: F32
    inputs: F32 | None = None
    images: NDArray[np.uint8] | None = None

    def pixels(self, spec: Preprocess) -> F32:
        """The normalised inputs, float32 (N, 3, S, S)."""
        if self.inputs is not None:
            return self.inputs
        assert self.images is not None
        found: F32 = normalise(self.images, spec)
        return found


@dataclass(frozen=True)
class _Change:
    """One thing read in another way: in words, and the option for it.

    ``kinds`` are what it changes: two changes with a common kind exclude each other.  ``choices``
    are fields of :class:`ModelChoices`.  None changes nothing.
    """

    what: str
    mend: str
    kinds: frozenset[str]
    choices: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    card: ModelCard | None = None
    spec: Preprocess | None = None
    reverse: bool = False

    @property
    def reads(self) -> bool:
        """Whether the checkpoint has to be read again."""
        return bool(self.choices or self.recipe or self.card)


Changes = tuple[_Change, ...]


def read_probe(path: Path) -> Probe:
    """Read a probe.

    Raises:
        FileError: the file cannot be opened.
        CheckpointError: it is no ``.npz`` file with these arrays.
    """
    try:
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except ClipdeployError:
        raise
    except Exception as error:  # damaged archives raise anything
        raise CheckpointError(
            f"{path} is not a probe: {first_line(error)}", hint=f"numpy.savez with {_CONTENT}"
        ) from error
    return _checked(path, arrays)


def _checked(path: Path, arrays: dict[str, NDArray[Any]]) -> Probe:
    logits, inputs, images = (arrays.get(name) for name in ("logits", "inputs", "images"))
    given = images if inputs is None else inputs
    fits = (
        (inputs is None or images is None)
        and logits is not None
        and given is not None
        and logits.ndim == 2
        and given.ndim == 4
        and 0 < len(given) == len(logits) <= _MOST_INPUTS
        and given.shape[1 if inputs is not None else 3] == 3
        and all(each.dtype.kind == "f" for each in (logits, inputs) if each is not None)
        and (inputs is not None or given.dtype == np.uint8)
    )
    if not fits or logits is None or not np.isfinite(logits).all() or not np.abs(logits).max() > 0:
        shapes = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items())
        raise CheckpointError(
            f"{path} is not a probe: it has {shapes or 'no arrays'}",
            hint=f"write {_CONTENT}, up to {_MOST_INPUTS} of them",
        )
    if inputs is not None:
        return Probe(path, logits.astype(np.float32), inputs=inputs.astype(np.float32))
    return Probe(path, logits.astype(np.float32), images=images)


def prove(model: LoadedModel, probe: Probe) -> float:
    """Compare the model with a probe; return the largest difference as a part of the largest logit.

    Raises:
        CheckpointError: the logits differ; the message names the cause if one of the usual ones or
            two of them fit, and the hint the options.
    """
    spec = model.card.preprocess(model.recipe)
    pixels = probe.pixels(spec)
    size, classes = model.card.image_size, model.module.config.classes
    if pixels.shape[2:] != (size, size) or probe.logits.shape[1] != classes:
        raise CheckpointError(
            f"{probe.path} has inputs of {pixels.shape[3]}x{pixels.shape[2]} px and "
            f"{probe.logits.shape[1]} logits; the model takes {size}x{size} px and has {classes}",
            hint="write the probe from this checkpoint, or pass --image-size PIXELS",
        )
    difference = _difference(model, pixels, probe)
    if difference <= PROBE_TOLERANCE:
        return difference
    found = f"the logits of {probe.path} differ by {difference:.1e} of the largest one"
    best, cause = _closest(model, probe, spec)
    what = " and ".join(each.what for each in cause)
    if best <= PROBE_TOLERANCE:
        mends = " and ".join(each.mend for each in cause)
        raise CheckpointError(f"{found}; with {what} they agree", hint=mends)
    raise CheckpointError(
        f"{found}, and neither one of the usual causes nor two of them explain it; closest: "
        f"{what}, {best:.1e}",
        hint="compute the probe in float32 on a CPU, in evaluation mode, from the same checkpoint",
    )


def _difference(model: LoadedModel, pixels: F32, probe: Probe) -> float:
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
    return float(np.abs(logits - probe.logits).max() / np.abs(probe.logits).max())


def _closest(model: LoadedModel, probe: Probe, spec: Preprocess) -> tuple[float, Changes]:
    """The difference that remains with the closest single change, or with two that fit."""
    changes = _changes(model, probe, spec)
    tried = [(_remaining(model, probe, spec, (each,)), (each,)) for each in changes]
    best = min(tried, key=lambda pair: pair[0])
    if best[0] <= PROBE_TOLERANCE:
        return best
    for two in _pairs(changes):
        if (difference := _remaining(model, probe, spec, two)) <= PROBE_TOLERANCE:
            return difference, two
    return best


def _pairs(changes: Sequence[_Change]) -> Iterator[Changes]:
    """Yield up to ``_MOST_PAIRS`` of two changes that do not exclude each other."""
    pairs = (
        pair
        for pair in combinations(changes, 2)
        if not pair[0].kinds & pair[1].kinds and not any("heads" in each.kinds for each in pair)
    )
    return islice(pairs, _MOST_PAIRS)


def _remaining(model: LoadedModel, probe: Probe, spec: Preprocess, changes: Changes) -> float:
    try:
        return _difference(_apply(model, changes), _pixels(probe, spec, changes), probe)
    except ClipdeployError:  # the checkpoint has no such variant
        return math.inf


def _apply(model: LoadedModel, changes: Changes) -> LoadedModel:
    if not any(each.reads for each in changes):
        return model
    weights, recipe, card = model.weights, model.recipe, model.card
    choices: dict[str, Any] = {}
    for each in changes:
        choices |= each.choices
        recipe, card = each.recipe or recipe, each.card or card
    weights = replace(weights, choices=replace(weights.choices, **choices))
    return reload_model(card, weights, recipe, complete=False)


def _pixels(probe: Probe, spec: Preprocess, changes: Changes) -> F32:
    own = next((each.spec for each in changes if each.spec), spec)
    pixels = probe.pixels(own)
    reverse = any(each.reverse for each in changes)
    return np.ascontiguousarray(pixels[:, ::-1]) if reverse else pixels


def _changes(model: LoadedModel, probe: Probe, spec: Preprocess) -> list[_Change]:
    """The usual causes, the likeliest first."""
    return [
        *_readings(model),
        _Change(
            "red and blue exchanged",
            "write the probe with RGB images",
            frozenset({"order"}),
            reverse=True,
        ),
        *([] if probe.images is None else _other_means(spec)),
        *_other_embedding(model.card),
        _other_numerics(model),
        *_other_heads(model.card),
    ]


def _readings(model: LoadedModel) -> Iterator[_Change]:
    choices, made = model.weights.choices, model.module.config

    def changed(what: str, option: str, name: str, value: Any) -> _Change:
        return _Change(what, f"pass {option}", frozenset({name}), {name: value})

    gelu: Gelu = "quick" if made.gelu == "erf" else "erf"
    yield changed(f"{gelu} GELU", f"--gelu {gelu}", "gelu", gelu)
    pooling: Pooling = "avg" if made.pooling == "token" else "token"
    yield changed(f"{pooling} pooling", f"--pooling {pooling}", "pooling", pooling)
    if choices.averaged is not None:
        option = "--no-ema" if choices.averaged else "--ema"
        what = "the weights without averaging" if choices.averaged else "the averaged weights"
        yield changed(what, option, "averaged", not choices.averaged)
    for eps in _EPSILONS:
        if not np.isclose(eps, made.eps):
            yield changed(f"LayerNorm's epsilon {eps:g}", f"--layernorm-eps {eps:g}", "eps", eps)
    if model.weights.resized_position:
        other: Resampling = "mmpretrain" if choices.resampling == "timm" else "timm"
        what = f"a position grid as {other}'s"
        yield changed(what, f"--resampling {other}", "resampling", other)


def _other_embedding(card: ModelCard) -> Iterator[_Change]:
    if card.embedding is not None:
        other: Embedding = "raw" if card.embedding == "normalised" else "normalised"
        what, mend = f"{other} embeddings", f"pass --embeddings {other}"
        yield _Change(what, mend, frozenset({"output"}), card=replace(card, embedding=other))


def _other_means(spec: Preprocess) -> Iterator[_Change]:
    for name, mean, std in (
        ("CLIP's", CLIP_MEAN, CLIP_STD),
        ("ImageNet's", IMAGENET_MEAN, IMAGENET_STD),
        ("a", _HALF, _HALF),
    ):
        if (mean, std) != (spec.mean, spec.std):
            yield _Change(
                f"{name} mean and std ({mean[0]:.3g} ...)",
                f"pass --mean {_numbers(mean)} --std {_numbers(std)}",
                frozenset({"mean and std"}),
                spec=replace(spec, mean=mean, std=std),
            )


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _other_numerics(model: LoadedModel) -> _Change:
    numerics: Literal["trained", "as-shipped"] = (
        "as-shipped" if model.recipe.numerics == "trained" else "trained"
    )
    recipe = replace(model.recipe, numerics=numerics)
    return _Change(
        f"the numerics {numerics}",
        f"pass --numerics {numerics}",
        frozenset({"eps", "resampling", "mean and std"}),
        {"eps": None},
        recipe,
        spec=model.card.preprocess(recipe),
    )


def _other_heads(card: ModelCard) -> Iterator[_Change]:
    if not card.generic:
        return
    for heads in (each for each in range(1, card.width // 8 + 1) if card.width % each == 0):
        if heads != card.heads:
            other = geometry_card(
                card.patch, card.image_size, card.width, card.depth, heads, card.hidden
            )
            kinds = frozenset({"heads"})
            yield _Change(f"{heads} heads", f"pass --heads {heads}", kinds, card=other)
