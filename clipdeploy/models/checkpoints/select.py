"""Finds the model in what a file contains: the state dict, the prefix, the averaged weights.

A file may hold several state dicts, and a state dict several models.  Every model that has a known
layout is found, wherever it is; one of them is chosen, or the file is refused.

Averaged (EMA) weights are recognised by the names under which they are saved:

    timm                 state_dict_ema (model_ema in older files)
    torch                AveragedModel: n_averaged beside module.*
    mmengine             EMAHook exchanges them when it saves: state_dict is averaged, and
                         ema_state_dict is not
    mmcv (mmcls)         EMAHook exchanges them after an epoch, with the priority that mmcls's
                         configs give it before the checkpoint is saved: ema_* is not averaged
    Lightning            WeightAveraging exchanges them too: current_model_state is not averaged

Sources: ``mmengine/hooks/ema_hook.py`` (``_swap_ema_state_dict``), ``mmcv/runner/hooks/ema.py``,
``lightning/pytorch/callbacks/weight_averaging.py``, timm's ``checkpoint_saver.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clipdeploy.core.errors import CheckpointError
from clipdeploy.models.checkpoints.foreign import (
    adapter_error,
    foreign_error,
    listed,
    unknown_error,
)
from clipdeploy.models.checkpoints.layouts import LAYOUTS, Layout

__all__ = ["FoundModel", "select_model"]

# Levels of nested dictionaries that are searched; real checkpoints have three.
_MAX_LEVELS = 8
_NO_WEIGHTS = re.compile(r"optim|message_hub|scheduler|^meta$|^args$|scaler|callbacks|^loops$")
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?|swa)([._]|$)", re.IGNORECASE)
# Lightning modules save their losses and metrics.
_HARMLESS = re.compile(
    r"(.*\.)?((criterion|loss\w*|\w*metrics?|\w*acc(uracy)?\w*|\w*auroc|confmat)\..*"
    r"|n_averaged|steps)"
)
# The names of a head beside a tower; numbers are those of torch.nn.Sequential.
_HEADS = re.compile(
    r"((.*\.)?(head|fc|classifier|classification_head|linear|\d+))\.weight", re.IGNORECASE
)


@dataclass(frozen=True)
class FoundModel:
    """A model in a file: its layout, and its tensors under canonical names.

    ``place`` is where it is in the file, empty for a flat file without a prefix.  ``averaged`` says
    whether its weights are averaged; None if the file has only one kind.  ``head`` is the name of a
    head beside the tower, and ``left_out`` are names that do not change the logits.  ``inside`` has
    the model's tensors under the layout's names, ``beside`` the others under those of the file.
    """

    layout: Layout
    place: str
    nested: bool
    tensors: dict[str, Tensor]
    unknown: tuple[str, ...] = ()
    averaged: bool | None = None
    head: str = ""
    left_out: tuple[str, ...] = ()
    inside: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidate:
    """A model's layout and prefix in a state dict, which ``key`` names in the file."""

    key: str
    entries: Mapping[str, Any]
    layout: Layout
    prefix: str
    averaged: bool

    @property
    def names(self) -> list[str]:
        """The model's names in its layout, without the prefix."""
        inside = (n.removeprefix(self.prefix) for n in self.entries if n.startswith(self.prefix))
        return [name for name in inside if self.layout.rename(name) is not None]

    @property
    def place(self) -> str:
        return ".".join(filter(None, (self.key, self.prefix.rstrip("."))))


def select_model(
    loaded: Any, path: Path, ema: bool | None = None, *, tower: bool = False
) -> FoundModel:
    """Find the one model in the object that a file contains.

    ``ema`` selects averaged weights (True) or the others (False) if a file has both; None prefers
    the averaged ones, as timm does.  A ``tower`` is CLIP's image tower, which has no head; the
    other tensors of its file belong to the text tower and are in ``beside``.

    Raises:
        CheckpointError: there is no model, more than one, or a tensor that would be ignored.
    """
    states = dict(_states(loaded, "", 0, set()))
    if not states:
        raise CheckpointError(
            f"{path} contains no state dict", hint="pass the checkpoint of a ViT classifier"
        )
    candidates = [each for key in states for each in _candidates(key, states[key], loaded)]
    if not candidates:
        entries = max(states.values(), key=len)
        _refuse_other_entries(entries, path)
        raise unknown_error(path, entries)
    chosen = _chosen(candidates, path, ema)
    both = len({each.averaged for each in candidates}) > 1
    chosen = replace(chosen, entries=_without_other_kind(chosen, candidates))
    averaged = chosen.averaged if both or chosen.averaged else None
    return (_tower if tower else _found)(chosen, path, averaged)


def _states(
    value: Any, key: str, level: int, seen: set[int]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each mapping that contains tensors, with its key in the file."""
    # A pickled dictionary can contain itself.
    if not isinstance(value, Mapping) or id(value) in seen or level > _MAX_LEVELS:
        return
    seen.add(id(value))
    if any(isinstance(inner, Tensor) for inner in value.values()):
        yield key, value
    for name, inner in value.items():
        if not _NO_WEIGHTS.search(name):
            yield from _states(inner, f"{key}.{name}".strip("."), level + 1, seen)


def _candidates(key: str, entries: Mapping[str, Any], loaded: Any) -> Iterator[_Candidate]:
    exchanged = _exchanged(loaded)
    for layout in LAYOUTS:
        for prefix in layout.prefixes(entries):
            averaged = bool(_AVERAGED.search(f"{key}.{prefix}")) or "n_averaged" in entries
            if key in exchanged:
                averaged = exchanged[key]
            backup = _mmcv_backup(entries, prefix)
            yield _Candidate(key, entries, layout, prefix, averaged or bool(backup))
            if backup:
                yield _Candidate(f"{key}.ema_*".strip("."), backup, layout, prefix, False)


def _exchanged(loaded: Any) -> dict[str, bool]:
    """Of tools that exchange both kinds of weights: state dict -> whether it is averaged."""
    if not isinstance(loaded, Mapping):
        return {}
    if "current_model_state" in loaded:
        return {"state_dict": True, "current_model_state": False}
    ema = loaded.get("ema_state_dict")
    meta = loaded.get("meta")
    mmengine = "message_hub" in loaded or (isinstance(meta, Mapping) and "mmengine_version" in meta)
    if isinstance(ema, Mapping) and (mmengine or "steps" in ema):
        return {"state_dict": True, "ema_state_dict": False}
    return {}


def _mmcv_backup(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The weights that mmcv's EMAHook has put aside, under the names of the model."""
    saved = {name: f"{prefix}ema_{name.removeprefix(prefix).replace('.', '_')}" for name in entries}
    pairs = {name: entries[other] for name, other in saved.items() if other in entries}
    return (
        {**{name: entries[name] for name in saved if "ema_" not in name}, **pairs} if pairs else {}
    )


def _chosen(candidates: list[_Candidate], path: Path, ema: bool | None) -> _Candidate:
    kinds = {each.averaged for each in candidates}
    if ema is not None and ema not in kinds:
        raise CheckpointError(
            f"{path} has no {'averaged (EMA)' if ema else 'other than averaged (EMA)'} weights",
            hint=f"leave out {'--ema' if ema else '--no-ema'}",
        )
    wanted = ema if ema is not None else max(kinds)
    fitting = [each for each in candidates if each.averaged == wanted]
    if len(fitting) > 1:
        places = ", ".join(each.place or "the top level" for each in fitting)
        raise CheckpointError(
            f"{path} contains {len(fitting)} models: {places}",
            hint="save the state dict of one of them",
        )
    return fitting[0]


def _without_other_kind(chosen: _Candidate, candidates: list[_Candidate]) -> Mapping[str, Any]:
    """The state dict of ``chosen`` without the other kind of weights: ``model.``, ``model_ema.``"""
    others = {
        each.prefix + name
        for each in candidates
        if each.entries is chosen.entries and each.averaged != chosen.averaged
        for name in each.names
    }
    own = {chosen.prefix + name for name in chosen.names}
    return {n: value for n, value in chosen.entries.items() if n in own or n not in others}


def _inside(chosen: _Candidate, path: Path) -> dict[str, Any]:
    """The tensors behind the candidate's prefix, under the layout's names."""
    _refuse_other_entries(chosen.entries, path)
    if (error := adapter_error(path, chosen.entries)) is not None:
        raise error
    prefix = chosen.prefix
    return {n.removeprefix(prefix): v for n, v in chosen.entries.items() if n.startswith(prefix)}


def _tower(chosen: _Candidate, path: Path, averaged: bool | None) -> FoundModel:
    entries, prefix = chosen.entries, chosen.prefix
    inside = _inside(chosen, path)
    tensors, unknown = chosen.layout.renamed(inside)
    beside = [n for n in entries if not n.startswith(prefix)] + [prefix + n for n in unknown]
    if "head.weight" in tensors:
        raise CheckpointError(
            f"{path} is a classifier with a head of its own, not a CLIP with a text tower",
            hint="pass CLIP's checkpoint, or export the file as the classifier that it is",
        )
    return FoundModel(
        chosen.layout,
        chosen.place,
        bool(chosen.key),
        tensors,
        averaged=averaged,
        inside=inside,
        beside={name: entries[name] for name in beside},
    )


def _found(chosen: _Candidate, path: Path, averaged: bool | None) -> FoundModel:
    entries, prefix, layout = chosen.entries, chosen.prefix, chosen.layout
    inside = _inside(chosen, path)
    tensors, unknown = layout.renamed(inside)
    beside = [n for n in entries if not n.startswith(prefix)] + [prefix + n for n in unknown]
    head = _head_beside(tensors, entries, beside)
    for part in ("weight", "bias"):
        if head and f"{head}.{part}" in entries:
            tensors[f"head.{part}"] = entries[f"{head}.{part}"]
            beside.remove(f"{head}.{part}")
    left_out = [n for n in beside if _HARMLESS.fullmatch(n) or layout.outside.fullmatch(n)]
    ignored = [n for n in beside if n not in left_out]
    if (error := foreign_error(path, ignored)) is not None:
        raise error
    if "head.weight" not in tensors:
        raise _headless(path, entries, ignored)
    outside = [n for n in ignored if not n.startswith(prefix)]
    if outside:
        raise CheckpointError(
            f"{path} contains tensors beside the model, which may change its logits: "
            f"{listed(outside)}",
            hint="save only the classifier's state dict",
        )
    reported = tuple(n for n in left_out if _HARMLESS.fullmatch(n))
    return FoundModel(
        layout,
        chosen.place,
        bool(chosen.key),
        tensors,
        tuple(n.removeprefix(prefix) for n in ignored),
        averaged,
        head,
        reported,
        inside,
    )


def _headless(path: Path, entries: Mapping[str, Any], ignored: list[str]) -> CheckpointError:
    if any(name.endswith("token_embedding.weight") for name in entries):
        return CheckpointError(
            f"{path} contains a CLIP without a classification head",
            hint="pass --zero-shot CLASSES to make a classifier of class texts, or a fine-tune",
        )
    found = f"none of {listed(ignored)} fits one" if ignored else "a backbone for features"
    return CheckpointError(
        f"{path} contains a ViT without a classification head: {found}",
        hint="save the whole classifier; a head in another file must be joined with it first",
    )


def _head_beside(tensors: Mapping[str, Any], entries: Mapping[str, Any], beside: list[str]) -> str:
    """The name of the one linear layer beside the tower that fits its features; else empty."""
    if "head.weight" in tensors:
        return ""
    last = tensors.get("proj", tensors.get("norm.weight"))
    features = last.shape[-1] if isinstance(last, Tensor) and last.ndim else -1
    fitting = [
        found[1]
        for name in beside
        if (found := _HEADS.fullmatch(name))
        and entries[name].ndim == 2
        and entries[name].shape[1] == features
    ]
    return fitting[0] if len(fitting) == 1 else ""


def _refuse_other_entries(entries: Mapping[str, Any], path: Path) -> None:
    wrong = [name for name, value in entries.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(
            f"{path} contains entries that are not tensors: {listed(wrong)}",
            hint="save only the model's state dict",
        )
