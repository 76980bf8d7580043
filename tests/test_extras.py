"""Extras against the code: what an import needs is installed, or its error names the extra."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from clipdeploy.core.errors import BuildError
from clipdeploy.engines import backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("exporters", "calibration", "clipdeploy")
# Extras that a contributor installs; the others belong to a feature.
TOOLS = {"test", "check", "docs"}
# Modules of what a requirement brings along, with that requirement.
BROUGHT = {"google": "onnx", "markupsafe": "jinja2"}


def setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def names(requirements: str) -> set[str]:
    lines = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    return {normal(Requirement(line).name) for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


REQUIRED = names(setup()["options"]["install_requires"])
EXTRAS = {name: names(text) for name, text in setup()["options.extras_require"].items()}
FEATURES = {name: found for name, found in EXTRAS.items() if name not in TOOLS}
INSTALLED = packages_distributions()


def sources() -> list[Path]:
    code = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    templates = ROOT / "clipdeploy" / "packaging" / "templates"
    return [*code, *sorted(templates.glob("*.py.txt"))]


def imports(node: ast.AST, guard: str = "") -> Iterator[tuple[str, str]]:
    """The top-level module of each import, and the handlers of the ``try`` around it.

    Without those for type checkers, and those of a module's own package.
    """
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Try):
        handlers = [ast.unparse(one) for one in node.handlers]
        guard = "\n".join(text for text in handlers if text.startswith("except ImportError"))
    if isinstance(node, ast.Import):
        yield from ((alias.name.partition(".")[0], guard) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield (node.module or "").partition(".")[0], guard
    for child in ast.iter_child_nodes(node):
        yield from imports(child, guard)


def faults(text: str) -> list[str]:
    """The imports that neither a requirement nor a named extra provides, with what is wrong."""
    found = []
    for module, guard in imports(ast.parse(text)):
        if module in sys.stdlib_module_names or module in PACKAGES:
            continue
        owners = {normal(name) for name in INSTALLED.get(module, [module])}
        if (owners | {BROUGHT.get(module)}) & REQUIRED:
            continue
        extras = [name for name, packages in FEATURES.items() if owners & packages]
        if not extras:
            found.append(f"{module}: in no extra")
        elif not any(f"clipdeploy[{name}]" in guard for name in extras):
            found.append(f"{module}: no hint names {' or '.join(extras)}")
    return found


def plain(text: str) -> str:
    """A template as Python: names for its names, without what it may insert before a line."""
    return re.sub(r"\$\w+", "NAME", re.sub(r"\$\{\w+\}", "", text))


def test_optional_imports_have_an_extra_and_a_hint() -> None:
    texts = {path: plain(path.read_text(encoding="utf-8")) for path in sources()}
    wrong = {path.relative_to(ROOT).as_posix(): faults(text) for path, text in texts.items()}
    assert len(wrong) > 100
    assert {name: found for name, found in wrong.items() if found} == {}


def test_an_import_without_an_extra_or_a_hint_is_caught() -> None:
    assert faults("import sklearn.datasets") == ["sklearn: in no extra"]
    assert faults("from scipy import io") == ["scipy: no hint names devkit"]
    guarded = "try:\n    import {}\nexcept ImportError:\n    raise SystemExit('{}')"
    assert faults(guarded.format("scipy", "pip install scipy"))
    assert faults(guarded.format("ray", "clipdeploy[devkit]"))
    assert not faults(guarded.format("scipy.io", "clipdeploy[devkit]"))


def test_each_extra_of_a_feature_is_used() -> None:
    hints = "\n".join(path.read_text(encoding="utf-8") for path in sources())
    assert [name for name in FEATURES if f"clipdeploy[{name}]" not in hints] == []


def test_what_the_features_need_is_there_for_the_tests() -> None:
    # TensorRT needs a GPU.
    wanted = {
        package for name, found in FEATURES.items() if name != "tensorrt" for package in found
    }
    assert wanted <= EXTRAS["test"]


def test_a_missing_tensorrt_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._MODULES, "tensorrt", "no_such_tensorrt")
    with pytest.raises(BuildError, match=r'pip install "clipdeploy\[tensorrt\]"'):
        backends.choose_backend("tensorrt")
