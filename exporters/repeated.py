"""Traces two of many equal blocks, and repeats the second one in the graph.

Tracing takes as long for each block of a transformer, although its blocks differ only in their
weights:

    x_k = block(x_{k-1}; W_k)

Of each run of equal blocks only the first two are traced.  The nodes of the second one are copied
for the later ones: what it reads of the first block is what a copy reads of the block before it.
The traced two have random weights, no two of which are equal, so that each constant of the graph is
recognised as a weight or its transpose.  At last each block gets its own weights.

What a copy gets wrong, the parity check of an export finds: it compares the graph with the module.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.initializers import values_of
from exporters.passes.naming import SCOPES, scope_of

__all__ = ["Run", "UnrepeatableError", "repeat_blocks", "runs_of", "shortened"]

# Fields of the class itself, which say nothing of what a module computes.
_COMMON = frozenset(nn.Module().__dict__)


class UnrepeatableError(Exception):
    """The traced blocks do not form a chain of equal blocks."""


@dataclass(frozen=True)
class Run:
    """The equal modules number ``first`` to ``last`` of the ModuleList ``path``; at least three."""

    path: str
    first: int
    last: int

    def block(self, index: int) -> str:
        """Return the path of a block."""
        return f"{self.path}.{index}"

    @property
    def traced(self) -> tuple[int, int]:
        """The two blocks that are traced."""
        return self.first, self.first + 1

    @property
    def copied(self) -> range:
        """The blocks that are copies of the second one."""
        return range(self.first + 2, self.last + 1)


def runs_of(module: nn.Module) -> tuple[Run, ...]:
    """Return the runs of at least three equal modules in the ModuleLists of ``module``."""
    lists = ((n, part) for n, part in module.named_children() if isinstance(part, nn.ModuleList))
    return tuple(run for name, blocks in lists for run in _runs(name, list(blocks)))


def _runs(path: str, blocks: Sequence[nn.Module]) -> Iterator[Run]:
    first = 0
    for index in range(1, len(blocks) + 1):
        if index < len(blocks) and _alike(blocks[first], blocks[index]):
            continue
        if index - first > 2:
            yield Run(path, first, index - 1)
        first = index


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules can differ in nothing but the values of their parameters."""
    if any(True for block in (one, other) for _ in block.buffers()):
        return False
    return _structure(one) == _structure(other)


def _structure(block: nn.Module) -> list[tuple[object, ...]]:
    """All that a block's result depends on, but for the values of its parameters."""
    parts: list[tuple[object, ...]] = []
    for name, part in block.named_modules():
        fields = {key: value for key, value in vars(part).items() if key not in _COMMON}
        own = part.named_parameters(recurse=False)
        shapes = [(key, each.shape, each.dtype) for key, each in own]
        parts.append((name, type(part), part.training, fields, shapes))
    return parts


def shortened(module: nn.Module, runs: Sequence[Run]) -> nn.Module:
    """Return ``module`` without the blocks of ``runs`` that are copied.

    The others keep their paths.  The traced blocks have random weights; all other modules are those
    of ``module``.
    """
    generator = torch.Generator().manual_seed(0)
    short = copy.copy(module)
    short._modules = dict(module._modules)
    for run in runs:
        kept = dict(short.get_submodule(run.path)._modules)
        for index in run.copied:
            del kept[str(index)]
        for index in run.traced:
            kept[str(index)] = _randomised(module.get_submodule(run.block(index)), generator)
        short._modules[run.path] = nn.ModuleList()
        short.get_submodule(run.path)._modules = kept
    return short


def _randomised(block: nn.Module, generator: torch.Generator) -> nn.Module:
    # deepcopy takes what is in its memo for a copy.
    weights = {
        id(each): nn.Parameter(torch.rand(each.shape, generator=generator, dtype=each.dtype))
        for each in block.parameters()
    }
    return copy.deepcopy(block, weights)


def repeat_blocks(
    model: ir.Model, short: nn.Module, module: nn.Module, runs: Sequence[Run]
) -> None:
    """Make the graph of ``module`` of the graph of ``short``, in place.

    Args:
        model: what torch.onnx traced of ``short``; its nodes have the paths of their modules.
        short: ``shortened(module, runs)``.

    Raises:
        UnrepeatableError: the nodes of the traced blocks differ, other than one tensor goes from
            the first to the second, or a weight is not in the graph.
    """
    for run in runs:
        _repeat(model.graph, run, short, module)


def _repeat(graph: ir.Graph, run: Run, short: nn.Module, module: nn.Module) -> None:
    first, second = (_nodes_in(graph, run.block(index)) for index in run.traced)
    passed, result = _passed(first, second)
    weights = [
        _weights(nodes, short.get_submodule(run.block(index)))
        for index, nodes in zip(run.traced, (first, second), strict=True)
    ]
    readers = result.uses()
    end, previous = second[-1], result
    for index in run.copied:
        block = module.get_submodule(run.block(index))
        known = {passed: previous, **_copied_weights(graph, weights[1], run, index)}
        nodes = [_copied_node(node, known, run, index) for node in second]
        graph.insert_after(end, nodes)
        end, previous = nodes[-1], known[result]
        _fill({known[value]: weight for value, weight in weights[1].items()}, block)
    for reader, place in readers:
        reader.replace_input_with(place, previous)
    for index, found in zip(run.traced, weights, strict=True):
        _fill(found, module.get_submodule(run.block(index)))


def _nodes_in(graph: ir.Graph, block: str) -> list[ir.Node]:
    return [node for node in graph if f"{scope_of(node)}.".startswith(f"{block}.")]


def _passed(first: Sequence[ir.Node], second: Sequence[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """The tensor that the first block passes to the second, and that which the second passes on."""
    if [node.op_type for node in first] != [node.op_type for node in second]:
        raise UnrepeatableError("the nodes of two equal blocks differ")
    passed, result = _read_outside(first), _read_outside(second)
    places = [_place(value, nodes) for value, nodes in ((passed, first), (result, second))]
    if places[0] != places[1] or not {node for node, _ in passed.uses()} <= {*first, *second}:
        raise UnrepeatableError("another tensor than the block's output is read behind it")
    return passed, result


def _read_outside(nodes: Sequence[ir.Node]) -> ir.Value:
    made = [value for node in nodes for value in node.outputs]
    inside = set(nodes)
    read = [each for each in made if any(reader not in inside for reader, _ in each.uses())]
    if len(read) != 1 or any(each.is_graph_output() for each in made):
        raise UnrepeatableError(f"{len(read)} tensors of a block are read behind it")
    return read[0]


def _place(value: ir.Value, nodes: Sequence[ir.Node]) -> tuple[int, int | None]:
    """Number of the node that makes ``value``, and of its output."""
    maker = value.producer()
    assert maker is not None
    return nodes.index(maker), value.index()


@dataclass(frozen=True)
class _Weight:
    """A parameter of a block, in a graph as it is or transposed."""

    name: str
    transposed: bool

    def of(self, block: nn.Module) -> Tensor:
        weight = block.get_parameter(self.name).detach()
        return weight.T if self.transposed else weight


def _weights(nodes: Sequence[ir.Node], block: nn.Module) -> dict[ir.Value, _Weight]:
    """Which constant of ``nodes`` is which parameter of ``block``; the others are no weights."""
    read = (value for node in nodes for value in node.inputs if value is not None)
    constants = [value for value in dict.fromkeys(read) if value.const_value is not None]
    found: dict[ir.Value, _Weight] = {}
    for name, parameter in block.named_parameters():
        turned = (False, True) if parameter.ndim == 2 else (False,)
        weights = [_Weight(name, transposed) for transposed in turned]
        equal = [(v, each) for v in constants for each in weights if _is(v, each.of(block))]
        if len(equal) != 1:
            raise UnrepeatableError(f"the weight {name} is not one constant of the graph")
        found |= dict(equal)
    return found


def _is(value: ir.Value, weight: Tensor) -> bool:
    if value.shape is None or list(value.shape) != list(weight.shape):
        return False
    return np.array_equal(values_of(value), weight.numpy())


def _copied_weights(
    graph: ir.Graph, weights: Mapping[ir.Value, _Weight], run: Run, index: int
) -> dict[ir.Value, ir.Value]:
    """An initializer of block ``index`` for each of the second block."""
    copies = {}
    for value in weights:
        name = _of_block(value.name or "", run, index)
        copies[value] = ir.Value(name=name, type=value.type, shape=value.shape)
        # Registered with the values that _fill replaces.
        copies[value].const_value = value.const_value
        graph.register_initializer(copies[value])
    return copies


def _of_block(name: str, run: Run, index: int) -> str:
    """The name for block ``index`` of what has ``name`` in the second block."""
    block = run.block(run.first + 1)
    if f"{name}.".startswith(f"{block}."):
        return run.block(index) + name.removeprefix(block)
    return f"{name}@{index}"


def _copied_node(node: ir.Node, known: dict[ir.Value, ir.Value], run: Run, index: int) -> ir.Node:
    """A copy of a node of the second block; ``known`` maps values to their copies, and grows."""
    outputs = [
        ir.Value(name=_of_block(value.name or "", run, index), type=value.type, shape=value.shape)
        for value in node.outputs
    ]
    known.update(zip(node.outputs, outputs, strict=True))
    copied = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else known.get(value, value) for value in node.inputs],
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
    )
    if SCOPES in node.metadata_props:
        scopes = ast.literal_eval(node.metadata_props[SCOPES])
        block = run.block(run.first + 1)
        inside = [
            _of_block(s, run, index) if f"{s}.".startswith(f"{block}.") else s for s in scopes
        ]
        copied.metadata_props[SCOPES] = repr(inside)
    return copied


def _fill(weights: Mapping[ir.Value, _Weight], block: nn.Module) -> None:
    """Give the constants the weights of ``block``."""
    for value, weight in weights.items():
        value.const_value = _tensor(weight.of(block), value.name)


def _tensor(weight: Tensor, name: str | None) -> ir.TensorProtocol:
    if weight.is_contiguous():
        return ir.Tensor(weight.numpy(), name=name)

    # Transposed when it is read, so that it is not in memory twice.  PyTorch is faster at it than
    # NumPy.
    def transposed() -> ir.TensorProtocol:
        return ir.Tensor(weight.contiguous().numpy(), name=name)

    kind = ir.tensor_adapters.from_torch_dtype(weight.dtype)
    return ir.LazyTensor(transposed, kind, ir.Shape(weight.shape), name=name)
