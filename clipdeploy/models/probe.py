"""Compares the reference with the user's own framework, on a few inputs and their logits.

A wrong GELU, pooling, epsilon or kind of weights is invisible as long as the reference is only
compared with itself.  A probe is an ``.npz`` file with ``logits`` (N, classes) and one of

    inputs   float (N, 3, S, S), normalised, as the user's model took them
    images   uint8 (N, S, S, 3), RGB crops, which are normalised as in deployment

If the logits differ, the usual causes are tried one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    ModelChoices,
    Preprocess,
    Recipe,
    WeightsOrigin,
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
class _Variant:
    """A model, or a preprocessing, with one thing changed."""

    what: str
    mend: str
    model: LoadedModel
    pixels: F32


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
        CheckpointError: the logits differ; the message names the cause if one of the usual ones
            fits, and the hint the option for it.
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
    tried = [
        (_difference(each.model, each.pixels, probe), each)
        for each in _variants(model, probe, spec)
    ]
    best, cause = min(tried, key=lambda pair: pair[0])
    found = f"the logits of {probe.path} differ by {difference:.1e} of the largest one"
    if best <= PROBE_TOLERANCE:
        raise CheckpointError(f"{found}; with {cause.what} they agree", hint=cause.mend)
    raise CheckpointError(
        f"{found}, and none of the usual causes explains it; closest: {cause.what}, {best:.1e}",
        hint="compute the probe in float32 on a CPU, in evaluation mode, from the same checkpoint",
    )


def _difference(model: LoadedModel, pixels: F32, probe: Probe) -> float:
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
    return float(np.abs(logits - probe.logits).max() / np.abs(probe.logits).max())


def _variants(model: LoadedModel, probe: Probe, spec: Preprocess) -> Iterator[_Variant]:
    pixels = probe.pixels(spec)
    for what, mend, weights, recipe in _readings(model):
        try:
            yield _Variant(what, mend, _reread(model.card, weights, recipe), pixels)
        except ClipdeployError:  # the checkpoint has no such variant
            continue
    yield from _other_heads(model, pixels)
    yield _Variant(
        "red and blue exchanged",
        "write the probe with RGB images",
        model,
        np.ascontiguousarray(pixels[:, ::-1]),
    )
    if probe.images is not None:
        for name, mean, std in (
            ("CLIP's", CLIP_MEAN, CLIP_STD),
            ("ImageNet's", IMAGENET_MEAN, IMAGENET_STD),
            ("a", _HALF, _HALF),
        ):
            other = probe.pixels(replace(spec, mean=mean, std=std))
            mend = "ImageNet's belong to --numerics as-shipped, CLIP's to --numerics trained"
            yield _Variant(f"{name} mean and std ({mean[0]:.3g} ...)", mend, model, other)


def _reread(card: ModelCard, weights: WeightsOrigin, recipe: Recipe) -> LoadedModel:
    return reload_model(card, weights, recipe, complete=False)


def _readings(model: LoadedModel) -> Iterator[tuple[str, str, WeightsOrigin, Recipe]]:
    """Yield other ways to read the checkpoint: in words, the option, the weights, the recipe."""
    weights, recipe, made = model.weights, model.recipe, model.module.config
    choices = weights.choices

    def changed(what: str, mend: str, other: ModelChoices) -> Any:
        return what, f"pass {mend}", replace(weights, choices=other), recipe

    gelu: Gelu = "quick" if made.gelu == "erf" else "erf"
    yield changed(f"{gelu} GELU", f"--gelu {gelu}", replace(choices, gelu=gelu))
    pooling: Pooling = "avg" if made.pooling == "token" else "token"
    yield changed(f"{pooling} pooling", f"--pooling {pooling}", replace(choices, pooling=pooling))
    if choices.averaged is not None:
        option = "--no-ema" if choices.averaged else "--ema"
        what = "the weights without averaging" if choices.averaged else "the averaged weights"
        yield changed(what, option, replace(choices, averaged=not choices.averaged))
    for eps in _EPSILONS:
        if not np.isclose(eps, made.eps):
            mend = f"--layernorm-eps {eps:g}"
            yield changed(f"LayerNorm's epsilon {eps:g}", mend, replace(choices, eps=eps))
    if weights.resized_position:
        other: Resampling = "mmpretrain" if choices.resampling == "timm" else "timm"
        mend = f"--resampling {other}"
        yield changed(f"a position grid as {other}'s", mend, replace(choices, resampling=other))
    numerics: Literal["trained", "as-shipped"] = (
        "as-shipped" if recipe.numerics == "trained" else "trained"
    )
    mend = f"pass --numerics {numerics}"
    unset = replace(weights, choices=replace(choices, eps=None))
    yield f"the numerics {numerics}", mend, unset, replace(recipe, numerics=numerics)


def _other_heads(model: LoadedModel, pixels: F32) -> Iterator[_Variant]:
    card = model.card
    if not card.generic:
        return
    for heads in (each for each in range(1, card.width // 8 + 1) if card.width % each == 0):
        if heads != card.heads:
            other = geometry_card(
                card.patch, card.image_size, card.width, card.depth, heads, card.hidden
            )
            try:
                loaded = _reread(other, model.weights, model.recipe)
            except ClipdeployError:  # config.json names the heads
                return
            yield _Variant(f"{heads} heads", f"pass --heads {heads}", loaded, pixels)
