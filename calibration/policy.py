"""Selects the nodes to quantise by their role in the block, not by operator type.

The Linears of the blocks are quantised: ``attn.qkv``, ``attn.proj``, ``mlp.fc1`` and ``mlp.fc2``;
on request also attention's two products in all blocks but the last, the patch convolution and the
head.  Residual Adds, LayerNorm, softmax and GELU never are: quantised residuals ruin INT8 on ViTs
(onnxsim#1742: 85 % with only the Linears quantised, 5 % with the defaults).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from clipdeploy.core.display import Renderable, Shown, columns
from clipdeploy.core.errors import GraphError

__all__ = [
    "HEAD",
    "PATCH",
    "LinearSite",
    "Placement",
    "PlacementEntry",
    "ProductSite",
    "Scope",
    "find_linears",
    "find_node",
    "find_products",
    "find_sums",
    "is_output",
    "observed_tensors",
    "place",
    "qkv_output",
]

HEAD, PATCH = "head", "patch_embed"
# TensorRT-RTX (1.7) fuses no 8-bit products with one row: in INT8 they would take more kernels than
# in FP16, and those of FP8 are computed in FP16.
_ONE_ROW = "only the class token leaves the last block"
_BLOCK_LINEAR = re.compile(r"^blocks\.(\d+)\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$")
_BLOCK_NUMBER = re.compile(r"^blocks\.\d+")
# The Linears whose outputs no residual is added to.
_WITH_OUTPUTS = ("attn.qkv", "mlp.fc1")
_OUTPUT = "/output"
_ATTENTION = re.compile(r"^blocks\.(\d+)\.attn$")


@dataclass(frozen=True)
class Scope:
    """What to quantise besides the Linears of the blocks.

    ``outputs``: the sums of each quantised qkv and fc1, before their bias.
    """

    attention: bool = False
    head: bool = False
    patch: bool = False
    outputs: bool = False


@dataclass(frozen=True)
class ProductSite:
    """A product of two activations: ``blocks.7.attn.scores`` = q k^T, ``.mix`` = softmax v."""

    name: str
    role: str
    block: int
    node: ir.Node


@dataclass(frozen=True)
class LinearSite:
    """One Linear: ``x @ weight (Cin, Cout) + bias (Cout,)``; the node ``add`` adds the bias.

    ``activation`` is x in the FP32 graph; it does not change if nodes are inserted before the
    MatMul.
    """

    name: str
    role: str
    block: int
    matmul: ir.Node
    activation: ir.Value
    add: ir.Node | None

    @property
    def weight(self) -> ir.Value:
        """The MatMul's current weight input."""
        value = self.matmul.inputs[1]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        """The current bias input of ``add``; None without a bias."""
        return None if self.add is None else self.add.inputs[1]

    @property
    def output(self) -> ir.Value:
        """The Linear's output, after the bias."""
        return (self.add or self.matmul).outputs[0]


@dataclass(frozen=True)
class PlacementEntry:
    """Whether a Linear or product is quantised, and the reason if it is not."""

    name: str
    role: str
    quantized: bool
    reason: str = ""


@dataclass(frozen=True)
class Placement(Shown):
    """The placement report: one entry for each node that could be quantised."""

    entries: tuple[PlacementEntry, ...]

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the quantised Linears and products."""
        return tuple(entry.name for entry in self.entries if entry.quantized)

    def without(self, reasons: Mapping[str, str]) -> Placement:
        """This placement with the names in ``reasons`` not quantised, each for its reason."""
        return Placement(
            tuple(
                replace(entry, quantized=False, reason=reasons[entry.name])
                if entry.name in reasons
                else entry
                for entry in self.entries
            )
        )

    def __rich__(self) -> Renderable:
        counts = Counter(
            (_BLOCK_NUMBER.sub("blocks.*", entry.name), entry.quantized, entry.reason)
            for entry in self.entries
        )
        rows = [
            (name, str(count), "yes" if quantized else "no", reason)
            for (name, quantized, reason), count in counts.items()
        ]
        titles = ("what", "count", "quantised", "why not")
        return columns(titles, rows, left=("what", "quantised", "why not"))


def _bias_add(matmul: ir.Node) -> ir.Node | None:
    consumers = matmul.outputs[0].consumers()
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    value = consumers[0].inputs[1]
    return consumers[0] if value is not None and value.is_initializer() else None


def find_linears(model: ir.Model) -> list[LinearSite]:
    """All Linears of the blocks in graph order.

    Raises:
        GraphError: there are none, so clipdeploy did not export the graph.
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
        add = _bias_add(node)
        sites.append(LinearSite(name, match[2], int(match[1]), node, activation, add))
    if not sites:
        raise GraphError(
            "the graph has no Linear named blocks.N.attn.qkv, .attn.proj, .mlp.fc1 or .mlp.fc2",
            hint="use an FP32 graph that `clipdeploy export` wrote",
        )
    return sites


def find_products(model: ir.Model) -> list[ProductSite]:
    """Attention's two products of all blocks in graph order."""
    found = []
    for node in model.graph:
        match = _ATTENTION.match((node.name or "").rpartition("/")[0])
        if node.op_type != "MatMul" or match is None:
            continue
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        role = "attn.mix" if maker is not None and maker.op_type == "Softmax" else "attn.scores"
        found.append(ProductSite(f"blocks.{match[1]}.{role}", role, int(match[1]), node))
    return found


def find_node(model: ir.Model, name: str, kind: str) -> ir.Node | None:
    """The node of module ``name`` (:data:`HEAD` or :data:`PATCH`) with operator ``kind``."""
    return next((n for n in model.graph if n.op_type == kind and n.name == f"{name}/{kind}"), None)


def find_sums(model: ir.Model, names: Iterable[str]) -> list[tuple[str, ir.Value]]:
    """The MatMul outputs of the qkv and fc1 among the Linears ``names``, before ratio and bias."""
    found = []
    for name in names:
        if name.endswith(_WITH_OUTPUTS) and (node := find_node(model, name, "MatMul")) is not None:
            found.append((name, node.outputs[0]))
    return found


def qkv_output(name: str) -> str:
    """The name of the qkv Linear's output in a calibration table."""
    return f"{name}{_OUTPUT}"


def is_output(name: str) -> bool:
    """Whether ``name`` in a calibration table is an output, not the input of a Linear."""
    return name.endswith(_OUTPUT)


def observed_tensors(model: ir.Model) -> list[tuple[str, ir.Value]]:
    """The tensors that calibration observes, with their names in the table.

    These are the input of each Linear, named after the Linear, the output of qkv for attention's
    products, and the head's input: enough for any choice of nodes to quantise.
    """
    tensors = []
    for site in find_linears(model):
        tensors.append((site.name, site.activation))
        if site.role == "attn.qkv":
            tensors.append((qkv_output(site.name), site.output))
    head = find_node(model, HEAD, "Gemm")
    if head is not None and head.inputs[0] is not None:
        tensors.append((HEAD, head.inputs[0]))
    return tensors


def place(model: ir.Model, exclude: tuple[str, ...] = (), scope: Scope = Scope()) -> Placement:
    """Decide which nodes to quantise; ``exclude`` lists name patterns like ``blocks.0.*``.

    Raises:
        GraphError: a pattern matches nothing, or the graph has no Linears.
    """
    sites = find_linears(model)
    candidates = [(site.name, site.role, "") for site in sites]
    if find_node(model, PATCH, "Conv") is not None:
        candidates.insert(0, (PATCH, PATCH, "" if scope.patch else _not_requested("patch")))
    products = find_products(model)
    last = max((product.block for product in products), default=0)
    for product in products:
        reason = "" if scope.attention else _not_requested("attention")
        if scope.attention and product.block == last:
            reason = _ONE_ROW
        candidates.append((product.name, product.role, reason))
    if find_node(model, HEAD, "Gemm") is not None:
        candidates.append((HEAD, HEAD, "" if scope.head else _not_requested("head")))
    _check_patterns(exclude, [name for name, _, _ in candidates], sites[0].name)
    entries = []
    for name, role, reason in candidates:
        hit = next((p for p in exclude if fnmatchcase(name, p)), None)
        reason = f"excluded by {hit!r}" if hit else reason
        entries.append(PlacementEntry(name, role, not reason, reason))
    return Placement(tuple(entries))


def _not_requested(what: str) -> str:
    return f"not requested with --quantize-{what}"


def _check_patterns(patterns: Iterable[str], names: list[str], example: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise GraphError(
                f"--exclude {pattern!r} matches no Linear",
                hint=f"use names like {example}, or patterns like 'blocks.0.*'",
            )
