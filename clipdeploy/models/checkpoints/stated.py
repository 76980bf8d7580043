"""What a checkpoint tells about its model beside the tensors: configuration files and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from clipdeploy.core.errors import CheckpointError
from clipdeploy.models.checkpoints.layouts.layout import Gelu, Layout, Pooling

__all__ = ["Stated", "stated_by", "stated_of_image", "stated_of_text"]

# Of configuration_clip.py and configuration_vit.py in transformers.
_DEFAULTS: dict[tuple[Any, str], dict[str, Any]] = {
    ("clip", "vision_config"): {"hidden_act": "quick_gelu", "num_attention_heads": 12},
    ("clip", "text_config"): {"hidden_act": "quick_gelu", "num_attention_heads": 8},
    ("vit", "vision_config"): {"hidden_act": "gelu", "num_attention_heads": 12},
}
# Of open_clip's CLIPVisionCfg and CLIPTextCfg: what changes a tower's function but not its tensors,
# and CLIP's value.
_OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vision_cfg": {"pool_type": "tok", "act_kwargs": None},
    "text_cfg": {"pool_type": "argmax", "act_kwargs": None, "no_causal_mask": False},
}
_GELUS: dict[str, Gelu] = {"gelu": "erf", "gelu_python": "erf", "quick_gelu": "quick"}
_POOLINGS: dict[str, Pooling] = {"token": "token", "avg": "avg"}


@dataclass(frozen=True)
class Stated:
    """What is known without the tensors; None for what is not."""

    gelu: Gelu | None = None
    pooling: Pooling | None = None
    eps: float | None = None
    heads: int | None = None


def stated_by(layout: Layout, config: Mapping[str, Any], loaded: Any) -> Stated:
    """Read what a ``config.json`` or a training checkpoint's ``arch`` tells.

    Raises:
        CheckpointError: the configuration names an activation or a pooling that is not supported.
    """
    if layout.name.startswith("transformers"):
        return _transformers(config)
    if layout.name == "timm":
        return _timm(config, loaded)
    if layout.name == "zero-shot":
        return _zero_shot(config)
    if layout.name == "open_clip":
        return _open_clip(config, "vision_cfg")
    return Stated()


def _zero_shot(config: Mapping[str, Any]) -> Stated:
    gelu = config.get("gelu")
    return Stated(
        gelu if gelu in get_args(Gelu) else None,
        eps=_number(config.get("eps")),
        heads=_count(config.get("heads")),
    )


def stated_of_image(config: Mapping[str, Any]) -> Stated:
    """What transformers' ``config.json`` tells about CLIP's image tower.

    Raises:
        CheckpointError: see :func:`stated_by`.
    """
    return _transformers(config) if "vision_config" in config else Stated()


def stated_of_text(config: Mapping[str, Any]) -> Stated:
    """What transformers' or open_clip's configuration tells about CLIP's text tower.

    Raises:
        CheckpointError: see :func:`stated_by`.
    """
    if "model_cfg" in config:
        return _open_clip(config, "text_cfg")
    return _transformers(config, "text_config") if "text_config" in config else Stated()


def _open_clip(config: Mapping[str, Any], tower: str) -> Stated:
    """What open_clip's ``open_clip_config.json`` tells about a tower (``model.py``, 3.3)."""
    model = config.get("model_cfg")
    inner = model.get(tower) if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(inner, Mapping):
        return Stated()
    for name, usual in _OPEN_CLIP[tower].items():
        if (inner.get(name) or usual) != usual:
            raise CheckpointError(
                f"open_clip_config.json has {name} {inner[name]!r} in {tower}, which is not "
                "supported",
                hint=f"only CLIP's own towers are read, which have {usual!r}",
            )
    width, channels = _count(inner.get("width")), _count(inner.get("head_width", 64))
    heads = width // channels if tower == "vision_cfg" and width and channels else None
    norm = inner.get("norm_kwargs")
    return Stated(
        "quick" if model.get("quick_gelu") else "erf",
        eps=_number(norm.get("eps")) if isinstance(norm, Mapping) else None,
        heads=heads or _count(inner.get("heads")),
    )


def _transformers(config: Mapping[str, Any], part: str = "vision_config") -> Stated:
    given = config.get(part, config)
    # A configuration may leave out what is the default.
    inner = _DEFAULTS.get((config.get("model_type"), part), {})
    inner = {**inner, **(given if isinstance(given, Mapping) else {})}
    act = inner.get("hidden_act")
    if isinstance(act, str) and act not in _GELUS:
        raise CheckpointError(
            f"config.json has hidden_act {act!r}, which is not supported",
            hint="gelu and quick_gelu are supported",
        )
    return Stated(
        gelu=_GELUS.get(str(act)),
        eps=_number(inner.get("layer_norm_eps")),
        heads=_count(inner.get("num_attention_heads")),
    )


def _timm(config: Mapping[str, Any], loaded: Any) -> Stated:
    name = config.get("architecture")
    if not isinstance(name, str) and isinstance(loaded, Mapping):
        name = loaded.get("arch")
    if not isinstance(name, str):
        return Stated()
    pooling = config.get("global_pool")
    if isinstance(pooling, str) and pooling not in _POOLINGS:
        raise CheckpointError(
            f"config.json has global_pool {pooling!r}, which is not supported",
            hint="token and avg are supported",
        )
    gelu: Gelu = "quick" if "quickgelu" in name else "erf"
    return Stated(gelu, _POOLINGS.get(str(pooling)))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 1000 else None
