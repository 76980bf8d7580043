"""Names nodes, tensors and weights after the PyTorch module that they belong to.

torch.onnx stores the path of the traced module in each node's metadata
(``pkg.torch.onnx.name_scopes``).  The names are:

    node                ``blocks.7.mlp.fc2/MatMul``, ``blocks.7.attn/MatMul_1``
    its output          the same, or the module's name for the last node of a leaf module:
                        ``blocks.7.mlp.fc2``
    a folded weight     ``blocks.7.mlp.fc2.weight``

The root module is ``vit``, or ``text`` if the graph's input is ``ids``.  Calibration, inspection
and bisection depend on these names.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

from clipdeploy.core.passport import TOKENS

__all__ = ["SCOPES", "NameByModule", "scope_of"]

SCOPES = "pkg.torch.onnx.name_scopes"
_ANONYMOUS = "val_"


def scope_of(node: ir.Node) -> str:
    """Return the module path of a traced node; empty for the root module.

    A node made by torch.onnx's optimiser has no path, so that of its consumer is used.
    """
    if SCOPES in node.metadata_props:
        scopes = ast.literal_eval(node.metadata_props[SCOPES])
        return str(scopes[-2]) if len(scopes) > 1 else ""
    consumers = node.outputs[0].consumers() if node.outputs else ()
    return scope_of(consumers[0]) if consumers else ""


class NameByModule(ir.passes.InPlacePass):
    """See the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model`` in place; see the module's docstring."""
        graph = model.graph
        outputs = {id(value) for value in graph.outputs}
        scopes = {node: scope_of(node) for node in graph}
        last = {scope: node for node, scope in scopes.items()}
        parents = {scope.rpartition(".")[0] for scope in last}
        seen: Counter[str] = Counter()
        root = "text" if graph.inputs[0].name == TOKENS else "vit"
        for node, scope in scopes.items():
            base = f"{scope or root}/{node.op_type}"
            node.name = base if not seen[base] else f"{base}_{seen[base]}"
            seen[base] += 1
            leaf = scope and scope not in parents and last[scope] is node
            for index, output in enumerate(node.outputs):
                if id(output) not in outputs:
                    name = scope if leaf else node.name
                    output.name = name if len(node.outputs) == 1 else f"{name}:{index}"
            self._name_constants(graph, node, scope)
            node.metadata_props.clear()
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def _name_constants(graph: ir.Graph, node: ir.Node, scope: str) -> None:
        for value in node.inputs:
            if value is None or not value.is_initializer():
                continue
            if not (value.name or "").startswith(_ANONYMOUS):
                continue
            is_weight = node.op_type in ("MatMul", "Gemm") and len(value.shape or ()) == 2
            taken = graph.initializers
            name = f"{scope}.weight" if is_weight else f"{node.name}.constant"
            if name not in taken and value.name in taken:
                value.name = name
