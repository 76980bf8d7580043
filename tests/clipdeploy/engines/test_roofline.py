"""The roofline's kernels are those of real plans, and its times follow from the data sheets."""

from __future__ import annotations

from itertools import product
from typing import Any

import onnx
import pytest
from compiling import compiled_plan
from fp8_graphs import as_fp8

from calibration.config import QuantizeConfig
from calibration.policy import Scope
from calibration.qdq import quantize
from clipdeploy.core.errors import UsageError
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.gpus import Format, all_gpus, find_gpu
from clipdeploy.engines.plan_text import (
    PlanKernel,
    kernels_by_block,
    overflowing,
    read_programs,
)
from clipdeploy.engines.roofline import (
    LAUNCH_SECONDS,
    PRODUCT_SHARE,
    Formats,
    Geometry,
    Kernel,
    block_linears,
    block_products,
    check_formats,
    engine_seconds,
    every_linear,
    geometry_of,
    kernel_seconds,
    kernels,
    linear_outputs,
)
from clipdeploy.models import cards
from clipdeploy.stages.samples import sample_images
from clipdeploy.workspace.folder import Workspace

ONE_GPU = BuildConfig(compute_capability=("8.9",))
# Attention's products, and the Linears left in FP16: in one graph another one in each inner block.
GRAPHS: dict[str, tuple[Scope, tuple[str, ...]]] = {
    "int8": (Scope(), ()),
    "int8 mixed": (
        Scope(),
        ("blocks.1.attn.qkv", "blocks.2.mlp.fc1", "blocks.3.mlp.fc2", "blocks.4.attn.proj"),
    ),
    "int8 attention": (Scope(attention=True), ("blocks.4.attn.proj",)),
    "int8 outputs": (Scope(outputs=True), ()),
    "int8 attention outputs": (Scope(attention=True, outputs=True), ()),
}


def formats(case: str) -> Formats:
    """The formats of a plan below, such as ``fp8 attention``."""
    if case == "fp16":
        return {}
    form: Format = "fp8" if case.startswith("fp8") else "int8"
    scope, exclude = GRAPHS[case.replace("fp8", "int8")]
    chosen = every_linear(6, form, attention=scope.attention, outputs=scope.outputs)
    return {name: value for name, value in chosen.items() if name not in exclude}


@pytest.fixture(scope="module")
def plans(
    demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[PlanKernel, ...]]:
    """The kernels that TensorRT-RTX compiles the demo to, by format."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    from clipdeploy.engines.backends import tensorrt_module

    compiler = Compiler("tensorrt-rtx", tensorrt_module("tensorrt-rtx"))
    folder = tmp_path_factory.mktemp("plans")
    source, passport = demo_workspace.source(cards.DEMO)
    samples = sample_images(passport.preprocess, 3)
    graphs = {"fp16": demo_workspace.graph(cards.DEMO, "fp16")}
    for case, (scope, exclude) in GRAPHS.items():
        graphs[case] = folder / f"{case}.onnx"
        config = QuantizeConfig(exclude, scope=scope, weight_scales="ratio", min_sqnr=None)
        quantize(source, demo_workspace.calibration(cards.DEMO), graphs[case], samples, config)
    for case in ("int8", "int8 mixed", "int8 attention", "int8 outputs"):
        other = case.replace("int8", "fp8")
        graphs[other] = folder / f"{other}.onnx"
        onnx.save(as_fp8(graphs[case]), graphs[other])
    made = {}
    for case, graph in graphs.items():
        plan = folder / f"{case}.engine"
        plan.write_bytes(compiled_plan(compiler, graph, ONE_GPU))
        with plan.open("rb") as stream:
            (made[case],) = read_programs(stream)
    return made


def counts(case: str) -> dict[str, int]:
    """The roofline's number of kernels in each of the demo's blocks."""
    geometry = Geometry.of_card(cards.find(cards.DEMO))
    made = kernels(geometry, formats(case), 8)
    return {f"blocks.{n}": sum(k.block == f"blocks.{n}" for k in made) for n in range(6)} | {
        "all": len(made)
    }


# The first block merges with the stem, the last one computes class tokens only.
INNER = [f"blocks.{number}" for number in range(1, 5)]


def test_the_kernels_of_every_block_are_those_of_the_plan(
    plans: dict[str, tuple[PlanKernel, ...]],
) -> None:
    per_block = {}
    for case, found in plans.items():
        expected, compiled = counts(case), kernels_by_block(found)
        # First and last block: TensorRT-RTX merges or splits up to four kernels.
        assert abs(expected["all"] - len(found)) <= 4, case
        per_block[case] = [compiled[name] for name in INNER]
        if case != "int8 attention":
            assert [expected[name] for name in INNER] == per_block[case]
    assert per_block["fp16"] == [8] * 4
    assert per_block["int8"] == [10] * 4
    assert per_block["fp8"] == per_block["fp8 attention"] == [9] * 4
    assert per_block["int8 mixed"] == [10, 10, 10, 9]
    # GELU rounds to FP8 in the kernel of an FP16 fc1, in the second of these blocks.
    assert per_block["fp8 mixed"] == [9, 8, 9, 9]
    # Rounding the sums of qkv and fc1 adds no kernel.
    assert per_block["int8 outputs"] == [10] * 4
    assert per_block["int8 attention outputs"] == per_block["fp8 outputs"] == [9] * 4
    # One of the 15 kernels is of no node, as is one of the last block's.
    assert per_block["int8 attention"] == [9, 9, 9, 14]
    assert kernels_by_block(plans["int8 attention"])["other"] == 2
    assert [counts("int8 attention")[name] for name in INNER] == [9, 9, 9, 15]


def test_products_write_8_bits_where_their_sums_are_rounded(
    plans: dict[str, tuple[PlanKernel, ...]],
) -> None:
    written = {
        case: {k.layers[0]: k.output for k in plans[case] if k.output}
        for case in ("int8", "int8 outputs", "fp8 outputs")
    }
    names = [f"{name}/MatMul" for name in block_linears(3)]
    assert [written["int8"][name] for name in names] == ["half"] * 4
    for case, eight in (("int8 outputs", "int8"), ("fp8 outputs", "fp8_e4m3")):
        found = [written[case][name] for name in names]
        assert found == [eight, "half", eight, "half"]
        assert not overflowing(plans[case])


def test_int8_attention_of_many_tokens_is_not_fused() -> None:
    """As in the plans of ViT-B/16-384: 15 kernels a block in INT8, 9 in FP8."""
    geometry = Geometry.of_card(cards.find("clip-vit-base-p16-384px"))
    for form, count in (("int8", 15), ("fp8", 9)):
        made = kernels(geometry, every_linear(12, form, attention=True), 1)  # type: ignore[arg-type]
        assert sum(kernel.block == "blocks.3" for kernel in made) == count


def test_the_kernels_of_another_format_are_noticed(
    plans: dict[str, tuple[PlanKernel, ...]],
) -> None:
    for case, other in (("int8", "fp16"), ("int8", "fp8"), ("fp16", "int8 attention")):
        compiled = kernels_by_block(plans[case])
        assert [counts(other)[name] for name in INNER] != [compiled[name] for name in INNER]


def test_operations_are_the_macs_of_the_card() -> None:
    narrow = cards.find("vit-p16-224px-w384-d4-h6-m1024")
    assert narrow.hidden == 1024
    for card in (*cards.all_cards(), narrow):
        made = kernels(Geometry.of_card(card), {}, 3)
        # The last block's queries, proj and MLP are only those of the class token.
        tokens = card.tokens - 1
        hidden = card.hidden or 4 * card.width
        unused = tokens * card.width * (card.width + 2 * hidden + 2 * card.tokens)
        macs = sum(kernel.operations for kernel in made) / 2 / 3
        assert macs == pytest.approx(card.macs - unused, rel=2e-3), card.name


def test_bytes_of_a_block_by_hand() -> None:
    geometry = Geometry(224, 16, 768, 12, 12, 1000)
    width, rows = 768, 32 * 197
    block = {k.name: k for k in kernels(geometry, {}, 32) if k.block == "blocks.3"}
    values, weights = rows * width, width**2
    assert {name: kernel.bytes for name, kernel in block.items()} == {
        "norm1": 4 * values,
        "attn.qkv": 8 * values + 6 * weights,
        "attn.split": 12 * values,
        "attn": 8 * values,
        "attn.proj": 6 * values + 2 * weights,
        "norm2": 4 * values,
        "mlp.fc1": 10 * values + 8 * weights,
        "mlp.fc2": 12 * values + 8 * weights,
    }
    int8 = every_linear(12, "int8", attention=True)
    quantised = {k.name: k for k in kernels(geometry, int8, 32) if k.block == "blocks.3"}
    assert {name: kernel.bytes for name, kernel in quantised.items()} == {
        "norm1": 7 * values,
        "attn.qkv": 7 * values + 3 * weights,
        "attn.split": 9 * values,
        "attn": 4 * values,
        "attn.proj": 3 * values + weights,
        "norm2": 7 * values,
        "mlp.fc1": 9 * values + 4 * weights,
        "mlp.gelu": 12 * values,
        "mlp.fc2": 6 * values + 4 * weights,
    }
    rounded = every_linear(12, "int8", attention=True, outputs=True)
    smaller = {k.name: k for k in kernels(geometry, rounded, 32) if k.block == "blocks.3"}
    saved = {
        name: (quantised[name].bytes - kernel.bytes) / values for name, kernel in smaller.items()
    }
    assert {name: count for name, count in saved.items() if count} == {
        "attn.qkv": 3,
        "attn.split": 3,
        "mlp.fc1": 4,
        "mlp.gelu": 4,
    }
    # Half of attention's operations are in each product.
    assert block["attn"].operations == 2 * 2 * rows * 197 * width


def test_a_kernel_takes_the_longer_of_computing_and_moving() -> None:
    gpu = find_gpu("L4")
    moving = kernel_seconds(Kernel("a", "b", 1e9, 3e9), gpu)
    computing = kernel_seconds(Kernel("a", "b", 242e12, 1.0, "int8"), gpu)
    assert moving == pytest.approx(3e9 / 300e9 + LAUNCH_SECONDS)
    assert computing == pytest.approx(1 / PRODUCT_SHARE + LAUNCH_SECONDS)
    assert engine_seconds((Kernel("a", "b", 0, 3e9),) * 2, gpu) == pytest.approx(2 * moving)


def speedup(gpu: str, case: dict[str, Any], batch: int = 32) -> float:
    geometry, card = Geometry.of_card(cards.find("clip-vit-base-p16")), find_gpu(gpu)
    plain = engine_seconds(kernels(geometry, {}, batch), card)
    return plain / engine_seconds(kernels(geometry, case, batch), card)


def test_int8_is_not_twice_as_fast() -> None:
    int8, attention = every_linear(12, "int8"), every_linear(12, "int8", attention=True)
    assert 1.20 < speedup("H100-SXM", int8) < 1.30
    assert 1.30 < speedup("H100-SXM", attention) < 1.45
    # 0.15 POPS of INT8, 4.5 PFLOPS of FP8.
    assert speedup("B300", int8) < 0.2
    assert speedup("B300", every_linear(12, "fp8")) > 1.1


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("outputs", [False, True])
def test_a_mix_of_formats_is_hardly_faster_than_one_format(batch: int, outputs: bool) -> None:
    geometry = Geometry.of_card(cards.find("clip-vit-base-p16"))
    order = [name for block in range(geometry.depth) for name in block_products(geometry, block)]
    kinds = [name.removeprefix("blocks.0.") for name in block_products(geometry, 0)]
    choices: tuple[Format, ...] = ("fp16", "int8", "fp8")
    made = {}
    for forms in product(choices, repeat=len(kinds)):
        of_kind = dict(zip(kinds, forms, strict=True))
        mixed = {name: of_kind[name.split(".", 2)[2]] for name in order}
        eight = {name: form for name, form in mixed.items() if form != "fp16"}
        sums = {
            f"{n}.output": form for n, form in eight.items() if outputs and linear_outputs((n,))
        }
        made[forms] = kernels(geometry, eight | sums, batch)
    for gpu in all_gpus():
        times = {forms: engine_seconds(each, gpu) for forms, each in made.items()}
        single = min(time for forms, time in times.items() if len({*forms} - {"fp16"}) < 2)
        # docs/int8.md has the number.
        assert (single - min(times.values())) / times[("fp16",) * len(kinds)] < 0.005, gpu.name


def test_a_format_that_the_gpu_does_not_have() -> None:
    with pytest.raises(UsageError, match="T4 has no FP8 products"):
        check_formats(find_gpu("T4"), every_linear(1, "fp8"))
    assert speedup("T4", every_linear(12, "fp8")) == 0
    for gpu in all_gpus():
        check_formats(gpu, every_linear(1, "int8"))


def test_the_geometry_of_a_graph(demo_workspace: Workspace) -> None:
    _, passport = demo_workspace.source(cards.DEMO)
    demo = Geometry.of_card(cards.find(cards.DEMO))
    assert geometry_of(passport) == demo
    assert geometry_of(passport, 2).depth == 2
    assert demo.tokens == 65
