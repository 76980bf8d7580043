"""Checks docstrings of public functions: shapes of arrays and errors raised."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core import errors

__all__ = ["Rules", "array_names", "faults"]

ERRORS = frozenset(errors.__all__)
ARRAYS = frozenset({"NDArray", "Tensor", "ndarray", "ArrayLike"})
# (B, 3, S, S), (N,), [2, 32], the word "shape", or a scalar.
_AXIS = r"(?:\w+(?: ?[*/+-] ?\w+)*|\.{3})"
SHAPE = re.compile(
    rf"\({_AXIS},\)|[([]{_AXIS}(?:, {_AXIS})+[)\]]|\bshapes?\b|\bscalar|See :(?:class|func|meth):"
)
# Decorator of commands: it converts errors to exit codes, and the docstring is the help.
COMMAND = "stage_command"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Rules:
    """``arrays``: names of array types in annotations."""

    arrays: frozenset[str] = ARRAYS


def array_names(files: Iterable[Path]) -> frozenset[str]:
    """Return the array types and their aliases in ``files``: ``Logits = NDArray[np.float32]``."""
    found, classes = set(ARRAYS), set()
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes.add(node.name)
            elif isinstance(node, ast.Assign) and _is_array_type(node.value):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found - classes)


def _is_array_type(value: ast.expr) -> bool:
    return isinstance(value, ast.Subscript) and bool(_names(value.value) & ARRAYS)


def faults(source: str, where: str, rules: Rules = Rules()) -> list[str]:
    """Return a sentence for each omission in the docstrings of a module."""
    tree = ast.parse(source)
    return [f"{where}:{node.lineno} {text}" for node, text in _faults(tree, rules)]


def _faults(tree: ast.Module, rules: Rules) -> Iterator[tuple[ast.stmt, str]]:
    for node in tree.body:
        if isinstance(node, Function) and _public(node.name):
            yield from _of_function(node, node.name, "", rules)
        elif isinstance(node, ast.ClassDef) and _public(node.name):
            yield from _of_class(node, rules)


def _of_class(owner: ast.ClassDef, rules: Rules) -> Iterator[tuple[ast.stmt, str]]:
    about = ast.get_docstring(owner) or ""
    if not about:
        yield owner, f"{owner.name} has no docstring"
    for node in owner.body:
        if isinstance(node, Function):
            name = f"{owner.name}.{node.name}"
            if _public(node.name):
                yield from _of_function(node, name, about, rules)
            elif node.name in ("__init__", "__post_init__", "__call__"):
                # Special methods may be documented by their class.
                yield from _contents(node, name, about + (ast.get_docstring(node) or ""), rules)


def _of_function(
    node: Function, name: str, about: str, rules: Rules
) -> Iterator[tuple[ast.stmt, str]]:
    text = ast.get_docstring(node) or ""
    if not text:
        yield node, f"{name} has no docstring"
    elif not _calls(node.decorator_list, COMMAND):
        yield from _contents(node, name, text, rules, about)


def _contents(
    node: Function, name: str, text: str, rules: Rules, about: str = ""
) -> Iterator[tuple[ast.stmt, str]]:
    section = text.partition("Raises:")[2]
    for error in sorted(_raised(node)):
        if not re.search(rf"\b({error}|ClipdeployError)\b", section):
            yield node, f"{name} raises {error}, which its docstring does not list"
    for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
        if _is_array(argument.annotation, rules) and not SHAPE.search(text + about):
            yield node, f"{name} takes the array {argument.arg}, whose shape is not documented"
    if _is_array(node.returns, rules) and not SHAPE.search(text + about):
        yield node, f"{name} returns an array, whose shape is not documented"


def _is_array(annotation: ast.expr | None, rules: Rules) -> bool:
    return annotation is not None and bool(_names(annotation) & rules.arrays)


def _raised(function: Function) -> set[str]:
    """Return clipdeploy's errors that the function raises itself, without nested functions."""
    found, rest = set(), list(ast.iter_child_nodes(function))
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found |= _names(raised) & ERRORS
        if isinstance(node, ast.Try) and any(map(_catches_ours, node.handlers)):
            rest += [*node.handlers, *node.orelse, *node.finalbody]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            rest.extend(ast.iter_child_nodes(node))
    return found


def _catches_ours(handler: ast.ExceptHandler) -> bool:
    return handler.type is not None and "ClipdeployError" in _names(handler.type)


def _names(node: ast.AST) -> set[str]:
    named = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return named | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def _calls(decorators: list[ast.expr], name: str) -> bool:
    return any(name in _names(decorator) for decorator in decorators)


def _public(name: str) -> bool:
    return not name.startswith("_")
