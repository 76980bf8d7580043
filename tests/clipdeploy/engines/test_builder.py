"""Tests building with TensorRT-RTX and real graphs.

Covers: clipdeploy/engines/build_config.py, clipdeploy/engines/passport.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from compiling import SPEC, ignore

from clipdeploy.core.device import Gpu, gpus
from clipdeploy.core.errors import ArtifactError, BuildError, EngineError, FileError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Precision
from clipdeploy.engines import backends, builder
from clipdeploy.engines.backends import choose_backend
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import EngineArtifact, _DeferredWork, build_engine
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.passport import load_engine_passport, passport_path, save_engine_passport
from clipdeploy.engines.plan_writer import Piece, PlanFile
from clipdeploy.models import cards
from clipdeploy.runners.engine import EngineRunner
from clipdeploy.workspace.folder import Workspace
from exporters.blocks import BlockPrecision

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")


@pytest.fixture(scope="module")
def engines(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for precision in ("fp32", "fp16", "int8"):
        build_engine(demo_workspace.graph(cards.DEMO, precision), folder / f"{precision}.engine")
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_and_its_passport(
    precision: Precision, engines: Path, demo_workspace: Workspace
) -> None:
    path = engines / f"{precision}.engine"
    passport = load_engine_passport(path)
    assert passport.graph.precision == precision
    assert passport.hashes.graph == sha256_file(demo_workspace.graph(cards.DEMO, precision))
    assert passport.plan_bytes == path.stat().st_size > 1e6
    assert passport.backend == "tensorrt-rtx"
    assert passport.profiles == ((1, 8, 32),)


def test_an_unchanged_engine_is_not_built_again(engines: Path, demo_workspace: Workspace) -> None:
    graph, engine = demo_workspace.graph(cards.DEMO, "int8"), engines / "int8.engine"
    assert not build_engine(graph, engine).changed
    assert build_engine(graph, engine, BuildConfig(profiles=((1, 4, 16),))).changed
    assert load_engine_passport(engine).profiles == ((1, 4, 16),)
    assert build_engine(graph, engine, BuildConfig()).changed


def test_a_changed_engine_is_refused(engines: Path, tmp_path: Path) -> None:
    data = (engines / "fp16.engine").read_bytes()
    engine = tmp_path / "fp16.engine"
    engine.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="no passport"):
        load_engine_passport(engine)
    passport_path(engine).write_bytes(passport_path(engines / "fp16.engine").read_bytes())
    with pytest.raises(ArtifactError, match="not the file that its passport describes"):
        load_engine_passport(engine)
    engine.write_bytes(data)
    assert load_engine_passport(engine).plan_bytes == len(data)


def test_a_passport_with_the_names_of_an_older_schema_is_read(
    engines: Path, demo_workspace: Workspace, tmp_path: Path
) -> None:
    engine = Path(shutil.copy(engines / "int8.engine", tmp_path))
    written = json.loads(passport_path(engines / "int8.engine").read_text())
    older = json.loads(json.dumps(written | {"schema": 2}))
    older["compiled"]["untold"] = older["compiled"].pop("unknown")
    passport_path(engine).write_text(json.dumps(older))
    expected = load_engine_passport(engines / "int8.engine")
    assert load_engine_passport(engine) == replace(expected, schema=2)
    assert not build_engine(demo_workspace.graph(cards.DEMO, "int8"), engine).changed
    # The present schema has no such name.
    passport_path(engine).write_text(json.dumps(older | {"schema": 3}))
    with pytest.raises(ArtifactError, match="missing required field `unknown`"):
        load_engine_passport(engine)
    passport_path(engine).write_text(json.dumps(written | {"schema": 4}))
    with pytest.raises(ArtifactError, match="written by a newer clipdeploy"):
        load_engine_passport(engine)


def test_a_graph_that_tensorrt_refuses_leaves_no_engine(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    proto = onnx.load(demo_workspace.graph(cards.DEMO, "fp32"))
    proto.graph.node[3].op_type = "NoSuchOperator"
    graph = tmp_path / "broken.onnx"
    onnx.save(proto, graph)
    with pytest.raises(BuildError, match=r"tensorrt-rtx cannot compile .*broken\.onnx"):
        build_engine(graph, tmp_path / "broken.engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx"]


def test_a_passport_without_its_engine_is_rebuilt(
    engines: Path, demo_workspace: Workspace, tmp_path: Path
) -> None:
    engine = tmp_path / "int8.engine"
    shutil.copy(passport_path(engines / "int8.engine"), passport_path(engine))
    assert build_engine(demo_workspace.graph(cards.DEMO, "int8"), engine).changed
    assert load_engine_passport(engine).plan_bytes == engine.stat().st_size


def test_a_failed_build_keeps_the_existing_engine(
    engines: Path, demo_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "int8.engine"
    for path in (engine, passport_path(engine)):
        shutil.copy((engines / "int8.engine").with_name(path.name), path)
    before = load_engine_passport(engine)

    def full(self: PlanFile, piece: Piece) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PlanFile, "write", full)
    with pytest.raises(FileError, match=r"cannot write .*int8\.engine: No space left"):
        build_engine(demo_workspace.graph(cards.DEMO, "int8"), engine, force=True)
    assert load_engine_passport(engine) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.engine", "int8.engine.json"]


def test_importing_the_builder_is_fast() -> None:
    """Modules that take 0.1 s to import are imported during the build or not at all."""
    heavy = ["numpy", "onnx", "rich", "torch"]
    code = (
        f"import sys, clipdeploy.engines.builder; print([m for m in {heavy} if m in sys.modules])"
    )
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_deferred_work_starts_after_most_messages(
    compiler: Compiler, demo_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = backends.CapturedLog([], [])
    said: list[int] = []
    monkeypatch.setattr(backends, "CapturedLog", lambda log, errors: captured)

    def work() -> tuple[BlockPrecision, ...]:
        said.append(len(captured.messages))
        return ()

    with ThreadPoolExecutor(1) as pool:
        deferred = _DeferredWork(pool, work)
        graph = demo_workspace.graph(cards.DEMO, "int8")
        step = deferred.track(lambda count: None)
        compiler.compile(graph, SPEC, BuildConfig(), None, ignore, step)
    # Measured: all but a few messages; the list of layers is one message at the end.
    assert said
    assert said[0] > 0.9 * len(captured.messages)


@pytest.mark.parametrize("counts", [[], [50], [50, 25, 25], [1] * 100])
def test_deferred_work_runs_once_for_any_progress(counts: list[int]) -> None:
    done: list[int] = []
    shown: list[int] = []

    def work() -> tuple[BlockPrecision, ...]:
        done.append(1)
        return (BlockPrecision("head"),)

    with ThreadPoolExecutor(1) as pool:
        deferred = _DeferredWork(pool, work)
        step = deferred.track(shown.append)
        for count in counts:
            step(count)
        assert deferred.result() == (BlockPrecision("head"),)
    assert done == [1]
    assert shown == counts


@pytest.mark.parametrize(
    ("gpu", "unfit"),
    [
        (None, False),
        (Gpu("NVIDIA L4", (8, 9)), False),
        (Gpu("NVIDIA H200", (9, 0)), True),
        (Gpu("Tesla T4", (7, 5)), True),
    ],
)
def test_an_engine_that_this_gpu_cannot_run_has_a_remark(
    gpu: Gpu | None, unfit: bool, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passport = load_engine_passport(engines / "fp16.engine")
    artifact = EngineArtifact(engines / "fp16.engine", passport, changed=True)
    monkeypatch.setattr(builder, "gpus", lambda: (gpu,) if gpu else ())
    said = artifact.remarks
    assert bool(said) == unfit
    if unfit and gpu:
        assert (
            f"{gpu.name} in this machine is {gpu.sm}, and cannot run an engine for SM 8.0"
            in said[0]
        )


def test_an_engine_that_may_compute_in_tf32_is_built_again(
    engines: Path, demo_workspace: Workspace, tmp_path: Path
) -> None:
    engine = tmp_path / "fp32.engine"
    for path in (engine, passport_path(engine)):
        shutil.copy((engines / "fp32.engine").with_name(path.name), path)
    made = load_engine_passport(engine)
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    assert not build_engine(graph, engine).changed
    older = {name: value for name, value in made.settings.items() if name != "tf32"}
    save_engine_passport(replace(made, settings=older), engine)
    assert build_engine(graph, engine).changed


@pytest.mark.parametrize("profile", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_a_profile_out_of_order_is_refused(profile: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="not in order"):
        BuildConfig(profiles=(profile,))


@pytest.mark.skipif(bool(gpus()), reason="tests a machine without a GPU")
def test_without_a_gpu(engines: Path) -> None:
    assert choose_backend("auto").backend == "tensorrt-rtx"
    with pytest.raises(BuildError, match="tensorrt"):
        choose_backend("tensorrt")
    with pytest.raises(EngineError, match="no GPU"):
        EngineRunner(engines / "fp16.engine")


@pytest.mark.skipif(not gpus(), reason="needs a GPU")
def test_an_engine_computes_what_its_graph_computes(
    engines: Path, demo_workspace: Workspace, demo_images: np.ndarray
) -> None:
    from clipdeploy.runners import OnnxRunner

    expected = OnnxRunner(demo_workspace.graph(cards.DEMO, "fp32"))(demo_images)
    with EngineRunner(engines / "fp32.engine") as runner:
        # float32 with other orders of summation (the builder clears TF32).
        np.testing.assert_allclose(runner(demo_images), expected, atol=1e-3)
