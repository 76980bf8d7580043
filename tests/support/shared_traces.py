"""Traces each architecture once in a process.

A trace of the demo takes most of an export's time, and depends on the architecture, not on the
weights.  :func:`shared_traces` traces a module of each architecture; later modules get a copy of
that graph with their own weights.  The graph passes, the checks of the graph and the comparison
with PyTorch run for each export, so a wrong weight fails there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

__all__ = ["Traced", "keep_traces", "shared_traces"]

_TORCH_EXPORT = torch.onnx.export
# By architecture, for the whole process.
_TRACED: dict[str, Traced] = {}


@dataclass(frozen=True)
class Traced:
    """A graph without weights; ``weights`` maps an initializer to its tensor, and if transposed."""

    model: ir.Model
    weights: dict[str, tuple[str, bool]]

    def with_weights(self, module: nn.Module) -> ir.Model:
        tensors = module.state_dict()
        model = self.model.clone()
        for name, (tensor, transposed) in self.weights.items():
            value = tensors[tensor].T.contiguous() if transposed else tensors[tensor]
            model.graph.initializers[name].const_value = TorchTensor(value, name)
        return model


@contextmanager
def shared_traces() -> Iterator[None]:
    """Let exports during the block share the traces of their architectures."""
    with mock.patch.object(torch.onnx, "export", _export):
        yield


def keep_traces() -> None:
    """Share the traces in this process from now on."""
    mock.patch.object(torch.onnx, "export", _export).start()


def _export(module: nn.Module, args: tuple[Tensor, ...], **options: Any) -> Any:
    key = repr((_architecture(module), [each.shape for each in args], options))
    if key not in _TRACED:
        program = _TORCH_EXPORT(module, args, **options)
        assert program is not None
        weights = _weights_of(program.model, module.state_dict())
        if weights is None:
            return program
        for name in weights:
            program.model.graph.initializers[name].const_value = None
        _TRACED[key] = Traced(program.model, weights)
        # Later garbage collections, one in each export, need not look at torch.onnx's objects.
        gc.collect()
        gc.freeze()
    return SimpleNamespace(model=_TRACED[key].with_weights(module))


def _architecture(module: nn.Module) -> list[tuple[str, str, str]]:
    """Everything that a forward pass may depend on, but for the weights."""
    own = set(nn.Module().__dict__)
    found = []
    for name, part in module.named_modules():
        fields = {key: value for key, value in part.__dict__.items() if key not in own}
        found.append((name, f"{type(part).__qualname__}", f"{part!r} {fields}"))
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}
    return [*found, ("", "", f"{shapes} {module.training}")]


def _weights_of(model: ir.Model, tensors: dict[str, Tensor]) -> dict[str, tuple[str, bool]] | None:
    """Which initializer holds which tensor; None if one tensor is in none, or in two."""
    values: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
        str(name): value.const_value.numpy
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    found = {name: (name, False) for name in tensors if name in values}
    for name in tensors.keys() - found.keys():
        transposed = tensors[name].numpy().T
        holders = [
            other for other in values.keys() - tensors.keys() if _equal(values[other](), transposed)
        ]
        if len(holders) != 1 or holders[0] in found:
            return None
        found[holders[0]] = (name, True)
    return found


def _equal(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Compare the first row first: a large model has many weights of each shape."""
    if one.shape != other.shape or not np.array_equal(one[:1], other[:1]):
        return False
    return np.array_equal(one, other)
