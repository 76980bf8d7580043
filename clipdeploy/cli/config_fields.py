"""Defaults and choices of the configuration classes, for options and their help.

They are read from the source without importing it: most of these classes are in modules that import
PyTorch or ONNX, and ``--help`` must not wait for those.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["choices_of", "default_of", "value_of"]

_ROOT = Path(__file__).parents[2]


def default_of(config: str, field: str) -> Any:
    """The default of a field: ``default_of("calibration.scheme.SchemeConfig", "smooth")`` is True.

    Raises:
        LookupError: there is no such module, class or field, or the default is not a literal.
    """
    module = config.rpartition(".")[0]
    value = _field(config, field).value
    if value is None:
        raise LookupError(f"{config}.{field} has no default")
    return _evaluated(value, module)


def choices_of(config: str, field: str) -> tuple[str, ...]:
    """The values of a field of type ``Literal``, in their order.

    Raises:
        LookupError: there is no such field, or it is of another type.
    """
    node, module = _field(config, field).annotation, config.rpartition(".")[0]
    while isinstance(node, ast.Name | ast.BinOp):
        # ``Choices | None``, or the name of a type.
        node, module = (
            (node.left, module) if isinstance(node, ast.BinOp) else _named(node.id, module)
        )
    if not (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"):
        raise LookupError(f"{config}.{field} is not a Literal")
    found = ast.literal_eval(node.slice)
    return found if isinstance(found, tuple) else (found,)


def value_of(name: str) -> Any:
    """A constant of a module, by its full name.

    Raises:
        LookupError: there is no such constant, or it is not a literal.
    """
    module, _, constant = name.rpartition(".")
    return _evaluated(*_named(constant, module))


def _evaluated(node: ast.expr, module: str) -> Any:
    while isinstance(node, ast.Name):
        node, module = _named(node.id, module)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise LookupError(f"{ast.unparse(node)} in {module} is not a literal") from error


@cache
def _statements(module: str) -> list[ast.stmt]:
    path = _ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    try:
        return ast.parse(file.read_bytes()).body
    except OSError as error:
        raise LookupError(f"there is no module {module}") from error


def _field(config: str, field: str) -> ast.AnnAssign:
    module, _, name = config.rpartition(".")
    for statement in _statements(module):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            for part in statement.body:
                if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == field:
                    return part
    raise LookupError(f"{config} has no field {field!r}")


def _named(name: str, module: str) -> tuple[ast.expr, str]:
    """The expression that a name of a module stands for, and the module that it is in."""
    for statement in _statements(module):
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if name == (alias.asname or alias.name) and statement.module:
                    return _named(alias.name, statement.module)
        elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return statement.value, module
    raise LookupError(f"{module} has no constant {name!r}")
