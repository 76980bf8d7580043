"""Every name of TensorRT that the code uses exists: in 10.13's stubs, and in TensorRT-RTX itself.

This says that the calls are spelt right, not that they work: docs/gpu.md lists what has been run.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipdeploy

SOURCE = Path(clipdeploy.__file__).parent
FILES = sorted(p for p in SOURCE.rglob("*.py") if "trt" in p.read_text() and p.name != "zoo.py")
# The names of variables for the backend's module.
MODULES = {"module", "_module", "trt"}
SUPPORT = Path(__file__).parents[2] / "support"
NAMES = json.loads((SUPPORT / "tensorrt_names.json").read_text())
# Only in TensorRT-RTX; the code checks with hasattr first.
RTX_ONLY = {("ComputeCapability",), ("ComputeCapability", "__members__")}

Use = tuple[str, ...]


def last_name(node: ast.AST) -> str:
    """``engine`` of both ``engine`` and ``self.engine``."""
    return getattr(node, "attr", getattr(node, "id", ""))


def classes_of(tree: ast.AST) -> dict[str, str]:
    """Variables and attributes annotated as ``trt.X`` -> X, for a whole file."""
    found = {}
    for node in ast.walk(tree):
        annotation = getattr(node, "annotation", None)
        if isinstance(annotation, ast.Attribute) and last_name(annotation.value) == "trt":
            name = node.arg if isinstance(node, ast.arg) else last_name(node.target)  # type: ignore[attr-defined]
            found[name] = annotation.attr
    return found


def uses(source: str) -> Iterator[Use]:
    """(class,), (class, attribute) or (function,) of each use of TensorRT."""
    tree = ast.parse(source)
    classes = classes_of(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        base = node.value
        if last_name(base) in MODULES and not node.attr.startswith("__"):
            yield (node.attr,)
        elif isinstance(base, ast.Attribute) and last_name(base.value) in MODULES:
            yield (base.attr, node.attr)
        elif last_name(base) in classes:
            yield (classes[last_name(base)], node.attr)


def missing(source: str) -> set[Use]:
    """The uses that are missing in TensorRT's stubs."""
    return {
        use
        for use in uses(source)
        if use not in RTX_ONLY
        and (use[0] not in NAMES or (len(use) == 2 and use[1] not in NAMES[use[0]]))
    }


def test_the_files_that_use_tensorrt_are_found() -> None:
    assert {"backends.py", "compiler.py", "engine.py"} <= {path.name for path in FILES}
    found = {use for path in FILES for use in uses(path.read_text())}
    assert {
        ("Runtime", "deserialize_cuda_engine"),
        ("IExecutionContext", "execute_async_v3"),
        ("MemoryPoolType", "WORKSPACE"),
        ("ICudaEngine", "create_engine_inspector"),
        ("nptype",),
    } <= found


def test_host_code_of_an_engine_is_never_enabled() -> None:
    name = "engine_host_code_allowed"
    assert name in NAMES["Runtime"]
    found = {use for path in FILES for use in uses(path.read_text())}
    assert not [use for use in found if name in use]
    assert ("Runtime", name) in set(uses(f"def f(runtime: trt.Runtime): runtime.{name} = True"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_tensorrt_10_has_every_name(path: Path) -> None:
    assert missing(path.read_text()) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_tensorrt_rtx_has_every_name(path: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="no wheel for this platform")
    for owner, *attribute in uses(path.read_text()):
        assert hasattr(rtx, owner), owner
        assert all(hasattr(getattr(rtx, owner), name) for name in attribute), (owner, attribute)


@pytest.mark.parametrize(
    "source",
    [
        "module.Runtimes(logger)",
        "self._module.MemoryPoolType.WORKSPCE",
        "def f(engine: trt.ICudaEngine): engine.create_execution_contxt()",
        "config.set_flag(trt.BuilderFlag.INT9)",
    ],
)
def test_a_misspelt_name_is_found(source: str) -> None:
    assert missing(source)
