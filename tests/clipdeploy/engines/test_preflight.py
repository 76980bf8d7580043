"""Tests the checks before an engine is loaded, with real engines and made-up machines."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clipdeploy.core.device import Gpu, gpus
from clipdeploy.core.errors import ArtifactError, EngineError
from clipdeploy.engines.builder import build_engine
from clipdeploy.engines.passport import (
    EnginePassport,
    passport_path,
    read_engine_passport,
    save_engine_passport,
)
from clipdeploy.engines.preflight import Host, check_machine, preflight
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")

ADA = Gpu("NVIDIA L4", (8, 9))


@pytest.fixture(scope="module")
def built(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = tmp_path_factory.mktemp("built") / "demo.engine"
    return build_engine(demo_workspace.graph(cards.DEMO, "fp16"), engine).path


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copy(passport_path(built), passport_path(tmp_path / built.name))
    return Path(shutil.copy(built, tmp_path))


def fitting(engine: Path) -> Host:
    """A machine that can run the engine."""
    passport = read_engine_passport(engine)
    return Host(passport.platform, ADA, passport.backend_version)


def test_a_matching_engine_is_returned(engine: Path) -> None:
    plan = preflight(engine, host=fitting(engine))
    assert plan.data == engine.read_bytes()
    assert plan.passport is not None
    assert plan.sha256 == plan.passport.hashes.plan
    assert plan.passport.hashes.graph


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
def test_one_flipped_bit_is_refused(where: float, engine: Path) -> None:
    data = bytearray(engine.read_bytes())
    data[int(where * len(data))] ^= 1
    engine.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"changed or replaced \(build it again: clipdeploy"):
        preflight(engine, host=fitting(engine))


def test_a_truncated_engine_is_refused(engine: Path) -> None:
    data = engine.read_bytes()
    engine.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=r"of .* bytes, it was cut short"):
        preflight(engine, host=fitting(engine))


def test_the_passport_of_another_engine_is_refused(
    engine: Path, demo_workspace: Workspace, tmp_path: Path
) -> None:
    other = build_engine(demo_workspace.graph(cards.DEMO, "fp32"), tmp_path / "other.engine").path
    shutil.copy(passport_path(other), passport_path(engine))
    with pytest.raises(ArtifactError, match="is not the file that its passport describes"):
        preflight(engine, host=fitting(engine))


def test_a_missing_passport_is_refused(engine: Path) -> None:
    host = fitting(engine)
    passport_path(engine).unlink()
    with pytest.raises(ArtifactError, match="has no passport"):
        preflight(engine, host=host)


def test_a_passport_of_a_newer_clipdeploy_is_refused(engine: Path) -> None:
    host, path = fitting(engine), passport_path(engine)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(ArtifactError, match=r"newer clipdeploy \(schema 99"):
        preflight(engine, host=host)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"platform": "linux aarch64"}, r"built for linux x86_64, this machine is linux aarch64"),
        ({"gpu": None}, "no GPU on this machine"),
        ({"gpu": Gpu("NVIDIA H200", (9, 0))}, r"runs on SM .*; NVIDIA H200 is SM 9\.0"),
        ({"gpu": Gpu("Tesla T4", (7, 5))}, r"runs on SM .*; Tesla T4 is SM 7\.5"),
        ({"version": "1.4.0.76"}, r"was built by tensorrt-rtx .*, installed is 1\.4\.0\.76"),
        ({"version": None}, r"which is not installed \(pip install tensorrt-rtx=="),
    ],
)
def test_another_machine_is_refused(change: dict[str, object], message: str, engine: Path) -> None:
    host = replace(fitting(engine), **change)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=message):
        preflight(engine, host=host)


def test_trust_skips_the_hash_but_not_the_machine(engine: Path) -> None:
    host = fitting(engine)
    engine.write_bytes(engine.read_bytes()[:-1])
    assert preflight(engine, trust=True, host=host).data == engine.read_bytes()
    with pytest.raises(EngineError, match="no GPU"):
        preflight(engine, trust=True, host=replace(host, gpu=None))


@pytest.fixture
def data_centre(engine: Path) -> EnginePassport:
    """A passport as written for TensorRT on an A10."""
    return replace(
        read_engine_passport(engine),
        backend="tensorrt",
        backend_version="10.13.0.35",
        capabilities=("8.6",),
        gpu="NVIDIA A10",
    )


@pytest.mark.parametrize(
    ("hardware", "capability", "runs"),
    [
        ("none", (8, 6), True),
        ("none", (9, 0), False),
        ("ampere-plus", (9, 0), True),
        ("ampere-plus", (7, 5), False),
        ("same-capability", (8, 6), True),
        ("same-capability", (8, 9), False),
    ],
)
def test_hardware_compatibility(
    hardware: str, capability: tuple[int, int], runs: bool, data_centre: EnginePassport
) -> None:
    passport = replace(data_centre, hardware=hardware)
    host = Host(passport.platform, Gpu("a GPU", capability), passport.backend_version)
    if runs:
        check_machine(Path("x.engine"), passport, host)
    else:
        with pytest.raises(EngineError, match=r"runs on SM 8\.6"):
            check_machine(Path("x.engine"), passport, host)


@pytest.mark.parametrize(
    ("compatible", "version", "runs"),
    [
        (False, "10.13.0.35", True),
        (False, "10.14.1.48", False),
        (True, "10.14.1.48", True),
        (True, "10.12.0.36", False),
        (True, "11.0.0.114", False),
        (False, "10.13.0.35.post1", True),
        (False, "10.13.0.36.post1", False),
        (True, "10.14.1.48.post1", True),
        (True, "unknown", False),
    ],
)
def test_version_compatibility(
    compatible: bool, version: str, runs: bool, data_centre: EnginePassport
) -> None:
    passport = replace(data_centre, settings={"version_compatible": compatible})
    host = Host(passport.platform, Gpu("NVIDIA A10", (8, 6)), version)
    if runs:
        check_machine(Path("x.engine"), passport, host)
    else:
        with pytest.raises(EngineError, match=r"was built by tensorrt 10\.13"):
            check_machine(Path("x.engine"), passport, host)


def test_an_engine_of_a_post_release_runs_on_the_release(data_centre: EnginePassport) -> None:
    passport = replace(data_centre, backend_version="10.13.0.35.post1")
    check_machine(
        Path("x.engine"), passport, Host(passport.platform, Gpu("A10", (8, 6)), "10.13.0.35")
    )


@pytest.mark.skipif(bool(gpus()), reason="tests a machine without a GPU")
def test_this_machine_is_checked_by_default(engine: Path) -> None:
    with pytest.raises(EngineError, match="no GPU on this machine"):
        preflight(engine)
    save_engine_passport(replace(read_engine_passport(engine), platform="win32 AMD64"), engine)
    with pytest.raises(EngineError, match=r"built for win32 AMD64"):
        preflight(engine)
