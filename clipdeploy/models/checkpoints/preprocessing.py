"""Reads the preprocessing that a checkpoint's own configuration states.

timm              ``pretrained_cfg`` in ``config.json``
transformers      ``preprocessor_config.json``: a resize to a square, or of the short edge with
                  a centre crop
open_clip         ``preprocess_cfg`` in ``open_clip_config.json``
mmpretrain        ``data_preprocessor.mean`` and ``.std`` in the state dict, for samples to 255
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

__all__ = ["STATED", "Preprocessing", "stated_preprocessing"]

# What precedes the names of mmpretrain's mean and std.
STATED = "data_preprocessor."

Triple = tuple[float, float, float]
# Pillow's numbers of its filters, which transformers stores.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_SCALE = 255.0


@dataclass(frozen=True)
class Preprocessing:
    """What a configuration states, as in :class:`~clipdeploy.core.passport.Preprocess`.

    None for what it does not state.  ``source`` names the configuration.
    """

    source: str
    mean: Triple | None = None
    std: Triple | None = None
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash"] | None = None
    interpolation: str | None = None


def stated_preprocessing(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Preprocessing | None:
    """The preprocessing that these state; None if none does.

    ``tensors`` are those of a state dict by name, of any shapes; mean and std are dense.
    """
    if preprocessor:
        return _transformers(preprocessor)
    if isinstance(own := config.get("preprocessing"), Mapping):
        return _own(own)
    if isinstance(own := config.get("preprocess_cfg"), Mapping):
        return _open_clip(own)
    # Older versions of timm wrote its entries into config.json itself (timm 1.0 _hub.py).
    cfg = config.get("pretrained_cfg", config if "architecture" in config else None)
    if isinstance(cfg, Mapping):
        return _timm(cfg)
    return _mmpretrain(tensors)


def _own(found: Mapping[str, Any]) -> Preprocessing:
    """What a zero-shot classifier took over from CLIP's configuration."""
    mode = found.get("crop_mode")
    return Preprocessing(
        str(found.get("source")),
        _triple(found.get("mean")),
        _triple(found.get("std")),
        _number(found.get("crop_pct")),
        mode if mode in ("center", "squash") else None,
        str(found["interpolation"]) if found.get("interpolation") else None,
    )


def _timm(cfg: Mapping[str, Any]) -> Preprocessing:
    mode = cfg.get("crop_mode")
    return Preprocessing(
        "config.json",
        _triple(cfg.get("mean")),
        _triple(cfg.get("std")),
        _number(cfg.get("crop_pct")),
        mode if mode in ("center", "squash") else None,
        str(cfg["interpolation"]) if cfg.get("interpolation") else None,
    )


def _open_clip(found: Mapping[str, Any]) -> Preprocessing:
    # open_clip's transform.py: the short edge or both, then a crop of the same size.
    modes: dict[Any, Literal["center", "squash"]] = {"shortest": "center", "squash": "squash"}
    return Preprocessing(
        "open_clip_config.json",
        _triple(found.get("mean")),
        _triple(found.get("std")),
        1.0,
        modes.get(found.get("resize_mode", "shortest")),
        str(found.get("interpolation", "bicubic")),
    )


def _transformers(found: Mapping[str, Any]) -> Preprocessing:
    normalises = found.get("do_normalize", True)
    mean = _triple(found.get("image_mean")) if normalises else (0.0, 0.0, 0.0)
    std = _triple(found.get("image_std")) if normalises else (1.0, 1.0, 1.0)
    size, crop = found.get("size"), found.get("crop_size")
    short = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if crop is not None and not isinstance(size, Mapping):
        # CLIP's processor resizes the short edge to a plain number, ViT's both edges.
        short = _number(size)
    edge = crop.get("height") if isinstance(crop, Mapping) else crop
    resample = found.get("resample", 3)
    cropped = bool(found.get("do_center_crop")) and _number(short) and _number(edge)
    return Preprocessing(
        "preprocessor_config.json",
        mean,
        std,
        float(edge) / float(short) if cropped and edge and short else 1.0,
        "center" if short is not None else "squash",
        _FILTERS.get(resample) if isinstance(resample, int) else None,
    )


def _mmpretrain(tensors: Mapping[str, Any]) -> Preprocessing | None:
    mean, std = (tensors.get(STATED + name) for name in ("mean", "std"))
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return None
    scaled_mean, scaled_std = ((each.flatten() / _SCALE).tolist() for each in (mean, std))
    return Preprocessing("data_preprocessor", _triple(scaled_mean), _triple(scaled_std))


def _triple(value: Any) -> Triple | None:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    numbers = [_number(each) for each in value]
    if None in numbers:
        return None
    red, green, blue = (float(each) for each in numbers if each is not None)
    return red, green, blue


def _number(value: Any) -> float | None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if valid else None
