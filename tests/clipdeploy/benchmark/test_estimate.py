"""What is expected of graphs on a GPU that is not there."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from fp8_graphs import as_fp8
from rich.console import Console

from clipdeploy.benchmark import estimate_artifacts, estimate_model, known_gpus
from clipdeploy.benchmark.estimate import SpeedEstimate
from clipdeploy.cli.main import main
from clipdeploy.core.errors import EngineError, UsageError
from clipdeploy.engines.gpus import all_gpus, find_gpu
from clipdeploy.engines.roofline import Geometry, engine_seconds, every_linear, kernels
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


@pytest.fixture
def workspace(demo_workspace: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    return Workspace(tmp_path / "artifacts")


def shown(result: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(result)
    return stream.getvalue()


def row_times(result: SpeedEstimate) -> dict[tuple[str, int], float]:
    return {(row.label, row.batch): row.milliseconds for row in result.rows}


def test_the_times_are_those_of_the_roofline(workspace: Workspace) -> None:
    found = estimate_model(workspace, "demo", "l4", (1, 64))
    geometry, gpu = Geometry.of_card(cards.find(cards.DEMO)), find_gpu("L4")
    for label, formats in (("fp16.onnx", {}), ("int8.onnx", every_linear(6, "int8"))):
        for batch in (1, 64):
            expected = 1e3 * engine_seconds(kernels(geometry, formats, batch), gpu)
            assert row_times(found)[label, batch] == pytest.approx(expected)
    by_label = {row.label: row for row in found.rows if row.batch == 64}
    assert list(by_label) == ["fp16.onnx", "int8.onnx"]
    assert by_label["fp16.onnx"].speedup == 1
    assert by_label["int8.onnx"].formats == {"int8": 24}
    assert by_label["int8.onnx"].attention == {"fp16": 6}
    row = by_label["int8.onnx"]
    assert row.images_per_second == pytest.approx(64e3 / row.milliseconds)
    said = shown(found)
    assert "an estimate from NVIDIA L4 data sheet: nothing was run" in said
    assert "int8.onnx: Linears 24 INT8; attention 6 FP16" in said


def test_fp16_is_the_baseline_without_its_graph(workspace: Workspace) -> None:
    before = row_times(estimate_model(workspace, "demo", "L4", (8,)))
    workspace.graph(cards.DEMO, "fp16").unlink()
    found = estimate_model(workspace, "demo", "L4", (8,))
    assert row_times(found)["all FP16", 8] == before["fp16.onnx", 8]
    assert found.rows[0].artifact == ""
    assert row_times(found)["int8.onnx", 8] == before["int8.onnx", 8]


def test_a_linear_left_in_fp16_and_quantised_attention_are_read(workspace: Workspace) -> None:
    command("quantize", workspace, "--quantize-attention", "--exclude", "blocks.2.mlp.*")
    found = estimate_artifacts(workspace.graph(cards.DEMO, "int8"), "L4", (8,))
    (row,) = found.rows
    assert row.formats == {"int8": 22, "fp16": 2}
    assert row.attention == {"int8": 5, "fp16": 1}
    words = ("--quantize-attention", "--quantize-outputs", "--exclude", "blocks.2.mlp.*")
    command("quantize", workspace, *words)
    (rounded,) = estimate_artifacts(workspace.graph(cards.DEMO, "int8"), "L4", (8,)).rows
    assert rounded.formats == row.formats
    assert rounded.kernels == row.kernels
    assert rounded.milliseconds < row.milliseconds


def test_fp8_graphs_and_gpus_without_it(workspace: Workspace, tmp_path: Path) -> None:
    graph = tmp_path / "fp8.onnx"
    onnx.save(as_fp8(workspace.graph(cards.DEMO, "int8")), graph)
    from clipdeploy.benchmark import estimate

    assert estimate._formats(graph, 6) == every_linear(6, "fp8")


def test_what_cannot_be_estimated_says_why(workspace: Workspace, tmp_path: Path) -> None:
    fp32, int8 = (workspace.graph(cards.DEMO, precision) for precision in ("fp32", "int8"))
    found = estimate_artifacts([fp32, int8], "L4", (8,))
    assert [row.label for row in found.rows] == ["int8.onnx"]
    (left,) = found.not_estimated
    assert left.label == "fp32.onnx"
    assert "no rate for its fp32 products" in left.reason
    assert "no rate for its fp32" in shown(found)
    with pytest.raises(EngineError, match="nothing could be estimated"):
        estimate_artifacts(fp32, "L4")
    with pytest.raises(UsageError, match=r"x\.engine is no graph"):
        estimate_artifacts("x.engine", "L4")
    with pytest.raises(UsageError, match="nothing to estimate"):
        estimate_artifacts([], "L4")
    with pytest.raises(UsageError, match="no data sheet of a GPU 'L400'"):
        estimate_artifacts(int8, "L400")
    with pytest.raises(UsageError, match="has not been exported"):
        estimate_model(Workspace(tmp_path / "empty"), "demo", "L4")


def command(name: str, workspace: Workspace, *words: str, code: int = 0) -> Result:
    place = ["--workspace", str(workspace.root), "--model", "demo"]
    result = CliRunner().invoke(main, [name, *place, *words])
    assert result.exit_code == code, result.output
    return result


def test_the_command_estimates_and_lists(workspace: Workspace) -> None:
    printed = command("benchmark", workspace, "--estimate", "h100 sxm", "--batch", "1,32").stdout
    assert "clip-vit-demo on H100-SXM, estimated" in printed
    assert "989.4 TFLOPS FP16 with FP32 sums" in printed
    read = json.loads(
        command("benchmark", workspace, "--estimate", "T4", "--batch", "4", "--json").stdout
    )
    assert (read["gpu"]["name"], read["gpu"]["fp8_tflops"]) == ("T4", None)
    assert [row["batch"] for row in read["rows"]] == [4, 4]
    listed = CliRunner().invoke(main, ["benchmark", "--estimate", "list"])
    assert all(gpu.name in listed.stdout for gpu in all_gpus())
    listed = CliRunner().invoke(main, ["benchmark", "--estimate", "list", "--json"])
    assert [gpu["name"] for gpu in json.loads(listed.stdout)["gpus"]] == [
        g.name for g in all_gpus()
    ]
    assert len(known_gpus().gpus) == len(all_gpus())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--estimate", "H1"), "near it: H100-SXM, H100-PCIe (known are T4, A10"),
        (("--estimate", "L4", "--rounds", "3"), "--rounds belongs to a measurement"),
        (("--estimate", "L4", "--output", "x.svg"), "--output belongs to a measurement"),
        (("--estimate", "list", "--batch", "3"), "--batch belongs to an estimate"),
        (("--estimate", "L4", "--batch", "0"), "batches of [0] images"),
    ],
)
def test_the_command_refuses(
    words: tuple[str, ...], message: str, workspace: Workspace, tmp_path: Path
) -> None:
    model = () if "list" in words else ("--workspace", str(workspace.root))
    result = CliRunner().invoke(main, ["benchmark", *model, *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
