"""The public Python API as text: what a caller can pass, and what he gets.

Nothing names a module, so that a move of modules changes nothing here.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

__all__ = ["python_api"]

# A default that has no text of its own: a function, or an object that only takes calls.
_UNNAMED = "..."


def python_api(module: ModuleType) -> dict[str, dict[str, Any]]:
    """Every name of ``__all__`` with its kind, its parameters in order and its public members."""
    return {name: _entry(getattr(module, name)) for name in sorted(module.__all__)}


def _entry(found: Any) -> dict[str, Any]:
    if inspect.isclass(found):
        return {"kind": _kind(found), **_constructor(found), "members": sorted(_members(found))}
    signature = inspect.signature(found)
    return {
        "kind": "function",
        "parameters": list(_parameters(signature)),
        "returns": _annotation(signature.return_annotation),
    }


def _kind(found: type) -> str:
    if getattr(found, "_is_protocol", False):
        return "protocol"
    if issubclass(found, Exception):
        return "exception"
    if not is_dataclass(found):
        return "class"
    return "frozen dataclass" if found.__dataclass_params__.frozen else "dataclass"


def _constructor(found: type) -> dict[str, list[str]]:
    if _kind(found) == "protocol":
        return {}
    if is_dataclass(found) and found.__dataclass_params__.init:
        return {"fields": [_field(each) for each in fields(found)]}
    return {"parameters": list(_parameters(inspect.signature(found)))}


def _field(field: Field[Any]) -> str:
    text = f"{field.name}: {_annotation(field.type)}"
    if field.default is not MISSING:
        text += f" = {_default(field.default)}"
    elif field.default_factory is not MISSING:
        text += f" = {_default(field.default_factory())}"
    marks = [] if field.init else ["not a parameter"]
    marks += ["keyword only"] if field.kw_only else []
    return f"{text}  ({', '.join(marks)})" if marks else text


def _members(found: type) -> Iterator[str]:
    """Methods with their parameters, properties and class attributes; none of Python's own."""
    known = {field.name for field in fields(found)} if is_dataclass(found) else set()
    ours = [each for each in found.__mro__ if each.__module__ not in ("builtins", "typing", "abc")]
    names = {name for each in ours for name in vars(each) if not name.startswith("_")}
    for name in names - known:
        yield _member(name, inspect.getattr_static(found, name))


def _member(name: str, member: Any) -> str:
    if isinstance(member, property | cached_property):
        getter = member.func if isinstance(member, cached_property) else member.fget
        return f"{name}: {_annotation(inspect.signature(getter).return_annotation)}"
    function = getattr(member, "__func__", member)
    if not inspect.isfunction(function):
        return f"{name} = {_default(member)}"
    signature = inspect.signature(function)
    # The first is self or cls, but for a static method.
    skipped = 0 if isinstance(member, staticmethod) else 1
    parameters = ", ".join(list(_parameters(signature))[skipped:])
    return f"{name}({parameters}) -> {_annotation(signature.return_annotation)}"


def _parameters(signature: inspect.Signature) -> Iterator[str]:
    """As they are written in a ``def``, the bare ``*`` included."""
    starred = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            yield "*"
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        yield _parameter(parameter)


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {_default(parameter.default)}"
    return text


class _WithoutModules(ast.NodeTransformer):
    """``np.ndarray`` as ``ndarray``."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Name(node.attr)


def _annotation(annotation: Any) -> str:
    """The text of the source, without the modules in front of names."""
    if annotation is inspect.Signature.empty:
        return "Any"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return ast.unparse(_WithoutModules().visit(ast.parse(text, mode="eval")))


def _default(value: Any) -> str:
    """The value's repr; of a configuration only what differs from its own defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        given = (each for each in fields(value) if _differs(each, getattr(value, each.name)))
        shown = ", ".join(f"{each.name}={_default(getattr(value, each.name))}" for each in given)
        return f"{type(value).__name__}({shown})"
    plain = value is None or isinstance(value, bool | int | float | str | tuple | list | dict)
    return repr(value) if plain else _UNNAMED


def _differs(field: Field[Any], value: Any) -> bool:
    if field.default_factory is not MISSING:
        return bool(value != field.default_factory())
    return bool(value != field.default)
