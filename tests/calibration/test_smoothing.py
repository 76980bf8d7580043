from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from script_module import load_script

from calibration.config import QuantizeConfig
from calibration.distribution import Distribution
from calibration.observers import ChannelObserver
from calibration.policy import LinearSite, find_linears
from calibration.qdq import quantize, smooth
from calibration.scheme import SchemeConfig
from calibration.smoothing import Folding, find_source, fold, search_folding
from calibration.table import CalibrationTable, load_table
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import CalibrateConfig, calibrate_model, export_model
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph, write_model
from exporters.samples import Samples
from exporters.session import OnnxSession

HeldOut = tuple[NDArray[np.float32], NDArray[np.int64]]

PLAIN = SchemeConfig("minmax", False, False, False, False)
# Logits of the demo reach 20; two float32 graphs of the same function differ by some 1e-5.
SAME = 1e-4


def _sqnr_db(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    noise = reference.astype(np.float64) - found.astype(np.float64)
    return 10 * math.log10((reference.astype(np.float64) ** 2).sum() / (noise**2).sum())


def _logits(model: ir.Model, images: NDArray[np.float32], folder: Path) -> NDArray[np.float32]:
    write_model(model, folder / "written.onnx")
    (logits,) = OnnxSession(folder / "written.onnx").run(images)
    return logits


def _sites(model: ir.Model) -> dict[str, LinearSite]:
    return {site.name: site for site in find_linears(model)}


CHOICES = {
    "all": lambda name: True,
    "qkv": lambda name: name.endswith("qkv"),
    "proj": lambda name: ".attn." in name,
    "fc1": lambda name: name.endswith("fc1"),
    "proj without qkv": lambda name: name.endswith("proj"),
    "some": lambda name: name[7] in "135",
}


@pytest.mark.parametrize("which", CHOICES)
def test_smoothing_keeps_the_function_and_adds_no_node(
    which: str,
    source: Path,
    demo_table: CalibrationTable,
    demo_images: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    model = load_graph(source)
    before = [(node.name, node.op_type) for node in model.graph]
    names = set(model.graph.initializers)
    (expected,) = OnnxSession(source).run(demo_images)
    chosen = frozenset(name for name in _sites(model) if CHOICES[which](name))
    foldings = smooth(model, demo_table, chosen)
    assert [(node.name, node.op_type) for node in model.graph] == before
    assert set(model.graph.initializers) == names
    # fc2 reads GELU's output; proj is folded into qkv even if qkv is not quantised.
    assert set(foldings) == {n for n in chosen if not n.endswith("fc2")}
    found = _logits(model, demo_images, tmp_path)
    assert np.abs(found - expected).max() < SAME
    # The weights did change.
    moved = [name for name in foldings if foldings[name].strength is not None]
    assert moved or which == "proj without qkv"


@pytest.mark.parametrize("forgotten", ["bias", "weight", "gain", "offset"])
@pytest.mark.parametrize("name", ["blocks.2.attn.qkv", "blocks.2.attn.proj", "blocks.2.mlp.fc1"])
def test_wrong_fold_is_seen(
    name: str,
    forgotten: str,
    source: Path,
    demo_table: CalibrationTable,
    demo_images: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    model = load_graph(source)
    (expected,) = OnnxSession(source).run(demo_images)
    sites = _sites(model)
    site = sites[name]
    origin = find_source(site, sites)
    assert origin is not None
    assert site.bias is not None
    value = {
        "bias": site.bias,
        "weight": site.weight,
        "gain": origin.gain,
        "offset": origin.offset,
    }[forgotten]
    assert site.weight.const_value is not None
    values = Distribution.of(demo_table.of(name))
    folding = search_folding(values, site.weight.const_value.numpy())
    # A scale that is certainly not 1.
    folding = replace(folding, scale=folding.scale * np.linspace(0.5, 2, len(folding.scale)))
    old = value.const_value
    fold(site, origin, folding)
    assert np.abs(_logits(model, demo_images, tmp_path) - expected).max() < SAME
    value.const_value = old
    assert np.abs(_logits(model, demo_images, tmp_path) - expected).max() > 100 * SAME


def test_sources_are_where_the_input_is_made(source: Path) -> None:
    sites = _sites(load_graph(source))
    for name, site in sites.items():
        origin = find_source(site, sites)
        if site.role == "mlp.fc2":
            assert origin is None
            continue
        assert origin is not None
        expected = {
            "attn.qkv": f"blocks.{site.block}.norm1.weight",
            "mlp.fc1": f"blocks.{site.block}.norm2.weight",
            "attn.proj": f"blocks.{site.block}.attn.qkv.weight",
        }[site.role]
        assert origin.gain.name == expected, name
        assert origin.first == (2 * 96 if site.role == "attn.proj" else 0)


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv", "blocks.1.mlp.fc1"])
def test_layernorm_with_a_second_reader_is_refused(
    name: str, source: Path, demo_table: CalibrationTable
) -> None:
    model = load_graph(source)
    sites = _sites(model)
    assert find_source(sites[name], sites) is not None
    reader = ir.node("Identity", [sites[name].activation], name="second")
    reader.outputs[0].name = "second"
    model.graph.append(reader)
    assert find_source(sites[name], sites) is None
    assert name not in smooth(model, demo_table, frozenset({name}))


@pytest.mark.parametrize(("name", "kind"), [("fc1", "LayerNormalization"), ("proj", "Softmax")])
@pytest.mark.parametrize(("axis", "foldable"), [(1, False), (0, False), (-2, False), (-1, True)])
def test_what_works_along_another_axis_is_refused(
    name: str, kind: str, axis: int, foldable: bool, source: Path
) -> None:
    model = load_graph(source)
    sites = _sites(model)
    site = next(s for s in sites.values() if s.name.startswith("blocks.1.") and name in s.name)
    part = "blocks.1.norm2" if kind == "LayerNormalization" else "blocks.1.attn"
    node = next(n for n in model.graph if n.name == f"{part}/{kind}")
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
    assert (find_source(site, sites) is not None) == foldable


def test_layernorm_without_an_offset_is_refused(source: Path) -> None:
    sites = _sites(load_graph(source))
    site = sites["blocks.1.mlp.fc1"]
    norm = site.activation.producer()
    assert norm is not None
    norm.resize_inputs(2)
    assert find_source(site, sites) is None


def test_proj_without_its_qkv_is_refused(source: Path) -> None:
    sites = _sites(load_graph(source))
    proj = sites["blocks.1.attn.proj"]
    assert find_source(proj, sites) is not None
    del sites["blocks.1.attn.qkv"]
    assert find_source(proj, sites) is None


def _searched(
    values: NDArray[np.float32], weight: NDArray[np.float32]
) -> tuple[Folding, NDArray[np.float32]]:
    observer = ChannelObserver("x", values.shape[1])
    observer.collect(values.min(axis=0), values.max(axis=0), values)
    return search_folding(Distribution.of(observer.compute()), weight), values


def _product_error(
    values: NDArray[np.float32], weight: NDArray[np.float32], folding: Folding
) -> float:
    """Error of x' W', both quantised to eight bits over their full range, against x W - shift W."""
    x = (values - folding.shift) / folding.scale
    w = folding.scale[:, None] * weight
    steps = np.abs(x).max() / 127, np.abs(w).max(axis=0) / 127
    found = (np.rint(x / steps[0]) * steps[0]) @ (np.rint(w / steps[1]) * steps[1])
    return float(((found - x @ w) ** 2).mean())


def test_outlier_channels_are_scaled_and_shifted_away() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4000, 32)).astype(np.float32)
    values[:, 3] *= 80
    values[:, 9] += 50
    weight = rng.standard_normal((32, 24)).astype(np.float32)
    weight[3] /= 80
    folding, _ = _searched(values, weight)
    # The middle of the observed range: exact but for float32.
    middle = (values.min(axis=0) + values.max(axis=0)) / 2
    np.testing.assert_allclose(folding.shift, middle, rtol=1e-5, atol=1e-5)
    assert folding.strength is not None
    assert folding.scale[3] > 10 * np.median(folding.scale)
    found = _product_error(values, weight, folding)
    # 80 times finer steps: far more than a factor of 100 in squared error.
    assert found < 0.01 * _product_error(values, weight, Folding.none(32))


def test_a_given_strength_is_taken() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4000, 8)).astype(np.float32)
    values[:, 3] *= 80
    weight = rng.standard_normal((8, 6)).astype(np.float32)
    observer = ChannelObserver("x", 8)
    observer.collect(values.min(axis=0), values.max(axis=0), values)
    found = Distribution.of(observer.compute())
    spread = (found.largest - found.smallest) / 2
    whole = search_folding(found, weight, 1.0)
    assert whole.strength == 1.0
    # By definition, all channels have the same range at strength 1.
    np.testing.assert_allclose(spread / whole.scale, (spread / whole.scale)[0], rtol=1e-6)
    none = search_folding(found, weight, 0.0)
    top = np.abs(weight).max(axis=1)
    np.testing.assert_allclose(none.scale * top, (none.scale * top)[0], rtol=1e-6)
    assert np.ptp(spread / none.scale) > 1


def test_folding_none_changes_nothing(source: Path) -> None:
    model = load_graph(source)
    sites = _sites(model)
    site = sites["blocks.0.mlp.fc1"]
    origin = find_source(site, sites)
    assert origin is not None
    values = (origin.gain, origin.offset, site.weight, site.bias)
    before = [value.const_value.numpy().tobytes() for value in values]
    fold(site, origin, Folding.none(96))
    assert [value.const_value.numpy().tobytes() for value in values] == before


@dataclass(frozen=True)
class Outliers:
    """The demo's function with channel outliers: FP32 graph and table."""

    graph: Path
    table: Path


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Outliers:
    script = load_script("make_outlier_variants")
    folder = tmp_path_factory.mktemp("outliers")
    tensors = load_file(cards.demo_file("weights.safetensors"))
    save_file(script.add_channel_outliers(tensors, script.SEED), folder / "channels.safetensors")
    workspace = Workspace(folder / "artifacts")
    export_model(workspace, cards.DEMO, WeightsChoice(checkpoint=folder / "channels.safetensors"))
    calibrate_model(
        workspace, cards.DEMO, cards.demo_file("calibration.zip"), CalibrateConfig(images=64)
    )
    return Outliers(workspace.graph(cards.DEMO, "fp32"), workspace.calibration(cards.DEMO))


def _quality(
    graph: Path,
    table: Path,
    scheme: SchemeConfig,
    samples: Samples,
    folder: Path,
    held_out: HeldOut,
    reference: NDArray[np.float32],
) -> tuple[float, float]:
    """SQNR against PyTorch in dB and top-1 in points on the held-out digits."""
    target = folder / "quality.onnx"
    quantize(
        graph,
        table,
        target,
        samples,
        QuantizeConfig(remainder="fp32", scheme=scheme, min_sqnr=None),
    )
    (logits,) = OnnxSession(target).run(held_out[0])
    return _sqnr_db(reference, logits), 100 * float((logits.argmax(1) == held_out[1]).mean())


def test_default_recipe_survives_outliers_that_ruin_minmax(
    outliers: Outliers,
    source: Path,
    calibration: Path,
    samples: Samples,
    held_out: HeldOut,
    reference: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    def quality(graph: Path, table: Path, scheme: SchemeConfig) -> tuple[float, float]:
        return _quality(graph, table, scheme, samples, tmp_path, held_out, reference)

    # The variant computes the same function as the demo.
    (logits,) = OnnxSession(outliers.graph).run(held_out[0])
    assert _sqnr_db(reference, logits) > 90
    top1 = 100 * float((reference.argmax(1) == held_out[1]).mean())
    plain_minmax, _ = quality(source, calibration, PLAIN)
    ruined, _ = quality(outliers.graph, outliers.table, PLAIN)
    assert ruined < plain_minmax - 20, f"{plain_minmax:.1f} -> {ruined:.1f} dB"
    plain, _ = quality(source, calibration, SchemeConfig())
    kept, kept_top1 = quality(outliers.graph, outliers.table, SchemeConfig())
    assert kept > plain - 4, f"{plain:.1f} -> {kept:.1f} dB"
    assert abs(kept_top1 - top1) <= 1
    # Without smoothing the outliers cost accuracy.
    without, _ = quality(outliers.graph, outliers.table, SchemeConfig(smooth=False))
    assert without < plain - 4, f"{plain:.1f} -> {without:.1f} dB"


def test_smoothing_the_outlier_variant_keeps_its_function(
    outliers: Outliers, demo_images: NDArray[np.float32], tmp_path: Path
) -> None:
    model = load_graph(outliers.graph)
    (expected,) = OnnxSession(outliers.graph).run(demo_images)
    foldings = smooth(model, load_table(outliers.table), frozenset(_sites(model)))
    assert np.abs(_logits(model, demo_images, tmp_path) - expected).max() < SAME
    # Three channels of each have a planted factor of 20 to 100: the scales undo it.
    for folding in foldings.values():
        assert folding.scale.max() > 3 * np.median(folding.scale)
