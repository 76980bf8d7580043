"""Artifacts that no package can hold.

Covers: clipdeploy/stages/package.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clipdeploy.core.errors import ArtifactError
from clipdeploy.stages.package import package_cpp, package_triton

DescribedEngine = Callable[..., Path]


@pytest.mark.parametrize("package", [package_cpp, package_triton])
@pytest.mark.parametrize("replaced", [False, True])
def test_an_engine_without_weights_is_refused_before_anything_is_written(
    package: Callable[..., object],
    replaced: bool,
    described_engine: DescribedEngine,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "package"
    if replaced:
        package(described_engine(), folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    engine = described_engine(settings={"strip_weights": True})
    with pytest.raises(ArtifactError, match="has no weights, and no package can") as caught:
        package(engine, folder, force=True)
    assert "without --strip-weights" in caught.value.hint
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("package", [package_cpp, package_triton])
def test_a_refittable_engine_with_its_weights_is_packaged(
    package: Callable[..., object], described_engine: DescribedEngine, tmp_path: Path
) -> None:
    engine = described_engine(settings={"refittable": True, "strip_weights": False})
    assert package(engine, tmp_path / "package")
