"""Which nodes of a graph may run in INT8, decided by block role, not by operator type.

Quantised are the Linears of the blocks: ``attn.qkv``, ``attn.proj``, ``mlp.fc1``, ``mlp.fc2``.
Never the residual Adds, LayerNorm, softmax or GELU: quantised residuals are what kills INT8 on
ViTs (onnxsim#1742: 85 % with the Linears alone, 5 % with the defaults).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from exporters.errors import GraphError

__all__ = ["LinearSite", "Placement", "PlacementEntry", "find_linears", "place"]

_BLOCK_LINEAR = re.compile(r"^blocks\.(\d+)\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$")


@dataclass(frozen=True)
class LinearSite:
    """One Linear of the graph: ``x @ weight (Cin, Cout) + bias (Cout,)``."""

    name: str
    role: str
    block: int
    matmul: ir.Node
    activation: ir.Value
    weight: ir.Value
    bias: ir.Value | None


@dataclass(frozen=True)
class PlacementEntry:
    """Whether a Linear runs in INT8, and why not where it does not."""

    name: str
    role: str
    int8: bool
    reason: str = ""


@dataclass(frozen=True)
class Placement:
    """The placement report: one entry for each Linear, in the order of the graph."""

    entries: tuple[PlacementEntry, ...]

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the Linears that run in INT8."""
        return tuple(entry.name for entry in self.entries if entry.int8)


def _bias(matmul: ir.Node) -> ir.Value | None:
    consumers = matmul.outputs[0].consumers()
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    value = consumers[0].inputs[1]
    return value if value is not None and value.is_initializer() else None


def find_linears(model: ir.Model) -> list[LinearSite]:
    """Every Linear of the blocks, in the order of the graph.

    Raises:
        GraphError: the graph has none, so it was not exported by clipdeploy.
    """
    sites = []
    for node in model.graph:
        name = (node.name or "").rpartition("/")[0]
        match = _BLOCK_LINEAR.match(name)
        if node.op_type != "MatMul" or match is None:
            continue
        activation, weight = node.inputs
        if activation is None or weight is None or not weight.is_initializer():
            continue
        sites.append(
            LinearSite(name, match[2], int(match[1]), node, activation, weight, _bias(node))
        )
    if not sites:
        raise GraphError(
            "the graph has no Linear named blocks.N.attn.qkv, .attn.proj, .mlp.fc1 or .mlp.fc2",
            hint="quantise an FP32 graph that `clipdeploy export` wrote",
        )
    return sites


def place(sites: list[LinearSite], exclude: tuple[str, ...] = ()) -> Placement:
    """Decide for each Linear; ``exclude`` holds patterns such as ``blocks.0.*``.

    Raises:
        GraphError: a pattern that matches no Linear.
    """
    for pattern in exclude:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise GraphError(
                f"--exclude {pattern!r} matches no Linear",
                hint=f"names look like {sites[0].name}; patterns like 'blocks.0.*'",
            )
    entries = []
    for site in sites:
        hit = next((p for p in exclude if fnmatchcase(site.name, p)), None)
        reason = f"excluded by {hit!r}" if hit else ""
        entries.append(PlacementEntry(site.name, site.role, hit is None, reason))
    return Placement(tuple(entries))
