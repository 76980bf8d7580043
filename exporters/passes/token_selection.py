"""Selects one token of each row in one node.

    Gather(GatherElements(x, Expand(Unsqueeze(i))), 0) = GatherND(x, i)       axis 1, batch_dims 1

``i`` (B, 1) has the index of a token for each row of ``x`` (B, N, C).  torch.onnx has no operator
for it: ``x.gather(1, i)`` needs an index for each of the C channels.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.initializers import remove_unused

__all__ = ["SelectTokens"]


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of this kind that makes ``value``, if nothing else reads it."""
    node = value.producer() if value is not None else None
    if node is None or value is None or node.op_type != kind:
        return None
    return node if len(value.consumers()) == 1 and not value.is_graph_output() else None


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = value.const_value if value is not None else None
    return None if tensor is None else [int(each) for each in tensor.numpy().reshape(-1)]


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0)


class SelectTokens(ir.passes.InPlacePass):
    """See the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model`` in place; see the module's docstring."""
        found = [chain for node in model.graph if (chain := self._match(node))]
        for chain in found:
            last, elements, _, first = chain
            values = [elements.inputs[0], first.inputs[0]]
            made = ir.node("GatherND", values, {"batch_dims": 1})
            # The module's path, which the node is named after.
            made.metadata_props.update(last.metadata_props)
            old, new = last.outputs[0], made.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            model.graph.insert_before(last, made)
            ir.convenience.replace_all_uses_with(old, new)
            model.graph.remove(chain, safe=True)
        if found:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, modified=bool(found))

    @staticmethod
    def _match(node: ir.Node) -> tuple[ir.Node, ...] | None:
        """The four nodes of the equation, the last one first."""
        if node.op_type != "Gather" or _axis(node) != 1 or node.outputs[0].is_graph_output():
            return None
        index = node.inputs[1]
        if _constant(index) != [0] or index is None or index.shape is None or len(index.shape):
            return None
        elements = _producer(node.inputs[0], "GatherElements")
        if elements is None or _axis(elements) != 1:
            return None
        expand = _producer(elements.inputs[1], "Expand")
        unsqueeze = _producer(expand.inputs[0], "Unsqueeze") if expand else None
        if expand is None or unsqueeze is None or _constant(unsqueeze.inputs[1]) not in ([2], [-1]):
            return None
        tokens, indices = elements.inputs[0], unsqueeze.inputs[0]
        if tokens is None or indices is None or tokens.shape is None or len(tokens.shape) != 3:
            return None
        # Only if each channel has the index of its token.
        if _constant(expand.inputs[1]) != [1, 1, tokens.shape[2]]:
            return None
        known = indices.shape is not None and list(indices.shape)[1:] == [1]
        return (node, elements, expand, unsqueeze) if known else None
