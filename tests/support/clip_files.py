"""Small CLIPs with the weights of ``scripts/write_clip_oracles.py``, in their libraries' files."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from script_module import load_script
from torch import Tensor, nn

from clipdeploy.core.passport import ModelChoices

DATA = Path(__file__).parents[1] / "clipdeploy" / "models" / "clip" / "data"
SHAPES: dict[str, Any] = json.loads((DATA / "shapes.json").read_text())
SEEDS = {"transformers": 3, "open_clip": 4, "openai": 5}
LOGIT_SCALE = 50.0
# Library -> the choices that its file does not tell.
LIBRARIES = {
    "transformers": ModelChoices(),
    "open_clip": ModelChoices(gelu="erf"),
    "openai": ModelChoices(),
}
# Of the largest value; float32 and another order of sums.
TOLERANCE = 1e-4


class _Parameters(nn.Module):
    """A module with nothing but named parameters, some of them behind dots."""

    def __init__(self, shapes: list[tuple[str, list[int]]]) -> None:
        super().__init__()
        self._shapes = shapes
        self._made = [nn.Parameter(torch.zeros(shape)) for _, shape in shapes]

    def named_parameters(self, *given: Any, **named: Any) -> Any:
        return ((n, value) for (n, _), value in zip(self._shapes, self._made, strict=True))


class _Named(nn.Module):
    """A module with these tensors; a dot in a name is a module of its own."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            first, dot, rest = name.partition(".")
            if dot:
                parts.setdefault(first, {})[rest] = value
            else:
                self.register_buffer(name, value)
        for name, inside in parts.items():
            self.add_module(name, _Named(inside))

    def forward(self, x: Tensor) -> Tensor:
        return x


@cache
def clip_tensors(library: str) -> dict[str, Tensor]:
    """Name -> float32 tensor of the small CLIP of a library.  Read only."""
    module = _Parameters(SHAPES[library])
    load_script("write_checkpoint_oracles").fill(module, SEEDS[library])
    made = {name: value.detach() for name, value in module.named_parameters()}
    made["logit_scale"] = torch.tensor(LOGIT_SCALE).log()
    return made


def write_clip(library: str, folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a library's CLIP, or one with other tensors, into a folder; return its path."""
    tensors = clip_tensors(library) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{library}.pt"
    if library == "open_clip":
        torch.save(tensors, path)
        return path
    if library == "openai":
        sizes = {n: torch.tensor(1) for n in ("input_resolution", "context_length", "vocab_size")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.trace(_Named(tensors | sizes), torch.zeros(1)).save(str(path))
        return path
    half = {name: value.half().contiguous() for name, value in tensors.items()}
    half["logit_scale"] = tensors["logit_scale"]
    save_file(half, folder / "model.safetensors")
    common = {"hidden_act": "quick_gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-5}
    config = {"vision_config": common, "text_config": common}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def oracles() -> dict[str, NDArray[Any]]:
    """What the libraries computed; see the script."""
    return dict(np.load(DATA / "oracles.npz"))


def error(found: Tensor, expected: NDArray[np.float32]) -> float:
    """The largest difference as a part of the largest expected value."""
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())
