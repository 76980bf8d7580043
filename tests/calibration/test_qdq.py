from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from calibration.policy import find_linears
from calibration.qdq import QuantizeConfig, quantize, quantize_weight
from calibration.table import CalibrationTable, load_table, pack, save_table
from clipdeploy import zoo
from clipdeploy.model import LoadedModel
from clipdeploy.pipeline import sample_images
from clipdeploy.workspace import Workspace
from exporters.artifact import Preprocess, Recipe
from exporters.errors import ArtifactError, CalibrationError, ClipdeployError, GraphError
from exporters.files import sha256_file
from exporters.graphs import load_graph, read_passport
from exporters.session import OnnxSession

# The demo model gives 39.5 dB with an FP16 and 38.7 dB with an FP32 remainder; ranges wrong by a
# factor of two give 20 dB (too small) and 31 dB (too large).
SAMPLES = sample_images(zoo.find(zoo.DEMO).preprocess(Recipe()), 3)
FLOOR_DB = 35.0

EXCLUDE = ("blocks.0.*", "blocks.3.mlp.fc2")
EXCLUDED = {*(f"blocks.0.{r}" for r in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))} | {
    "blocks.3.mlp.fc2"
}


@pytest.fixture(scope="module")
def source(demo_workspace: Workspace) -> Path:
    return demo_workspace.graph(zoo.DEMO, "fp32")


@pytest.fixture(scope="module")
def calibration(demo_workspace: Workspace) -> Path:
    return demo_workspace.calibration(zoo.DEMO)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, source: Path, calibration: Path) -> Path:
    """The INT8 graph with an FP32 remainder."""
    path = tmp_path_factory.mktemp("qdq") / "wide.onnx"
    quantize(source, calibration, path, SAMPLES, QuantizeConfig(remainder="fp32"))
    return path


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory, source: Path, calibration: Path) -> Path:
    """The INT8 graph with an FP32 remainder and some Linears excluded."""
    path = tmp_path_factory.mktemp("qdq") / "partial.onnx"
    quantize(source, calibration, path, SAMPLES, QuantizeConfig(exclude=EXCLUDE, remainder="fp32"))
    return path


def _sqnr_db(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    noise = reference.astype(np.float64) - found.astype(np.float64)
    return 10 * math.log10((reference.astype(np.float64) ** 2).sum() / (noise**2).sum())


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def _producer(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def _check_pairs(path: Path, plain: Path, quantized: list[str]) -> None:
    """Walk the graph: Q/DQ in front of exactly the Linears in ``quantized``, and nowhere else."""
    model = load_graph(path)
    before = {site.name: site.activation.name for site in find_linears(load_graph(plain))}
    nodes = {node.name: node for node in model.graph}
    seen = set()
    for name in quantized:
        matmul = nodes[f"{name}/MatMul"]
        dq, weight_dq = _producer(matmul.inputs[0]), _producer(matmul.inputs[1])
        q = _producer(dq.inputs[0])
        assert [n.op_type for n in (q, dq, weight_dq)] == ["QuantizeLinear"] + [
            "DequantizeLinear"
        ] * 2
        assert q.inputs[0].name == before[name]
        # One scale, one zero point of zero, shared by the pair; one scale for each column.
        assert list(q.inputs[1:]) == list(dq.inputs[1:])
        assert _array(q.inputs[1]).shape == ()
        assert _array(q.inputs[2]).dtype == np.int8
        assert int(_array(q.inputs[2])) == 0
        assert _array(weight_dq.inputs[0]).dtype == np.int8
        assert _array(weight_dq.inputs[1]).shape == (_array(weight_dq.inputs[0]).shape[1],)
        assert weight_dq.attributes["axis"].as_int() == 1
        (add,) = matmul.outputs[0].consumers()
        assert add.op_type == "Add"
        # The bias stays floating point: TensorRT-RTX refuses an int32 DequantizeLinear.
        assert _array(add.inputs[1]).dtype in (np.float16, np.float32)
        seen |= {q.name, dq.name, weight_dq.name}
    kinds = ("QuantizeLinear", "DequantizeLinear")
    assert {name for name, node in nodes.items() if node.op_type in kinds} == seen
    assert len(seen) == 3 * len(quantized)


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_pairs_sit_before_every_linear(
    remainder: str, demo_workspace: Workspace, source: Path, wide: Path
) -> None:
    path = wide if remainder == "fp32" else demo_workspace.graph(zoo.DEMO, "int8")
    names = [site.name for site in find_linears(load_graph(source))]
    assert len(names) == 24
    _check_pairs(path, source, names)


def test_excluded_linears_stay_as_they_are(partial: Path, source: Path) -> None:
    sites = find_linears(load_graph(source))
    _check_pairs(partial, source, [site.name for site in sites if site.name not in EXCLUDED])
    left = {site.name: site for site in find_linears(load_graph(partial))}
    assert set(left) == EXCLUDED
    for site in sites:
        if site.name in EXCLUDED:
            other = left[site.name]
            assert _array(other.weight).tobytes() == _array(site.weight).tobytes()
            assert other.activation.name == site.activation.name


def test_placement_report_is_what_was_done(source: Path, calibration: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(exclude=EXCLUDE)
    result = quantize(source, calibration, tmp_path / "x.onnx", SAMPLES, config)
    assert {entry.name for entry in result.placement.entries if not entry.int8} == EXCLUDED
    _check_pairs(tmp_path / "x.onnx", source, list(result.placement.quantized))
    passport = read_passport(tmp_path / "x.onnx")
    assert passport == result.artifact.passport
    assert passport.precision == "int8"
    assert passport.parents == {
        "source_graph": sha256_file(source),
        "calibration": sha256_file(calibration),
    }
    assert passport.settings["exclude"] == list(EXCLUDE)
    assert passport.settings["int8_linears"] == 19


def test_nothing_is_quantised_when_all_is_excluded(
    source: Path, calibration: Path, tmp_path: Path, demo_images: NDArray[np.float32]
) -> None:
    config = QuantizeConfig(exclude=("*",), remainder="fp32")
    quantize(source, calibration, tmp_path / "x.onnx", SAMPLES, config)
    (found,) = OnnxSession(tmp_path / "x.onnx").run(demo_images)
    (expected,) = OnnxSession(source).run(demo_images)
    assert found.tobytes() == expected.tobytes()


def test_only_scales_and_zero_points_are_new(wide: Path, source: Path) -> None:
    old, new = load_graph(source).graph.initializers, load_graph(wide).graph.initializers
    weights = {site.weight.name for site in find_linears(load_graph(source))}
    assert weights.isdisjoint(new)
    for name in set(old) - weights:
        assert _array(new[name]).tobytes() == _array(old[name]).tobytes()
    suffixes = (".input_scale", ".input_zero_point", ".weight/int8", ".weight/scale")
    assert all(name.endswith(suffixes) for name in set(new) - set(old))


def test_weights_dequantise_within_half_a_scale(wide: Path, source: Path) -> None:
    quantized = load_graph(wide).graph.initializers
    for site in find_linears(load_graph(source)):
        integers = _array(quantized[f"{site.name}.weight/int8"])
        scale = _array(quantized[f"{site.name}.weight/scale"]).astype(np.float64)
        assert integers.min() >= -127
        assert integers.max() <= 127
        # The column's largest weight is at the end of its range, whichever sign it has.
        assert (np.abs(integers).max(axis=0) >= 126).all()
        error = np.abs(integers * scale - _array(site.weight))
        # Round to nearest: half a scale, and float32's rounding of the quotient.
        assert (error <= 0.5 * scale * (1 + 1e-5)).all(), site.name


@pytest.mark.parametrize(
    ("column", "integers"),
    [
        ([1.0, -1.0, 0.5], [127, -127, 64]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        # Below float16's smallest normal number the scale stays there and integers get coarse.
        ([1e-3, -1e-3, 0.0], [16, -16, 0]),
    ],
)
def test_columns_have_their_own_scale(column: list[float], integers: list[int]) -> None:
    weight = np.float32([column, [100.0, -50.0, 25.0]]).T
    found, scale = quantize_weight(weight)
    assert found.dtype == np.int8
    assert found[:, 0].tolist() == integers
    assert found[:, 1].tolist() == [127, -63, 32]
    assert scale.dtype == np.float32
    assert (scale == scale.astype(np.float16)).all()
    assert (scale >= np.finfo(np.float16).tiny).all()


@pytest.mark.parametrize("seed", range(4))
def test_random_weights_round_to_nearest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Columns over six decades, within what a float16 scale can hold.
    weight = rng.standard_normal((64, 48)) * 10.0 ** rng.uniform(-2, 4, 48)
    weight = weight.astype(np.float32)
    integers, scale = quantize_weight(weight)
    error = np.abs(integers.astype(np.float64) * scale - weight)
    # As above.
    assert (error <= 0.5 * scale * (1 + 1e-5)).all()
    assert np.abs(integers.astype(int)).max() == 127


def test_activation_scale_is_the_calibrated_range(wide: Path, calibration: Path) -> None:
    table = load_table(calibration)
    quantized = load_graph(wide).graph.initializers
    for name in table.statistics:
        expected = float(table.of(name).amax.max()) / 127
        # float16 keeps 11 bits.
        assert float(_array(quantized[f"{name}.input_scale"])) == pytest.approx(
            expected, rel=2**-11
        )


def test_both_remainders_hold_the_same_integers_and_scales(
    demo_workspace: Workspace, wide: Path
) -> None:
    one = load_graph(demo_workspace.graph(zoo.DEMO, "int8")).graph.initializers
    other = load_graph(wide).graph.initializers
    integers = [n for n in other if n.endswith(("/int8", "zero_point"))]
    scales = [n for n in other if n.endswith(("/scale", "input_scale"))]
    assert len(integers) == len(scales) == 48
    for name in integers:
        assert _array(one[name]).tobytes() == _array(other[name]).tobytes()
    for name in scales:
        half = _array(one[f"{name}/fp16"])
        assert half.dtype == np.float16
        assert half.astype(np.float32).tobytes() == _array(other[name]).tobytes()


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_int8_logits_are_pytorchs(
    remainder: str,
    demo_workspace: Workspace,
    wide: Path,
    demo_model: LoadedModel,
    demo_images: NDArray[np.float32],
) -> None:
    path = wide if remainder == "fp32" else demo_workspace.graph(zoo.DEMO, "int8")
    onnx.checker.check_model(str(path), full_check=True)
    reference = demo_model.module(torch.from_numpy(demo_images)).numpy()
    (logits,) = OnnxSession(path).run(demo_images)
    found = _sqnr_db(reference, logits)
    assert found >= FLOOR_DB, f"{found:.1f} dB"
    # An FP16 graph gives 66 dB: above 50 nothing would have been quantised.
    assert found < 50, f"{found:.1f} dB"
    assert (logits.argmax(1) == reference.argmax(1)).all()


@pytest.mark.parametrize("factor", [1 / 50, 0.5, 2.0, 50.0])
def test_ruined_ranges_fall_below_the_floor(
    factor: float,
    source: Path,
    calibration: Path,
    tmp_path: Path,
    demo_model: LoadedModel,
    demo_images: NDArray[np.float32],
) -> None:
    table = load_table(calibration)
    ruined = {}
    for name in table.statistics:
        statistics = table.of(name)
        ruined[name] = pack(
            replace(
                statistics,
                minimum=statistics.minimum * np.float32(factor),
                maximum=statistics.maximum * np.float32(factor),
            )
        )
    save_table(replace(table, statistics=ruined), tmp_path / "c.json")
    quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", SAMPLES)
    (logits,) = OnnxSession(tmp_path / "x.onnx").run(demo_images)
    reference = demo_model.module(torch.from_numpy(demo_images)).numpy()
    found = _sqnr_db(reference, logits)
    assert found < FLOOR_DB, f"{found:.1f} dB"


def test_excluding_some_brings_the_logits_nearer(
    partial: Path, wide: Path, demo_model: LoadedModel, demo_images: NDArray[np.float32]
) -> None:
    reference = demo_model.module(torch.from_numpy(demo_images)).numpy()
    some, every = (_sqnr_db(reference, OnnxSession(p).run(demo_images)[0]) for p in (partial, wide))
    assert some > every


def _resave(calibration: Path, target: Path, **change: Any) -> CalibrationTable:
    return save_table(replace(load_table(calibration), **change), target)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("model", {"model": "clip-vit-base-p16"}),
        ("weights", {"weights": "ab" * 32}),
        ("preprocessing", {"preprocess": Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}),
        ("source graph", {"source_graph": "cd" * 32}),
    ],
)
def test_calibration_of_something_else_is_refused(
    what: str, change: dict[str, Any], source: Path, calibration: Path, tmp_path: Path
) -> None:
    _resave(calibration, tmp_path / "c.json", **change)
    with pytest.raises(ArtifactError, match=rf"c\.json was made for another {what}: ") as found:
        quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", SAMPLES)
    assert found.value.hint == "calibrate this model again"
    assert os.listdir(tmp_path) == ["c.json"]


def test_calibration_without_a_linear_is_refused(
    source: Path, calibration: Path, tmp_path: Path
) -> None:
    statistics = dict(load_table(calibration).statistics)
    del statistics["blocks.4.attn.proj"]
    _resave(calibration, tmp_path / "c.json", statistics=statistics)
    with pytest.raises(CalibrationError, match=r"has nothing about blocks\.4\.attn\.proj"):
        quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", SAMPLES)
    config = QuantizeConfig(exclude=("blocks.4.attn.proj",))
    quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", SAMPLES, config)


def test_calibration_edited_by_hand_is_refused(
    source: Path, calibration: Path, tmp_path: Path
) -> None:
    text = calibration.read_text(encoding="utf-8")
    (tmp_path / "c.json").write_text(text.replace('"rows": ', '"rows": 1', 1), encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not match its own seal"):
        quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", SAMPLES)
    assert os.listdir(tmp_path) == ["c.json"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_graph_of_the_same_model_is_refused(
    precision: str, demo_workspace: Workspace, calibration: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="made for another source graph"):
        quantize(
            demo_workspace.graph(zoo.DEMO, precision), calibration, tmp_path / "x.onnx", SAMPLES
        )
    assert os.listdir(tmp_path) == []


def test_pattern_that_matches_nothing_is_refused(
    source: Path, calibration: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraphError, match=r"'blocks\.77\.\*' matches no Linear"):
        quantize(
            source, calibration, tmp_path / "x.onnx", SAMPLES, QuantizeConfig(("blocks.77.*",))
        )
    assert os.listdir(tmp_path) == []


def test_same_inputs_give_the_same_bytes(
    demo_workspace: Workspace, source: Path, calibration: Path, tmp_path: Path
) -> None:
    quantize(source, calibration, tmp_path / "x.onnx", SAMPLES)
    again = (tmp_path / "x.onnx").read_bytes()
    assert again == demo_workspace.graph(zoo.DEMO, "int8").read_bytes()


@pytest.mark.parametrize("remainder", ["bf16", "FP16", ""])
def test_unknown_remainder_is_refused(remainder: str) -> None:
    with pytest.raises(ClipdeployError):
        QuantizeConfig(remainder=remainder)
