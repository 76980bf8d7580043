"""Tests passports that try to inject code, commands or lines into a package.

Covers: clipdeploy/packaging/dockerfile.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from clipdeploy.core.errors import ArtifactError, FileError
from clipdeploy.core.passport import PASSPORT_KEY, Passport
from clipdeploy.engines.passport import (
    EnginePassport,
    passport_path,
    read_engine_passport,
)
from clipdeploy.packaging.artifact import Packable, labels
from clipdeploy.packaging.client import client_source
from clipdeploy.packaging.dockerfile import dockerfile
from clipdeploy.stages.package import package_cpp, package_triton
from exporters.headers import read_passport

Json = dict[str, Any]
# Unescaped, each of these would become code, a command, a path or another line.
CRAFTED = [
    'image"; import os; os.abort(); "',
    "image'\nimport os\nos.abort()",
    "../../x",
    "/etc/x",
    "x\nRUN touch /tmp/x\n#",
    "$(touch x)",
    "`touch x`",
    "x; touch x",
    "x\u2028y",
    "x\x1b[2J",
    "",
    ".",
    "..",
    "-rf",
    "x" * 5000,
]
NAMES: dict[str, Callable[[Json, str], None]] = {
    "model": lambda raw, text: raw.update(model=text),
    "input.name": lambda raw, text: raw["input"].update(name=text),
    "output.name": lambda raw, text: raw["output"].update(name=text),
    "input.dtype": lambda raw, text: raw["input"].update(dtype=text),
    "crop_mode": lambda raw, text: raw["preprocess"].update(crop_mode=text),
    "weights.sha256": lambda raw, text: raw["weights"].update(sha256=text + "!"),
    "parents": lambda raw, text: raw["parents"].update(source_graph=text),
}
NUMBERS: dict[str, Callable[[Json], None]] = {
    "preprocess.size": lambda raw: raw["preprocess"].update(size=10**12),
    "preprocess.crop_pct": lambda raw: raw["preprocess"].update(crop_pct=1e-9),
    "preprocess.mean[1]": lambda raw: raw["preprocess"].update(mean=[0.5, 1e300, 0.5]),
    "preprocess.std[2]": lambda raw: raw["preprocess"].update(std=[0.5, 0.5, 0.0]),
    "classes": lambda raw: raw.update(classes=10**15),
    "input.shape[1]": lambda raw: raw["input"].update(shape=["batch", 10**15, 1, 1]),
    "output.shape[0]": lambda raw: raw["output"].update(shape=[-1, 10]),
    "versions.torch": lambda raw: raw["versions"].update(torch="2\n# x"),
    "settings.a[0]": lambda raw: raw["settings"].update(a=["\x1b[31m"]),
    "class_names[3]": lambda raw: raw["class_names"].__setitem__(3, "cat\ndog"),
}


def crafted(graph: Path, folder: Path, edit: Callable[[Json], None]) -> Path:
    """A copy of ``graph`` with an edited passport and matching tensor names."""
    model = onnx.load(graph)
    raw: Json = json.loads(next(p.value for p in model.metadata_props if p.key == PASSPORT_KEY))
    old = {raw["input"]["name"]: "input", raw["output"]["name"]: "output"}
    edit(raw)
    new = {name: raw[which]["name"] for name, which in old.items()}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    for value in (*model.graph.input, *model.graph.output):
        value.name = new.get(value.name, value.name)
    onnx.helper.set_model_props(model, {PASSPORT_KEY: json.dumps(raw)})
    path = folder / "crafted.onnx"
    onnx.save(model, path)
    return path


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refuse(path: Path, field: str) -> None:
    """Check that no package is written and that the message names the field."""
    folder = path.parent / "a" / "b" / "out"
    folder.mkdir(parents=True, exist_ok=True)
    before = everything(path.parent)
    for package in (package_triton, package_cpp):
        with pytest.raises(ArtifactError, match=re.escape(field)) as found:
            package(path, folder)
        assert "\n" not in str(found.value)
    assert everything(path.parent) == before


@pytest.mark.parametrize("text", CRAFTED)
@pytest.mark.parametrize("field", NAMES)
def test_a_crafted_name_is_refused(
    field: str, text: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    refuse(crafted(graphs["fp16"], tmp_path, lambda raw: NAMES[field](raw, text)), field)


@pytest.mark.parametrize("field", NUMBERS)
def test_an_impossible_value_is_refused(
    field: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    refuse(crafted(graphs["fp16"], tmp_path, NUMBERS[field]), field)


ENGINES: dict[str, Callable[[Json], None]] = {
    "backend_version": lambda raw: raw.update(backend_version="10.13\nRUN touch /tmp/x\n#"),
    "capabilities[0]": lambda raw: raw.update(capabilities=["8.9; x"]),
    "profiles[0]": lambda raw: raw.update(profiles=[[1, 8, 10**12]]),
    "plan_bytes": lambda raw: raw.update(plan_bytes=-1),
    "hashes.graph": lambda raw: raw["hashes"].update(graph="../x"),
    "build_seconds": lambda raw: raw.update(build_seconds=-1.0),
    "hardware": lambda raw: raw.update(hardware="none\x1b[2J"),
    "graph.model": lambda raw: raw["graph"].update(model="../../x"),
}


@pytest.mark.parametrize("field", ENGINES)
def test_a_crafted_engine_is_refused(field: str, described_engine: Callable[..., Path]) -> None:
    path = described_engine()
    raw = json.loads(passport_path(path).read_text())
    ENGINES[field](raw)
    passport_path(path).write_text(json.dumps(raw))
    refuse(path, field)


# --- the writers alone, without the checks of passports


def packable(graph: Path, **changes: Any) -> Packable:
    return Packable(graph, "0" * 64, replace(read_passport(graph), **changes), None)


def constants(source: str) -> Iterator[object]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            yield ast.literal_eval(node.value)


@pytest.mark.parametrize("text", CRAFTED)
def test_the_client_has_every_text_as_a_literal(text: str, graphs: dict[str, Path]) -> None:
    passport: Passport = read_passport(graphs["fp16"])
    odd = replace(
        passport,
        input=replace(passport.input, name=text),
        preprocess=replace(passport.preprocess, crop_mode=text),
    )
    plain = client_source("digits", passport)
    source = client_source("digits", odd)
    assert ("digits", text, passport.output.name, passport.input.dtype, 0) in list(
        constants(source)
    )
    # The statements differ only in their literals.
    assert len(ast.parse(source).body) == len(ast.parse(plain).body)
    if not re.fullmatch(r"[\w.-]+", text) or text.startswith(("-", ".")):
        with pytest.raises(ArtifactError, match="not a valid model name"):
            client_source(text, passport)


@pytest.mark.parametrize("text", ["10.13\nRUN touch x", "10'; touch x; '", "$(touch x)", "*"])
def test_the_dockerfile_has_a_version_as_one_word(
    text: str, described_engine: Callable[..., Path], tmp_path: Path
) -> None:
    path = described_engine()
    engine: EnginePassport = replace(read_engine_passport(path), backend_version=text)
    lines = dockerfile(Packable(path, "0" * 64, engine.graph, engine), "digits").splitlines()
    steps = [line for line in lines if line and not line.startswith("#")]
    assert [line.split()[0] for line in steps] == ["ARG", "FROM", "RUN", "COPY", "CMD"]
    [check] = [line[4:] for line in steps if line.startswith("RUN ")]
    done = subprocess.run(
        ["/bin/sh", "-c", check], env={"TRT_VERSION": "9"}, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("break_", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028"])
def test_a_class_name_is_one_line_of_labels(break_: str, graphs: dict[str, Path]) -> None:
    names = (f"a{break_}b", *"123456789")
    lines = labels(packable(graphs["fp16"], class_names=names).graph)
    assert "\n".join(lines).splitlines() == list(lines)
    assert len(lines) == 10


@pytest.mark.parametrize("name", ["config.pbtxt", "labels.txt"])
@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"", b"\x1b[2J\n"])
def test_a_repository_with_other_contents(
    name: str, data: bytes, graphs: dict[str, Path], tmp_path: Path
) -> None:
    made = package_triton(graphs["fp16"], tmp_path)
    (made.path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"its {re.escape(name)} differs"):
        package_triton(graphs["fp16"], tmp_path)


def test_a_repository_with_a_pipe(graphs: dict[str, Path], tmp_path: Path) -> None:
    made = package_triton(graphs["fp16"], tmp_path)
    (made.path / "labels.txt").unlink()
    os.mkfifo(made.path / "labels.txt")
    with pytest.raises(FileError, match="it is a pipe, not a regular file"):
        package_triton(graphs["fp16"], tmp_path)
