"""Clipped 8-bit inputs: a scale that is too small, and images unlike the calibration's."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from demo_variants import write_digits
from demo_workspaces import TENSORRT, few_digits
from numpy.typing import NDArray
from rich.console import Console

from calibration.config import QuantizeConfig
from clipdeploy.core.files import sha256_file
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import build_engine
from clipdeploy.imaging import ImageFolder, open_images
from clipdeploy.models import cards
from clipdeploy.pipeline import (
    calibrate_model,
    quantize_model,
    verify_model,
    write_reports,
)
from clipdeploy.stages.verify.setup import Judgement
from clipdeploy.verification.clipping import with_clipping
from clipdeploy.verification.result import (
    ClippedLinear,
    Clipping,
    Row,
    Verification,
    verification_table,
)
from clipdeploy.verification.results import RunKey
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph, save_graph
from exporters.headers import read_passport
from exporters.initializers import set_values, values_of

LINEAR = "blocks.2.mlp.fc2"
MODEL = cards.DEMO


@dataclass(frozen=True)
class Judged:
    """A verification of the demo's FP32 and INT8 graphs, and the images of it."""

    judgement: Judgement
    workspace: Workspace

    @property
    def result(self) -> Verification:
        assert self.judgement.verification is not None
        return self.judgement.verification

    def with_graph(
        self, graph: Path, table: Path | None = None, **facts: Any
    ) -> tuple[Row, Verification]:
        """The row of ``graph``, measured in place of the INT8 graph's, and the verification."""
        evidence = self.judgement.evidence
        assert evidence is not None
        run_key = evidence.results.run_key
        entries = tuple(
            replace(entry, artifact=str(graph), **facts) if entry.precision == "int8" else entry
            for entry in run_key.artifacts
        )
        run_key = replace(run_key, artifacts=entries)
        rows = tuple(replace(row, clipping=None) for row in self.result.rows)
        blank = replace(self.result, rows=rows)
        table = table or self.workspace.calibration(MODEL)
        result = with_clipping(blank, run_key, evidence.images, table)
        return _row(result), result


@pytest.fixture(scope="module")
def judged(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    folder = tmp_path_factory.mktemp("clipping")
    workspace = Workspace(folder / "artifacts")
    workspace.folder(MODEL).mkdir(parents=True)
    for path in (
        demo_workspace.graph(MODEL, "fp32"),
        demo_workspace.graph(MODEL, "int8"),
        demo_workspace.calibration(MODEL),
    ):
        shutil.copy(path, workspace.folder(MODEL))
    data = few_digits(folder / "few.zip", 2)
    config = VerifyConfig(max_drop=20, workers=0)
    return Judged(verify_model(workspace, MODEL, data, config), workspace)


def _row(result: Verification, precision: str = "int8") -> Row:
    return next(row for row in result.rows if row.precision == precision)


def _scaled(source: Path, target: Path, factor: float) -> Path:
    """Write the graph with another scale of one Linear's input."""
    model = load_graph(source)
    for name, scale in model.graph.initializers.items():
        if name.startswith(f"{LINEAR}.input_scale"):
            array = values_of(scale)
            set_values(scale, (array * factor).astype(array.dtype))
    return save_graph(model, target, read_passport(source)).path


@pytest.fixture(scope="module")
def too_small(judged: Judged, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT8 graph with a scale that is ten times too small."""
    target = tmp_path_factory.mktemp("small") / "int8.onnx"
    return _scaled(judged.workspace.graph(MODEL, "int8"), target, 0.1)


def test_a_sound_graph_has_no_cause(judged: Judged) -> None:
    assert _row(judged.result, "fp32").clipping is None
    row = _row(judged.result)
    found = row.clipping
    assert found is not None
    assert (found.images, len(found.linears), found.cause) == (16, 24, "")
    shares = [linear.clipped for linear in found.linears]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] < 0.3
    assert all(linear.calibration is None for linear in found.linears)
    assert row.calibration_findings == ()
    printed = _printed(judged.result)
    first = f"{found.linears[0].name} clips most, {shares[0]:.2g} % of its values"
    assert f"8-bit inputs: {first}, on 16 of the images" in printed
    assert "the calibration:" not in printed


def test_a_graph_that_clips_nothing_says_so(judged: Judged) -> None:
    clipping = Clipping(16, (ClippedLinear(LINEAR, 0.0, 0.0, None),))
    rows = tuple(replace(row, clipping=clipping) for row in judged.result.rows)
    printed = _printed(replace(judged.result, rows=rows))
    assert "8-bit inputs: none clips a value on 16 of the images" in printed


def test_a_scale_that_is_too_small_is_named(
    judged: Judged, too_small: Path, tmp_path: Path
) -> None:
    row, result = judged.with_graph(too_small)
    assert row.clipping is not None
    first = row.clipping.linears[0]
    assert first.name == LINEAR
    assert first.calibration is not None
    assert min(first.clipped, first.calibration) > 50
    assert f"% of the 8-bit input of {LINEAR} is clipped, and" in row.clipping.cause
    assert "the scale is too small, whatever the images" in row.clipping.cause
    judgement = replace(judged.judgement, verification=result)
    for name in ("r.md", "r.html", "r.json"):
        write_reports(judgement, tmp_path / name)
        assert row.clipping.cause in (tmp_path / name).read_text().replace("\\", "")
    assert "## Clipped 8-bit inputs" in (tmp_path / "r.md").read_text()
    assert "<h2>Clipped 8-bit inputs</h2>" in (tmp_path / "r.html").read_text()


def test_only_the_clipping_of_a_row_changes(judged: Judged, too_small: Path) -> None:
    row, result = judged.with_graph(too_small)
    before = _row(judged.result)
    assert replace(row, clipping=None) == replace(before, clipping=None)
    assert (result.passed, result.baseline) == (judged.result.passed, judged.result.baseline)


def test_images_unlike_those_of_the_calibration_are_named(judged: Judged, tmp_path: Path) -> None:
    def darker(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return (grey // 3).astype(np.uint8)

    dark = Workspace(tmp_path / "dark")
    dark.folder(MODEL).mkdir(parents=True)
    shutil.copy(judged.workspace.graph(MODEL, "fp32"), dark.folder(MODEL))
    calibrate_model(dark, MODEL, write_digits(tmp_path / "images", darker, 48))
    graph = quantize_model(dark, MODEL, QuantizeConfig(min_sqnr=None)).artifact.path
    table = dark.calibration(MODEL)
    row, result = judged.with_graph(graph, table, calibration=sha256_file(table))
    assert row.clipping is not None
    assert "these images are unlike those (mean grey level" in row.clipping.cause
    assert any("dim or flat" in text for text in row.calibration_findings)
    failed = replace(result, rows=tuple(replace(r, verdict="regressed") for r in result.rows))
    assert f"likely cause: {row.clipping.cause}" in _printed(failed)
    assert "the calibration: the images are dim or flat" in _printed(failed)
    # With another table, it is unknown what the graph was calibrated on.
    row, _ = judged.with_graph(graph, calibration=None)
    assert row.clipping is not None
    assert "the scale is too small, or the images are unlike" in row.clipping.cause


def _printed(result: Verification) -> str:
    console = Console(width=10_000)
    with console.capture() as capture:
        console.print(verification_table(result))
    return capture.get()


def test_a_graph_without_a_passport_is_measured(
    judged: Judged, too_small: Path, tmp_path: Path
) -> None:
    model = onnx.load(too_small)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    row, _ = judged.with_graph(tmp_path / "foreign.onnx", vouched=False, calibration=None)
    assert row.clipping is not None
    assert LINEAR in row.clipping.cause


def test_what_cannot_be_measured_has_a_reason_instead(judged: Judged, tmp_path: Path) -> None:
    def unknown(graph: Path, **fields: Any) -> str:
        row, result = judged.with_graph(graph, **fields)
        assert row.clipping is None
        if row.clipping_unknown:
            assert f"8-bit inputs: not measured, {row.clipping_unknown}" in _printed(result)
        return row.clipping_unknown

    missing, broken = tmp_path / "missing.onnx", tmp_path / "broken.onnx"
    assert unknown(missing) == f"{missing} is missing"
    broken.write_bytes(b"\x00")
    assert f"{broken} is not a readable ONNX graph" in unknown(broken)
    fp32 = judged.workspace.graph(MODEL, "fp32")
    assert unknown(fp32) == f"no Linear of {fp32} has an 8-bit input"
    sound = judged.workspace.graph(MODEL, "int8")
    assert judged.with_graph(sound)[0] == _row(judged.result)
    assert unknown(sound, precision="fp16") == ""


def test_without_images_the_reason_is_stated(judged: Judged, tmp_path: Path) -> None:
    evidence = judged.judgement.evidence
    assert evidence is not None
    run_key, table = evidence.results.run_key, judged.workspace.calibration(MODEL)

    def unknown(run_key: RunKey, images: ImageFolder | None) -> list[str]:
        result = with_clipping(judged.result, run_key, images, table)
        assert all(row.clipping is None for row in result.rows)
        return [row.clipping_unknown for row in result.rows]

    # Only the INT8 graph has 8-bit inputs.
    assert unknown(run_key, None) == ["", "the images are not there"]
    idle = tuple(replace(entry, runner="") for entry in run_key.artifacts)
    assert unknown(replace(run_key, artifacts=idle), evidence.images) == ["", "nothing was run"]
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert unknown(run_key, open_images(tmp_path)) == ["", "none of the images can be read"]


@pytest.mark.skipif(not TENSORRT, reason="needs TensorRT-RTX")
def test_an_engine_has_the_clipping_of_its_graph(
    judged: Judged, too_small: Path, tmp_path: Path
) -> None:
    graph = Path(shutil.copy(too_small, tmp_path))
    engine = graph.with_suffix(".engine")
    build_engine(graph, engine, BuildConfig(backend="tensorrt-rtx"))
    row, _ = judged.with_graph(engine, kind="engine")
    assert row.clipping is not None
    assert LINEAR in row.clipping.cause
    # Another graph than the engine's says nothing about the engine.
    shutil.copy(judged.workspace.graph(MODEL, "int8"), graph)
    row, _ = judged.with_graph(engine, kind="engine")
    assert row.clipping is None
    assert row.clipping_unknown == f"{graph} is not the graph that the engine was compiled from"
    graph.unlink()
    assert judged.with_graph(engine, kind="engine")[0].clipping_unknown == f"{graph} is missing"
