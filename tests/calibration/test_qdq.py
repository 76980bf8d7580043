"""The quantised graphs of the demo, in each format, scope and form of the weight scales.

Covers: calibration/config.py.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from planted import calibrated

from calibration.config import QuantizeConfig, stored_settings
from calibration.policy import Scope, find_linears, find_products, place
from calibration.qdq import quantize
from calibration.quality import Judge
from calibration.recipe import QuantizeRecipe, load_recipe, save_recipe
from calibration.scheme import SchemeConfig
from calibration.table import CalibrationTable, load_table, pack, save_table
from clipdeploy.core.errors import (
    ArtifactError,
    CalibrationError,
    ClipdeployError,
    GraphError,
    UsageError,
)
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Preprocess, ScaleForm
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.headers import read_passport
from exporters.samples import Samples
from exporters.session import OnnxSession

Make = Callable[[QuantizeConfig], Path]
HeldOut = tuple[NDArray[np.float32], NDArray[np.int64]]

# The demo gives 41 dB on the held-out digits with either remainder, 31 dB with everything in INT8;
# ranges wrong by a factor of two give less than the floor.
FLOOR_DB = 39.0
FLOOR_ALL_DB = 28.0

CPU = QuantizeConfig(remainder="fp32")
EXCLUDE = ("blocks.0.*", "blocks.3.mlp.fc2")
PARTIAL = QuantizeConfig(exclude=EXCLUDE, remainder="fp32")
EXCLUDED = {*(f"blocks.0.{r}" for r in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))} | {
    "blocks.3.mlp.fc2"
}
SCOPES = [Scope(*flags) for flags in itertools.product((False, True), repeat=3)]
ALL_SCOPE = SCOPES[-1]
# What a product and a Linear, the head and the patch convolution are computed with.
KINDS = {"head": "Gemm", "patch_embed": "Conv"}


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


def _is_made_by(value: ir.Value | None, kind: str) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == kind


def _quantised_nodes(model: ir.Model) -> dict[str, list[int]]:
    """Nodes that read a DequantizeLinear, by name, with the input indices."""
    found = {}
    for node in model.graph:
        at = [i for i, value in enumerate(node.inputs) if _is_made_by(value, "DequantizeLinear")]
        if at:
            found[node.name or ""] = at
    return found


def _expected_nodes(plain: Path, names: tuple[str, ...]) -> dict[str, list[int]]:
    """The nodes that must read a DequantizeLinear if ``names`` run in INT8."""
    products = {p.name: p.node.name or "" for p in find_products(load_graph(plain))}
    return {products.get(n, f"{n}/{KINDS.get(n, 'MatMul')}"): [0, 1] for n in names}


def _check_graph(path: Path, plain: Path, names: tuple[str, ...], *, unsigned: bool) -> None:
    """Check that exactly the nodes in ``names`` have Q/DQ pairs, and that the pairs are valid."""
    model, before = load_graph(path), load_graph(plain)
    assert _quantised_nodes(model) == _expected_nodes(plain, names)
    kinds = {"QuantizeLinear": 0, "DequantizeLinear": 0, "Sub": 0}
    for node in model.graph:
        if node.op_type not in kinds:
            continue
        kinds[node.op_type] += 1
        assert len(node.outputs[0].consumers()) == 1, node.name
        if node.op_type == "DequantizeLinear" and _is_made_by(node.inputs[0], "QuantizeLinear"):
            q = _producer(node.inputs[0])
            # One scale, one zero point, shared by the pair.
            assert list(q.inputs[1:]) == list(node.inputs[1:])
            assert _array(q.inputs[1]).shape == ()
            assert _array(q.inputs[2]).dtype == (np.uint8 if unsigned else np.int8)
            assert unsigned or int(_array(q.inputs[2])) == 0
        elif node.op_type == "DequantizeLinear":
            axis = node.attributes["axis"].as_int()
            weight = _array(node.inputs[0])
            assert weight.dtype == np.int8
            assert np.abs(weight.astype(int)).max() == 127
            assert _array(node.inputs[1]).shape == (weight.shape[axis],)
    products = sum(n.endswith((".scores", ".mix")) for n in names)
    assert kinds["QuantizeLinear"] == len(names) + products
    assert kinds["DequantizeLinear"] == 2 * len(names)
    others = sum(node.op_type == "Sub" for node in before.graph)
    shifted = sum(n.endswith("fc2") for n in names) if not unsigned else 0
    assert kinds["Sub"] == others + shifted
    # Only pairs and their Subs are new, and the other nodes keep their order.
    new = ("/Q", "/DQ", "/weight_DQ", "/Sub")
    left = [n.name for n in model.graph if not (n.name or "").endswith(new) and n.op_type != "Cast"]
    assert left == [n.name for n in before.graph if n.op_type != "Cast"]
    for site in find_linears(before):
        if site.name in names:
            (matmul,) = (n for n in model.graph if n.name == site.matmul.name)
            (add,) = matmul.outputs[0].consumers()
            # The bias stays floating point: TensorRT-RTX refuses an int32 DequantizeLinear.
            assert _array(add.inputs[1]).dtype in (np.float16, np.float32)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_pairs_sit_where_placement_says(
    scope: Scope, source: Path, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    # Min-max is the fastest method; the placement of pairs does not depend on it.
    scheme = SchemeConfig(range_method="minmax", clip_weights=False, smooth=False)
    config = QuantizeConfig(remainder="fp32", scope=scope, scheme=scheme)
    result = quantize(source, calibration, tmp_path / "x.onnx", samples, config)
    # The last block's attention is left out.
    count = 24 + 10 * scope.attention + scope.head + scope.patch
    assert len(result.placement.quantized) == count
    _check_graph(tmp_path / "x.onnx", source, result.placement.quantized, unsigned=True)
    assert result.artifact.passport.settings["int8_nodes"] == count
    names = result.placement.quantized[1:]
    with pytest.raises(AssertionError):
        _check_graph(tmp_path / "x.onnx", source, names, unsigned=True)


@pytest.mark.parametrize("scope", [SCOPES[0], ALL_SCOPE], ids=str)
def test_pairs_of_the_int8_dialect(scope: Scope, make_int8: Make, source: Path) -> None:
    names = place(load_graph(source), (), scope).quantized
    _check_graph(make_int8(QuantizeConfig(scope=scope)), source, names, unsigned=False)


def _rounded_sums(path: Path) -> dict[str, str]:
    """The Linears whose MatMul output is quantised, and the node that reads the result."""
    found = {}
    for node in load_graph(path).graph:
        if node.op_type == "MatMul" and (readers := node.outputs[0].consumers()):
            if readers[0].op_type != "QuantizeLinear":
                continue
            (dq,) = readers[0].outputs[0].consumers()
            (reader,) = dq.outputs[0].consumers()
            name, after = node.name or "", reader.name or ""
            found[name.removesuffix("/MatMul")] = after.rpartition("/")[2]
    return found


@pytest.mark.parametrize(("form", "reader"), [("ratio", "ratio"), ("tensor", "Add")])
def test_rounded_sums_are_those_of_quantised_qkv_and_fc1(
    form: ScaleForm,
    reader: str,
    make_int8: Make,
    held_out: HeldOut,
    reference: NDArray[np.float32],
) -> None:
    config = QuantizeConfig(EXCLUDE, scope=Scope(outputs=True), weight_scales=form)
    path = make_int8(config)
    names = [f"blocks.{n}.{role}" for n in range(1, 6) for role in ("attn.qkv", "mlp.fc1")]
    assert _rounded_sums(path) == dict.fromkeys(names, reader)
    plain = make_int8(replace(config, scope=Scope()))
    assert _rounded_sums(plain) == {}
    # Five digits of each class.
    few = slice(None, None, 10)
    decibels = [
        _sqnr_db(reference[few], OnnxSession(graph).run(held_out[0][few])[0])
        for graph in (plain, path)
    ]
    # The largest sum is the range, as it should be: a range too narrow or too wide costs more.
    assert decibels[0] - 5 < decibels[1] < decibels[0] - 0.5


def test_too_narrow_a_range_of_sums_is_noticed(
    make_int8: Make, source: Path, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    config = QuantizeConfig(scope=Scope(outputs=True), weight_scales="ratio")
    with pytest.MonkeyPatch.context() as patch:
        wide = Judge.peaks_of
        patch.setattr(
            Judge, "peaks_of", lambda *given: {k: v / 16 for k, v in wide(*given).items()}
        )
        with pytest.raises(CalibrationError, match="below 10 dB"):
            quantize(source, calibration, tmp_path / "x.onnx", samples, config)
    with pytest.raises(UsageError, match="8-bit outputs are for TensorRT"):
        QuantizeConfig(remainder="fp32", scope=Scope(outputs=True))


def test_settings_of_earlier_versions_have_no_outputs(tmp_path: Path) -> None:
    assert "outputs" not in stored_settings(QuantizeConfig())["scope"]
    assert stored_settings(QuantizeConfig(scope=Scope(outputs=True)))["scope"]["outputs"] is True
    path = tmp_path / "recipe.json"
    for scope in (Scope(), Scope(outputs=True)):
        config = QuantizeConfig(scope=scope)
        save_recipe(QuantizeRecipe("demo", "none", config), path)
        loaded = load_recipe(path).config
        assert loaded == config
        assert stored_settings(loaded) == stored_settings(config)


def test_excluded_ones_stay_float(source: Path, make_int8: Make) -> None:
    path = make_int8(PARTIAL)
    sites = find_linears(load_graph(source))
    names = tuple(site.name for site in sites if site.name not in EXCLUDED)
    _check_graph(path, source, names, unsigned=True)
    left = {site.name: site for site in find_linears(load_graph(path))}
    assert set(left) == EXCLUDED
    for site in sites:
        if site.name in EXCLUDED:
            assert _array(left[site.name].weight).tobytes() == _array(site.weight).tobytes()
            assert left[site.name].activation.name == site.activation.name


def test_excluded_product_and_head_stay_float(
    source: Path, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    scheme = SchemeConfig(range_method="minmax", clip_weights=False, smooth=False)
    config = QuantizeConfig(("head", "*.scores", "blocks.[0-35].*"), "fp32", scheme, ALL_SCOPE)
    result = quantize(source, calibration, tmp_path / "x.onnx", samples, config)
    linears = tuple(f"blocks.4.{r}" for r in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    assert result.placement.quantized == ("patch_embed", *linears, "blocks.4.attn.mix")
    _check_graph(tmp_path / "x.onnx", source, result.placement.quantized, unsigned=True)


def test_passport_says_what_was_done(make_int8: Make, source: Path, calibration: Path) -> None:
    for config, precision in ((PARTIAL, "int8-cpu"), (QuantizeConfig(), "int8")):
        passport = read_passport(make_int8(config))
        assert passport.precision == precision
        assert passport.parents == {
            "source_graph": sha256_file(source),
            "calibration": sha256_file(calibration),
        }
        recorded = replace(config, weight_scales="channel")
        assert passport.settings.items() >= stored_settings(recorded).items()
        assert passport.settings["int8_nodes"] == 24 - 5 * (config is PARTIAL)


def test_nothing_is_quantised_when_all_is_excluded(
    source: Path, make_int8: Make, demo_images: NDArray[np.float32]
) -> None:
    path = make_int8(QuantizeConfig(exclude=("*",), remainder="fp32"))
    (found,) = OnnxSession(path).run(demo_images)
    (expected,) = OnnxSession(source).run(demo_images)
    assert found.tobytes() == expected.tobytes()


def test_without_corrections_only_scales_and_zero_points_are_new(
    make_int8: Make, source: Path
) -> None:
    scheme = SchemeConfig("minmax", False, False, False, False)
    new = load_graph(make_int8(QuantizeConfig(remainder="fp32", scheme=scheme))).graph.initializers
    old = load_graph(source).graph.initializers
    weights = {site.weight.name for site in find_linears(load_graph(source))}
    assert weights.isdisjoint(new)
    for name in set(old) - weights:
        assert _array(new[name]).tobytes() == _array(old[name]).tobytes()
    suffixes = ("input_scale", "zero_point", ".weight/int8", ".weight/scale")
    assert all(name.endswith(suffixes) for name in set(new) - set(old))


def test_both_dialects_hold_the_same_integers_and_scales(make_int8: Make) -> None:
    one = load_graph(make_int8(QuantizeConfig())).graph.initializers
    other = load_graph(make_int8(CPU)).graph.initializers
    integers = [n for n in other if n.endswith("/int8")]
    scales = [n for n in other if n.endswith(("/scale", "input_scale"))]
    assert (len(integers), len(scales)) == (24, 48)
    for name in integers:
        assert _array(one[name]).tobytes() == _array(other[name]).tobytes()
    for name in scales:
        half = _array(one[f"{name}/fp16"] if f"{name}/fp16" in one else one[name])
        assert half.astype(np.float32).tobytes() == _array(other[name]).tobytes(), name
    for name in (n for n in other if n.endswith("input_zero_point")):
        point = int(_array(other[name]))
        step = float(_array(other[name.replace("zero_point", "scale")]))
        assert (point != 128) == ("fc2" in name)
        if "fc2" in name:
            # GELU is one-sided: its zero is near the lowest level.
            assert 0 < point < 40
            shift = one[name.replace("zero_point", "shift") + "/fp16"]
            # float16 keeps eleven bits.
            assert float(_array(shift)) == pytest.approx(step * (128 - point), rel=2**-10)


def test_both_forms_of_the_weight_scales_hold_the_same_integers(
    make_int8: Make, held_out: HeldOut
) -> None:
    channel, ratio = (make_int8(QuantizeConfig(weight_scales=f)) for f in ("channel", "ratio"))
    one, other = (load_graph(path).graph.initializers for path in (channel, ratio))
    integers = [name for name in one if name.endswith("/int8")]
    assert len(integers) == 24
    for name in integers:
        assert _array(one[name]).tobytes() == _array(other[name]).tobytes()
        scale = name.replace("/int8", "/scale/fp16")
        assert _array(other[scale]) == _array(one[scale]).max()
    assert read_passport(ratio).settings["weight_scales"] == "ratio"
    answers = [OnnxSession(path).run(held_out[0][::5])[0] for path in (channel, ratio)]
    # Only float16 rounding differs: 45.0 dB measured, as between the two dialects.
    assert _sqnr_db(*answers) > 42
    assert not np.array_equal(*answers)


@pytest.mark.parametrize(
    ("form", "remainder", "said"),
    [("rows", "fp16", "'rows'"), ("", "fp16", "''"), ("ratio", "fp32", "ratio form")],
)
def test_a_form_of_the_weight_scales_that_cannot_be_is_refused(
    form: Any, remainder: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        QuantizeConfig(weight_scales=form, remainder=remainder)


def test_both_dialects_agree(
    make_int8: Make, held_out: HeldOut, reference: NDArray[np.float32]
) -> None:
    few = held_out[0][::5]
    (one,) = OnnxSession(make_int8(QuantizeConfig())).run(few)
    (other,) = OnnxSession(make_int8(CPU), exact_int8=True).run(few)
    # The same grid; FP16 rounding sometimes selects the neighbouring level: 43.4 dB measured.
    assert _sqnr_db(one, other) > 42
    minmax = QuantizeConfig(remainder="fp32", scheme=SchemeConfig("minmax", smooth=False))
    (another,) = OnnxSession(make_int8(minmax), exact_int8=True).run(few)
    assert _sqnr_db(one, another) < 42


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
@pytest.mark.parametrize("scope", [SCOPES[0], ALL_SCOPE], ids=str)
def test_int8_keeps_logits_and_accuracy(
    remainder: Any,
    scope: Scope,
    make_int8: Make,
    held_out: HeldOut,
    reference: NDArray[np.float32],
) -> None:
    path = make_int8(QuantizeConfig(remainder=remainder, scope=scope))
    onnx.checker.check_model(str(path), full_check=True)
    # Every other digit: one wrong more of 250 is 0.4 points.
    (logits,) = OnnxSession(path, exact_int8=remainder == "fp32").run(held_out[0][::2])
    found = _sqnr_db(reference[::2], logits)
    assert found >= (FLOOR_DB if scope == SCOPES[0] else FLOOR_ALL_DB), f"{found:.1f} dB"
    # An FP16 graph gives 66 dB: above 50 nothing would have been quantised.
    assert found < 50, f"{found:.1f} dB"
    labels = held_out[1][::2]
    right = [100 * float((x.argmax(1) == labels).mean()) for x in (reference[::2], logits)]
    assert abs(right[0] - right[1]) <= 1


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_ruined_ranges_fall_below_the_floor(
    factor: float,
    source: Path,
    calibration: Path,
    samples: Samples,
    tmp_path: Path,
    held_out: HeldOut,
    reference: NDArray[np.float32],
) -> None:
    table = load_table(calibration)
    ruined = {}
    for name in table.statistics:
        statistics = table.of(name)
        extremes = [x * np.float32(factor) for x in (statistics.minimum, statistics.maximum)]
        ruined[name] = pack(replace(statistics, minimum=extremes[0], maximum=extremes[1]))
    save_table(replace(table, statistics=ruined), tmp_path / "c.json")
    scheme = SchemeConfig("minmax", False, False, False, False)
    config = QuantizeConfig(remainder="fp32", scheme=scheme)
    quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", samples, config)
    (logits,) = OnnxSession(tmp_path / "x.onnx", exact_int8=True).run(held_out[0][:100])
    # Right ranges give plain min-max 38.5 dB.
    assert _sqnr_db(reference[:100], logits) < 37


def test_excluding_some_brings_the_logits_nearer(
    make_int8: Make, held_out: HeldOut, reference: NDArray[np.float32]
) -> None:
    some, every = (
        _sqnr_db(
            reference[:100],
            OnnxSession(make_int8(config), exact_int8=True).run(held_out[0][:100])[0],
        )
        for config in (PARTIAL, CPU)
    )
    assert some > every


SWITCHES = ("smooth", "shift_gelu", "clip_weights", "correct_bias")


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_changes_the_graph_and_none_ruins_it(
    switch: str, make_int8: Make, held_out: HeldOut, reference: NDArray[np.float32]
) -> None:
    config = QuantizeConfig(remainder="fp32", scheme=SchemeConfig(**{switch: False}))
    path, whole = make_int8(config), make_int8(CPU)
    one, other = load_graph(path).graph.initializers, load_graph(whole).graph.initializers
    assert set(one) == set(other)
    differ = {name for name in one if _array(one[name]).tobytes() != _array(other[name]).tobytes()}
    assert differ
    if switch == "correct_bias":
        assert all(name.endswith(".bias") for name in differ)
    if switch == "shift_gelu":
        assert {n for n in differ if n.endswith("input_zero_point")}
        points = [int(_array(one[n])) for n in one if n.endswith("input_zero_point")]
        assert points == [128] * 24
    if switch == "smooth":
        assert any("norm" in name for name in differ)
    (logits,) = OnnxSession(path, exact_int8=True).run(held_out[0][:100])
    # Each is worth a few dB at most on a model without outliers: 39.2 dB without smoothing.
    assert _sqnr_db(reference[:100], logits) > FLOOR_DB - 1.5


def _optimised_operators(path: Path, folder: Path) -> list[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(folder / "optimised.onnx"))
    return [node.op_type for node in model.graph.node]


INT8_KERNELS = ("MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulInteger")


@pytest.mark.parametrize("config", [CPU, PARTIAL], ids=["all", "some"])
def test_onnx_runtime_recognises_every_linear_of_the_cpu_flavour(
    config: QuantizeConfig, make_int8: Make, tmp_path: Path
) -> None:
    operators = _optimised_operators(make_int8(config), tmp_path)
    assert sum(operator in INT8_KERNELS for operator in operators) == 24 - 5 * bool(config.exclude)


def test_onnx_runtime_finds_no_int8_kernel_in_the_fp32_graph(source: Path, tmp_path: Path) -> None:
    assert not set(_optimised_operators(source, tmp_path)) & set(INT8_KERNELS)


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
    what: str,
    change: dict[str, Any],
    source: Path,
    calibration: Path,
    samples: Samples,
    tmp_path: Path,
) -> None:
    _resave(calibration, tmp_path / "c.json", **change)
    with pytest.raises(ArtifactError, match=rf"c\.json was made for another {what}: ") as found:
        quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", samples)
    assert found.value.hint == "calibrate this model again"
    assert os.listdir(tmp_path) == ["c.json"]


def test_calibration_without_a_linear_is_refused(
    source: Path, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    statistics = dict(load_table(calibration).statistics)
    del statistics["blocks.4.attn.proj"]
    _resave(calibration, tmp_path / "c.json", statistics=statistics)
    with pytest.raises(CalibrationError, match=r"has no statistics of blocks\.4\.attn\.proj"):
        quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", samples)
    config = QuantizeConfig(exclude=("blocks.4.attn.proj",))
    quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", samples, config)


def test_calibration_edited_by_hand_is_refused(
    source: Path, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    text = calibration.read_text(encoding="utf-8")
    (tmp_path / "c.json").write_text(text.replace('"rows": ', '"rows": 1', 1), encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not match its seal"):
        quantize(source, tmp_path / "c.json", tmp_path / "x.onnx", samples)
    assert os.listdir(tmp_path) == ["c.json"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_graph_of_the_same_model_is_refused(
    precision: str, demo_workspace: Workspace, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="made for another source graph"):
        quantize(
            demo_workspace.graph(cards.DEMO, precision), calibration, tmp_path / "x.onnx", samples
        )
    assert os.listdir(tmp_path) == []


def test_pattern_that_matches_nothing_is_refused(
    source: Path, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(GraphError, match=r"'blocks\.77\.\*' matches no Linear"):
        quantize(
            source, calibration, tmp_path / "x.onnx", samples, QuantizeConfig(("blocks.77.*",))
        )
    assert os.listdir(tmp_path) == []


def test_same_inputs_give_the_same_bytes(
    demo_workspace: Workspace, source: Path, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    made = demo_workspace.graph(cards.DEMO, "int8")
    config = QuantizeConfig(weight_scales=read_passport(made).settings["weight_scales"])
    quantize(source, calibration, tmp_path / "x.onnx", samples, config)
    assert (tmp_path / "x.onnx").read_bytes() == made.read_bytes()


@pytest.mark.parametrize("remainder", ["bf16", "FP16", ""])
def test_unknown_remainder_is_refused(remainder: str) -> None:
    with pytest.raises(ClipdeployError):
        QuantizeConfig(remainder=remainder)


def test_a_head_that_holds_its_weight_the_other_way_round_is_quantised_alike(
    source: Path, samples: Samples, demo_images: NDArray[np.float32], tmp_path: Path
) -> None:
    turned = tmp_path / "turned.onnx"
    model = onnx.load(source)
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    weight = next(w for w in model.graph.initializer if w.name == gemm.input[1])
    array = np.ascontiguousarray(onnx.numpy_helper.to_array(weight).T)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    del gemm.attribute[[a.name for a in gemm.attribute].index("transB")]
    onnx.save(model, turned)
    config = QuantizeConfig(remainder="fp32", scope=Scope(head=True))
    found = []
    for graph in (source, turned):
        table, target = tmp_path / f"{graph.stem}.json", tmp_path / f"{graph.stem}.int8.onnx"
        calibrated(graph, table, images=4)
        quantize(graph, table, target, samples, config)
        found.append(OnnxSession(target, exact_int8=True).run(demo_images)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
