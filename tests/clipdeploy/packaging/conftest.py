"""Artifacts to package: graphs of every kind of input, and an engine that is only described."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clipdeploy import zoo
from clipdeploy.engines.passport import (
    EnginePassport,
    Hashes,
    load_engine_passport,
    platform_name,
    save_engine_passport,
)
from clipdeploy.pipeline import Workspace, convert_model, export_model
from exporters.artifact import Passport
from exporters.files import sha256_file
from exporters.headers import read_passport
from exporters.onnx import ExportConfig
from exporters.precision import Fp16Config

DescribedEngine = Callable[..., Path]


@pytest.fixture(scope="session")
def graphs(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model's graph in each precision, and with each kind of input."""
    folder = demo_workspace.folder(zoo.DEMO)
    names = ("fp32", "fp16", "int8")
    found = {name: folder / f"{zoo.DEMO}.{name}.onnx" for name in names}
    for name, config in (
        ("uint8", ExportConfig(preprocess=True)),
        ("batch 4", ExportConfig(batch=4)),
    ):
        other = Workspace(tmp_path_factory.mktemp(name.replace(" ", "")))
        found[name] = export_model(other, zoo.DEMO, config=config).path
    half = Workspace(tmp_path_factory.mktemp("half") / "artifacts")
    shutil.copytree(demo_workspace.root, half.root)
    found["half"] = convert_model(half, zoo.DEMO, Fp16Config(half_io=True)).path
    return found


@pytest.fixture
def described_engine(graphs: dict[str, Path], tmp_path: Path) -> DescribedEngine:
    """A file with the passport of an engine of TensorRT; keywords change the passport."""

    def make(graph: str = "fp16", **changes: object) -> Path:
        path = tmp_path / f"demo.{graph.replace(' ', '')}.engine"
        path.write_bytes(b"a plan, as far as anybody here can tell")
        passport: Passport = read_passport(graphs[graph])
        engine = EnginePassport(
            graph=passport,
            hashes=Hashes(plan=sha256_file(path), graph=sha256_file(graphs[graph])),
            plan_bytes=path.stat().st_size,
            build_seconds=1.0,
            backend="tensorrt",
            backend_version="10.13.3.9",
            profiles=((1, 8, 32),),
            capabilities=("8.9",),
            hardware="none",
            platform=platform_name(),
        )
        save_engine_passport(replace(engine, **changes), path)  # type: ignore[arg-type]
        assert load_engine_passport(path)
        return path

    return make
