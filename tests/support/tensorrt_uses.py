"""Finds the names of TensorRT that a source file uses, and the calls that do not fit them.

A variable is known to be of TensorRT's class X if it is annotated ``trt.X``, assigned
``module.X`` or the result of a function that returns ``trt.X``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MODULES", "Names", "Use", "misfits", "missing", "uses"]

Names = dict[str, dict[str, str]]
# The names of variables for the backend's module.
MODULES = frozenset({"module", "_module", "trt"})
_SIGNATURE = re.compile(r"^(?:\d+\. )?\w+\((.*)\) -> (\S+)", re.MULTILINE)
_BRACKETS = {"(": 1, "[": 1, "<": 1, ")": -1, "]": -1, ">": -1}


@dataclass(frozen=True)
class Use:
    """A class or function of TensorRT, or its attribute, and how it is called, if it is.

    ``dropped`` says that nothing is done with the call's result.
    """

    owner: str
    attribute: str = ""
    line: int = 0
    arguments: tuple[int, frozenset[str]] | None = None
    dropped: bool = False

    @property
    def name(self) -> tuple[str, ...]:
        return (self.owner, self.attribute) if self.attribute else (self.owner,)


def _last(node: ast.AST) -> str:
    """``engine`` of both ``engine`` and ``self.engine``."""
    return str(getattr(node, "attr", getattr(node, "id", "")))


def _annotated(node: ast.AST | None) -> str:
    """X of an annotation such as ``trt.X``, ``trt.X | None`` or ``type[trt.X]``."""
    for each in ast.walk(node) if node else ():
        if isinstance(each, ast.Attribute) and _last(each.value) == "trt":
            return each.attr
    return ""


class _Finder(ast.NodeVisitor):
    def __init__(self, tree: ast.AST) -> None:
        self.found: list[Use] = []
        self._scopes: list[dict[str, str]] = [{}]
        self._attributes: dict[str, str] = {}
        self._returns: dict[str, ast.expr] = {}
        self._calls: dict[int, tuple[ast.Call, list[ast.expr]]] = {}
        self._dropped: set[int] = set()
        for node in ast.walk(tree):
            self._collect(node)

    def _collect(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            self._returns[node.name] = node.returns
        elif isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and (name := _annotated(each.annotation)):
                    self._attributes[_last(each.target)] = name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            if name := _annotated(node.annotation):
                self._attributes[node.target.attr] = name
        elif isinstance(node, ast.Call):
            # partial(f, x) passes x to f.
            if _last(node.func) == "partial" and node.args:
                self._calls[id(node.args[0])] = node, node.args[1:]
            else:
                self._calls[id(node.func)] = node, node.args
        elif isinstance(node, ast.Expr):
            self._dropped.add(id(node.value))

    def _class_of(self, node: ast.expr) -> str:
        if isinstance(node, ast.Call):
            return _annotated(self._returns.get(_last(node.func)))
        if isinstance(node, ast.Attribute):
            if _last(node.value) in MODULES:
                return node.attr
            return self._attributes.get(node.attr, "")
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self._scopes) if node.id in s), "")
        return ""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        self._scopes.append({each.arg: _annotated(each.annotation) for each in arguments})
        self.generic_visit(node)
        self._scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        owner = next(filter(None, map(self._class_of, node.bases)), "")
        for each in node.body:
            if owner and isinstance(each, ast.FunctionDef):
                self.found.append(Use(owner, each.name, each.lineno))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name):
            self._scopes[-1][node.target.id] = _annotated(node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        pairs = [(node.targets[0], node.value)]
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        for target, value in pairs:
            if isinstance(target, ast.Name):
                self._scopes[-1][target.id] = self._class_of(value)
            elif isinstance(target, ast.Tuple):
                self._assign_results(target, value)
        self.generic_visit(node)

    def _assign_results(self, targets: ast.Tuple, call: ast.expr) -> None:
        returned = self._returns.get(_last(call.func)) if isinstance(call, ast.Call) else None
        parts = getattr(getattr(returned, "slice", None), "elts", ())
        for target, part in zip(targets.elts, parts, strict=False):
            if isinstance(target, ast.Name):
                self._scopes[-1][target.id] = _annotated(part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if _last(node.value) in MODULES:
            if not node.attr.startswith("__"):
                self._add(node, node.attr)
        elif owner := self._class_of(node.value):
            self._add(node, owner, node.attr)

    def _add(self, node: ast.Attribute, owner: str, attribute: str = "") -> None:
        call, positional = self._calls.get(id(node), (None, []))
        arguments = None
        if call and not any(isinstance(each, ast.Starred) for each in positional):
            arguments = len(positional), frozenset(k.arg or "" for k in call.keywords)
        dropped = call is not None and id(call) in self._dropped
        self.found.append(Use(owner, attribute, node.lineno, arguments, dropped))


def uses(source: str) -> tuple[Use, ...]:
    """Every use of TensorRT in a file, in order."""
    tree = ast.parse(source)
    finder = _Finder(tree)
    finder.visit(tree)
    return tuple(finder.found)


def missing(source: str, names: Names) -> set[tuple[str, ...]]:
    """The names that a file uses and ``names`` lacks."""
    return {
        use.name
        for use in uses(source)
        if use.owner not in names or (use.attribute and use.attribute not in names[use.owner])
    }


def _split(parameters: str) -> Iterator[str]:
    """The parameters of a signature, divided at the commas outside brackets."""
    depth, start = 0, 0
    for at, letter in enumerate(parameters):
        depth += _BRACKETS.get(letter, 0)
        if letter == "," and depth == 0:
            yield parameters[start:at].strip()
            start = at + 1
    yield parameters[start:].strip()


def _fits(arguments: tuple[int, frozenset[str]], parameters: str, *, bound: bool) -> bool:
    """Whether a call's arguments fit a signature; a bound method gets ``self`` without them."""
    given, keywords = arguments
    listed = [each for each in _split(parameters) if each]
    if bound and listed and re.match(r"self\b", listed[0]):
        del listed[0]
    named = {re.split(r"[:=\s]", each)[0]: "=" in each for each in listed}
    rest = list(named)[given:]
    needed = {name for name in rest if not named[name]}
    return given <= len(named) and keywords <= set(rest) and needed <= keywords


def misfits(source: str, names: Names) -> list[str]:
    """The calls whose arguments fit no signature, and those that drop a success of type bool."""
    found = []
    for use in uses(source):
        members = names.get(use.owner, {})
        member = use.attribute or ("__init__" if "__init__" in members else "__call__")
        overloads = _SIGNATURE.findall(members.get(member, ""))
        if use.arguments is None or not overloads:
            continue
        where = f"{use.line}: {'.'.join(use.name)}"
        # base.__init__(self) in a subclass passes it.
        bound = use.attribute != "__init__"
        if not any(_fits(use.arguments, text, bound=bound) for text, _ in overloads):
            found.append(f"{where} does not take {use.arguments}")
        if use.dropped and all(result == "bool" for _, result in overloads):
            found.append(f"{where} returns whether it succeeded")
    return found
