"""Artifacts to package: graphs of every kind of input, and a made-up engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import BATCH_AXIS, Passport
from clipdeploy.engines.passport import (
    EnginePassport,
    Hashes,
    load_engine_passport,
    platform_name,
    save_engine_passport,
)
from clipdeploy.models import cards
from clipdeploy.pipeline import Workspace, convert_model
from exporters.graphs import load_graph, save_graph
from exporters.headers import read_passport
from exporters.precision import Fp16Config
from exporters.preprocess_graph import add_preprocessing, preprocessed_passport

DescribedEngine = Callable[..., Path]


@pytest.fixture(scope="session")
def graphs(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model's graph in each precision, and with each kind of input."""
    folder = demo_workspace.folder(cards.DEMO)
    names = ("fp32", "fp16", "int8")
    found = {name: folder / f"{name}.onnx" for name in names}
    made = tmp_path_factory.mktemp("graphs")
    # Like `export --preprocess` and `export --batch 4`, without tracing again.
    passport = read_passport(found["fp32"])
    uint8 = load_graph(found["fp32"])
    add_preprocessing(uint8, passport.preprocess)
    found["uint8"] = save_graph(uint8, made / "uint8.onnx", preprocessed_passport(passport)).path
    fixed = load_graph(found["fp32"])
    for value in (*fixed.graph.inputs, *(v for node in fixed.graph for v in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(4 if str(axis) == BATCH_AXIS else axis for axis in value.shape)
    of_four = replace(
        passport,
        input=replace(passport.input, shape=(4, 3, 32, 32)),
        output=replace(passport.output, shape=(4, 10)),
    )
    found["batch 4"] = save_graph(fixed, made / "batch4.onnx", of_four).path
    half = Workspace(tmp_path_factory.mktemp("half") / "artifacts")
    shutil.copytree(demo_workspace.root, half.root)
    found["half"] = convert_model(half, cards.DEMO, Fp16Config(half_io=True)).path
    return found


@pytest.fixture
def described_engine(graphs: dict[str, Path], tmp_path: Path) -> DescribedEngine:
    """Make a file with the passport of a TensorRT engine; keywords change the passport."""

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
