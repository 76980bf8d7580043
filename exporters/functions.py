"""Inlines the local functions of an ONNX model.

The tensors of a local function have no types: they depend on what each call passes in.
"""

from __future__ import annotations

import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, helper

from clipdeploy.core.errors import GraphError, first_line
from exporters.nested import all_nodes

__all__ = ["ONNX_ERRORS", "inlined"]

# Exceptions of onnx's C++ code; a failed assertion is a RuntimeError.
ONNX_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
)


def inlined(model: ModelProto, *, any_opset: bool = False) -> ModelProto:
    """Return ``model`` with each call of a local function replaced by the function's nodes.

    A function of another opset is converted to the model's.  If that fails and ``any_opset`` is
    set, its nodes are used without conversion, as in ONNX Runtime, which is enough to see which
    types occur.  A model without functions is returned unchanged.

    Raises:
        GraphError: a function is recursive, undefined or cannot be converted.
    """
    if not model.functions:
        return model
    model = _with_defaults(model)
    try:
        found = onnx.inliner.inline_local_functions(model, convert_version=True)
        if not found.functions:
            return found
        reason = "their opset cannot be converted to the graph's"
    except ONNX_ERRORS as error:
        reason = first_line(error)
    if any_opset:
        return _as_one_opset(model)
    names = ", ".join(f"{each.domain}::{each.name}" for each in model.functions[:3])
    raise GraphError(
        f"the local functions of the graph ({names}) cannot be inlined: {reason}",
        hint="inline them before, with onnx.inliner.inline_local_functions",
    )


def _function_key(node: NodeProto) -> tuple[str, str, str]:
    return (node.domain, node.op_type, node.overload)


def _with_defaults(model: ModelProto) -> ModelProto:
    """Return a copy in which every call of a function has all attributes with defaults.

    onnx's inliner drops an attribute that has a value only through the function's default.

    Raises:
        GraphError: a function passes on an attribute that its own caller left out.
    """
    whole = ModelProto()
    whole.CopyFrom(model)
    defaults = {
        (each.domain, each.name, each.overload): list(each.attribute_proto)
        for each in model.functions
    }
    passed_on: dict[tuple[str, str, str], set[str]] = {}
    for function in whole.functions:
        names = passed_on.setdefault((function.domain, function.name, function.overload), set())
        for node in all_nodes(ModelProto(functions=[function])):
            known = {each.name for each in defaults.get(_function_key(node), ())}
            names.update(a.ref_attr_name for a in node.attribute if a.name in known)
    for node in all_nodes(whole):
        key = _function_key(node)
        given = {attribute.name for attribute in node.attribute}
        missing = [each for each in defaults.get(key, ()) if each.name not in given]
        node.attribute.extend(missing)
        given.update(each.name for each in missing)
        if left_out := passed_on.get(key, set()) - given - {""}:
            raise GraphError(
                f"the call of {node.domain}::{node.op_type} leaves out {min(left_out)}, for which "
                "a function inside it has a default",
                hint="inline them with onnx.inliner.inline_local_functions first",
            )
    return whole


def _as_one_opset(model: ModelProto) -> ModelProto:
    plain = ModelProto()
    plain.CopyFrom(model)
    for function in plain.functions:
        own = {each.domain: each.version for each in function.opset_import}
        own |= {each.domain: each.version for each in model.opset_import if each.domain in own}
        del function.opset_import[:]
        function.opset_import.extend(helper.make_opsetid(*each) for each in own.items())
    try:
        return onnx.inliner.inline_local_functions(plain)
    except ONNX_ERRORS as error:
        raise GraphError(
            f"the local functions of the graph cannot be inlined: {first_line(error)}",
            hint="inline them before, with onnx.inliner.inline_local_functions",
        ) from error
