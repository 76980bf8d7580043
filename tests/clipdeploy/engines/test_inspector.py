"""Tests the inspector with real logs of TensorRT-RTX and with JSON in recorded layouts.

The JSON is not recorded from a GPU.  Its keys and spellings are those of TensorRT 10's and 11's
documentation and of layer listings that people published; its layers are made up here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clipdeploy.core.errors import EngineError
from clipdeploy.engines.inspector import (
    EngineTensor,
    executed_precision,
    parse_build_log,
    parse_engine_information,
)
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace
from exporters.blocks import BlockPrecision
from exporters.products import requested_precision

Layer = dict[str, Any]
Record = Callable[[Path], str]

# Runs in a separate process, because TensorRT keeps the first logger of a process.
_RECORDER = """
import sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, text):
        print(text)

builder = trt.Builder(log := Log())
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
parser.parse(open(sys.argv[1], "rb").read())
config = builder.create_builder_config()
config.profiling_verbosity = getattr(trt.ProfilingVerbosity, sys.argv[2])
profile = builder.create_optimization_profile()
image = network.get_input(0)
profile.set_shape(image.name, *[[int(n), *list(image.shape)[1:]] for n in sys.argv[3:]])
config.add_optimization_profile(profile)
sys.exit(builder.build_serialized_network(network, config) is None)
"""


def _build(graph: Path, verbosity: str = "DETAILED", batches: tuple[int, ...] = (1, 8, 32)) -> str:
    """The complete log of a build of ``graph`` by TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    done = subprocess.run(
        [sys.executable, "-c", _RECORDER, str(graph), verbosity, *map(str, batches)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
    return done.stdout


def _scales_along_the_input(source: Path, name: str, target: Path) -> Path:
    """Give the weight of Linear ``name`` scales per input channel, which has no INT8 kernel."""
    model = onnx.load(source)
    weights = {weight.name: weight for weight in model.graph.initializer}
    (dq,) = [node for node in model.graph.node if node.name == f"{name}/weight_DQ"]
    del dq.attribute[:]
    dq.attribute.append(onnx.helper.make_attribute("axis", 0))
    channels = weights[dq.input[0]].dims[0]
    scale = numpy_helper.to_array(weights[dq.input[1]])
    flat = np.full(channels, scale.mean(), scale.dtype)
    weights[dq.input[1]].CopyFrom(numpy_helper.from_array(flat, dq.input[1]))
    onnx.save(model, target)
    return target


# Real builds of TensorRT-RTX.


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("batches", [(1, 8, 32), (1, 1, 1)])
def test_tensorrt_rtx_compiles_the_precisions_of_the_graph(
    demo_workspace: Workspace, precision: str, batches: tuple[int, ...]
) -> None:
    graph = demo_workspace.graph(cards.DEMO, precision)
    engine = parse_build_log(_build(graph, batches=batches))
    executed = executed_precision(engine)
    assert executed.blocks == requested_precision(onnx.load(graph))
    assert executed, executed.unknown
    assert [tensor.name for tensor in engine.io] == ["image", "logits"]


def test_a_linear_that_silently_left_int8_is_found(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    source = demo_workspace.graph(cards.DEMO, "int8")
    graph = _scales_along_the_input(source, "blocks.3.mlp.fc1", tmp_path / "axis.onnx")
    asked = {b.block: b for b in requested_precision(onnx.load(graph))}
    executed = executed_precision(parse_build_log(_build(graph)))
    differing = [block for block in executed.blocks if block != asked[block.block]]
    assert asked["blocks.3"].gemms == {"int8": 4}
    assert differing == [BlockPrecision("blocks.3", {"int8": 3, "fp16": 1}, {"fp16": 2})]
    assert executed, executed.unknown


def test_a_build_without_detailed_verbosity_is_refused(demo_workspace: Workspace) -> None:
    log = _build(demo_workspace.graph(cards.DEMO, "int8"), "LAYER_NAMES_ONLY")
    with pytest.raises(EngineError, match="build log lists no layers") as raised:
        parse_build_log(log)
    assert "DETAILED" in raised.value.hint


# JSON in the recorded layouts of TensorRT 10 and 11.


def _onnx(*names: str) -> str:
    return "\x1f".join(f"[ONNX Layer: {name}]" for name in names)


def _tensor10(dtype: str, *shape: int) -> Layer:
    return {"Name": "__mye123", "Dimensions": list(shape), "Format/Datatype": dtype}


def _tensor11(dtype: str, *shape: int) -> Layer:
    return {
        "Name": "__mye123_myl0",
        "Dimensions": list(shape),
        "Strides": [1] * len(shape),
        "StrideOrder": list(range(len(shape))),
        "Datatype": dtype,
        "Format": "(Linear) Row major linear format",
    }


def _layer(kind: str, nodes: str, inputs: list[Layer], tactic: str = "", **more: Any) -> Layer:
    layer = {"Name": f"{kind}_myl0_7", "LayerType": kind, "Inputs": inputs, "Outputs": []}
    return {**layer, "TacticName": tactic, "StreamId": 0, "Metadata": nodes, **more}


_INT8 = "sm80_xmma_gemm_i8f16_i8i32_f32_tn_n_tilesize128x128x64_stage3_warpsize2x2x1_tensor16x8x32"
_FP16 = "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize128x128x32_stage4_warpsize2x2x1"
_TF32 = "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x64_stage4_warpsize2x2x1"
_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def _block10(index: int, dtype: str, tactic: str) -> list[Layer]:
    """A block as TensorRT 10 lists it: each GEMM, then a kernel for its scale and bias."""
    layers = []
    for linear in _LINEARS:
        name = f"blocks.{index}.{linear}"
        gemm = _layer("gemm", _onnx(f"{name}/MatMul"), [_tensor10(dtype, 197, 768)], tactic)
        after = _layer(
            "kgen", _onnx(f"{name}/MatMul", f"{name}/Add"), [_tensor10("Half", 197, 768)]
        )
        layers += [gemm, after]
    products = _onnx(*(f"blocks.{index}.attn/{n}" for n in ("MatMul_1", "Softmax", "MatMul")))
    heads = [_tensor10("Half", 12, 197, 64)] * 3
    attention = _layer("kgen", products, heads, "_gemm_mha_v2_0x957a", Name="_gemm_mha_v2_myl0_4")
    return [*layers[:2], attention, *layers[2:]]


def _tensorrt10(*layers: Layer) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["image", "logits"]})


def _tensorrt11(*layers: Layer) -> str:
    logits = {"Name": "logits", "IOMode": "Output", "DataType": "Float", "Dimensions": [-1, 1000]}
    return json.dumps(
        {
            "Layers": [{"Constants": [], **layer} for layer in layers],
            "I/O Tensors": [{**logits, "Location": "Device", "IsShapeInferenceIO": False}],
            "Engine Metadata": {"Multi-Device": "Disabled"},
        }
    )


def _gemm11(inputs: list[Layer], constants: list[Layer], name: str = "", **more: Any) -> Layer:
    node = _onnx("blocks.0.mlp.fc1/MatMul")
    return _layer("gemm", node, inputs, "__myelin_CASK_STUB", Constants=constants, **more)


def _gemms(text: str) -> dict[str, int]:
    (block,) = executed_precision(parse_engine_information(text)).blocks
    return block.gemms


def test_an_int8_engine_of_tensorrt_10() -> None:
    blocks = [_block10(i, "Int8", _INT8) for i in range(2)]
    executed = executed_precision(parse_engine_information(_tensorrt10(*blocks[0], *blocks[1])))
    assert executed.blocks == (
        BlockPrecision("blocks.0", {"int8": 4}, {"fp16": 2}),
        BlockPrecision("blocks.1", {"int8": 4}, {"fp16": 2}),
    )
    assert executed


def test_a_block_that_silently_runs_fp16_is_found() -> None:
    blocks = [_block10(0, "Int8", _INT8), _block10(1, "Half", _FP16)]
    executed = executed_precision(parse_engine_information(_tensorrt10(*blocks[0], *blocks[1])))
    assert executed.blocks == (
        BlockPrecision("blocks.0", {"int8": 4}, {"fp16": 2}),
        BlockPrecision("blocks.1", {"fp16": 4}, {"fp16": 2}),
    )


def test_an_int8_product_of_tensorrt_11_reads_int8_twice() -> None:
    scales = [_tensor11("Float", 1)] * 2
    bias = _tensor11("Half", 1, 3072)
    activation, weight = _tensor11("Int8", -1, 768), _tensor11("Int8", 768, 3072)
    residual = _tensor11("Half", -1, 768)
    assert _gemms(_tensorrt11(_gemm11([activation], [weight, *scales]))) == {"int8": 1}
    assert _gemms(_tensorrt11(_gemm11([activation, residual], [weight, bias]))) == {"int8": 1}
    # An int8 weight with a half activation may be multiplied in either type.
    assert _gemms(_tensorrt11(_gemm11([residual], [weight, *scales]))) == {"unknown": 1}
    # A dequantised half weight makes a half product, whatever else the kernel reads.
    half = _tensor11("Half", 768, 3072)
    assert _gemms(_tensorrt11(_gemm11([activation], [half, *scales]))) == {"fp16": 1}


@pytest.mark.parametrize(
    ("name", "gemms"),
    [
        ("__myl_FcMulAdd_myl0_3", {"int8": 1}),
        ("__myl_FcMulAddCast_myl0_3", {"int8": 1}),
        ("__myl_CastMulCastFcAdd_myl0_3", {"fp16": 1}),
        ("__myl_CasMulCasFcAdd_myl0_3", {"fp16": 1}),
        ("__myl_MulMinMaxRounCastFcAdd_myl0_3", {"unknown": 1}),
    ],
)
def test_a_fused_kernel_that_casts_first_does_not_multiply_int8(
    name: str, gemms: dict[str, int]
) -> None:
    layer = _gemm11(
        [_tensor11("Int8", -1, 768)],
        [_tensor11("Int8", 768, 3072), _tensor11("Half", 768, 1)],
        Name=name,
        LayerType="fusion",
        Outputs=[_tensor11("Half", -1, 3072)],
    )
    assert _gemms(_tensorrt11(layer)) == gemms


def test_both_layouts_give_the_inputs_and_outputs() -> None:
    layer = _gemm11([_tensor11("Half", -1, 768)], [])
    assert parse_engine_information(_tensorrt11(layer)).io == (
        EngineTensor("logits", "fp32", (-1, 1000)),
    )
    assert parse_engine_information(_tensorrt10(layer)).io == (
        EngineTensor("image", "unknown"),
        EngineTensor("logits", "unknown"),
    )


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("Half", "fp16"),
        ("Half(64,1:8,64)", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("FP8", "fp8"),
        ("Int64", "int64"),
        ("Row major linear FP32", "fp32"),
        ("Row major Int8 format", "int8"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Channel major INT8 format where channel % 16 == 0", "int8"),
        ("Two wide channel vectorized row major FP16 format", "fp16"),
        ("N/A due to dynamic shapes", "unknown"),
        ("Unknown format", "unknown"),
    ],
)
def test_the_spellings_of_a_type(text: str, dtype: str) -> None:
    layer = _layer("Reformat", "", [_tensor10(text, 8)])
    engine = parse_engine_information(_tensorrt10(layer))
    assert engine.layers[0].inputs == (EngineTensor("__mye123", dtype, (8,)),)


@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        (_INT8, "int8"),
        (_FP16, "fp16"),
        (_TF32, "tf32"),
        ("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize64x64x64_stage4", "int8"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_nt_n_tilesize128x128x32", "fp16"),
        ("sm80_xmma_sparse_gemm_f32f32_f32f32_f32_nn_n_tilesize32x32x8", "fp32"),
        ("sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x64x64", "fp8"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x32", "bf16"),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs", "int8"),
        ("__myelin_CASK_STUB", "unknown"),
    ],
)
def test_a_tactic_gives_the_precision_that_dynamic_shapes_hide(tactic: str, precision: str) -> None:
    hidden = [_tensor10("N/A due to dynamic shapes", -1, 768)]
    layer = _layer("CaskGemmMatrixMultiply", _onnx("blocks.0.mlp.fc1/MatMul"), hidden, tactic)
    assert _gemms(_tensorrt10(layer)) == {precision: 1}


def test_tf32_shows_in_the_tactic_of_an_fp32_product() -> None:
    layer = _block10(0, "Float", _TF32)[0]
    assert _gemms(_tensorrt10(layer)) == {"tf32": 1}


def test_a_kernel_with_conflicting_inputs_and_tactic_is_unknown_and_reported() -> None:
    executed = executed_precision(
        parse_engine_information(_tensorrt10(_block10(0, "Int8", _FP16)[0]))
    )
    assert executed.blocks == (BlockPrecision("blocks.0", {"unknown": 1}),)
    (reason,) = executed.unknown
    assert "blocks.0.attn.qkv/MatMul: gemm_myl0_7 reads int8" in reason
    assert _FP16 in reason
    assert not executed


def test_a_convolution_with_int8_borders_and_float_weights_is_not_int8() -> None:
    layer = _layer(
        "CaskConvolution",
        _onnx("patch_embed/Conv"),
        [_tensor10("Thirty-two wide channel vectorized row major Int8 format", 1, 32, 224, 224)],
    )
    assert _gemms(_tensorrt10({**layer, "Weights": {"Type": "Int8", "Count": 9}})) == {"int8": 1}
    assert _gemms(_tensorrt10({**layer, "Weights": {"Type": "Float", "Count": 9}})) == {"fp32": 1}


def test_scales_and_indices_do_not_count_as_operands() -> None:
    inputs = [
        _tensor10("Int8", 1, 197, 768),
        _tensor10("Float", 1),
        _tensor10("Float"),
        _tensor10("Int64", 4),
    ]
    layer = _layer("gemm", _onnx("blocks.0.mlp.fc1/MatMul"), inputs)
    assert _gemms(_tensorrt10(layer)) == {"int8": 1}
    # A residual is not a scale, so either input may be the operand.
    layer["Inputs"].append(_tensor10("Half", 1, 197, 768))
    assert _gemms(_tensorrt10(layer)) == {"unknown": 1}


def test_every_product_in_a_kernel_counts() -> None:
    names = ("encoder/q/MatMul", "encoder/q/Add", "encoder/k/MatMul", "encoder/v/MatMul_2")
    layer = _layer("gemm", _onnx(*names), [_tensor10("Half", 197, 768)], _FP16)
    executed = executed_precision(parse_engine_information(_tensorrt10(layer)))
    assert executed.blocks == (BlockPrecision("encoder", {"fp16": 3}),)


def test_a_product_of_several_profiles_counts_once_if_they_agree() -> None:
    first = _block10(0, "Int8", _INT8)[0]
    second = {**first, "Name": "gemm [profile 1]_myl1_7"}
    assert _gemms(_tensorrt10(first, second)) == {"int8": 1}
    second |= {"Inputs": [_tensor10("Half", 197, 768)], "TacticName": _FP16}
    assert _gemms(_tensorrt10(first, second)) == {"unknown": 1}


def test_reformats_are_counted_and_are_no_products() -> None:
    node = _onnx("patch_embed/Conv")
    conv = _layer("CaskConvolution", node, [_tensor10("Half", 1, 3, 8, 8)])
    copies = [_layer("Reformat", "", [_tensor10("Float", 1, 3, 8, 8)])] * 2
    executed = executed_precision(parse_engine_information(_tensorrt10(*copies, conv)))
    assert executed.reformats == 2
    assert executed.blocks == (BlockPrecision("patch_embed", {"fp16": 1}),)


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", "\\u001e", ""])
def test_metadata_may_be_separated_by_raw_or_escaped_control_characters(separator: str) -> None:
    nodes = f"[ONNX Layer: head/Gemm]{separator}[ONNX Layer: logits/Cast]"
    text = f'{{"Layers": [{{"Name": "x", "LayerType": "gemm", "Metadata": "{nodes}"}}]}}'
    (layer,) = parse_engine_information(text).layers
    assert layer.onnx_nodes == ("head/Gemm", "logits/Cast")


def test_without_metadata_the_name_of_the_layer_gives_the_block() -> None:
    name = "blocks_3_attn_proj/MatMul+blocks_3_mlp_fc1/MatMul_myl0_16"
    layer = _layer("gemm", "", [_tensor10("Half", 197, 768)], Name=name)
    executed = executed_precision(parse_engine_information(_tensorrt10(layer)))
    assert executed.blocks == (BlockPrecision("blocks.3", {"fp16": 2}),)


# Missing facts are reported, never guessed.


def test_a_layer_with_missing_fields_is_unknown_and_reported() -> None:
    gemm = {"LayerType": "gemm", "Metadata": _onnx("blocks.0.mlp.fc1/MatMul")}
    executed = executed_precision(parse_engine_information(_tensorrt10(gemm, {})))
    assert executed.blocks == (BlockPrecision("blocks.0", {"unknown": 1}),)
    assert executed.unknown == (
        "an unnamed layer: its operations are not listed",
        "blocks.0.mlp.fc1/MatMul: an unnamed layer reads no listed tensor",
    )


@pytest.mark.parametrize("broken", [None, 7, "x", [7], {"Name": 3}])
def test_a_field_of_the_wrong_type_is_unknown(broken: object) -> None:
    layer = {"Name": "g", "LayerType": "gemm", "Metadata": _onnx("head/Gemm"), "Inputs": broken}
    tensor = {"Name": "t", "Dimensions": broken, "Datatype": broken}
    for raw in (layer, {**layer, "Inputs": [tensor]}, {**layer, "Weights": broken}):
        assert _gemms(_tensorrt10(raw)) == {"unknown": 1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("{ForeignNode[blocks.0.norm1/Cast...head/Gemm]}", "Myelin"), ("whole", "ForeignNode")],
)
def test_an_opaque_layer_is_reported_and_its_products_are_unknown(name: str, kind: str) -> None:
    image = [_tensor10("Int8", 1, 3, 224, 224)]
    opaque = _layer(kind, "", image, Name=name)
    conv = _layer("CaskConvolution", _onnx("patch_embed/Conv"), image, Weights={"Type": "Int8"})
    executed = executed_precision(parse_engine_information(_tensorrt10(conv, opaque)))
    assert executed.unknown == (f"{name}: its operations are not listed",)
    opaque["Metadata"] = _onnx("blocks.0.mlp.fc1/MatMul")
    executed = executed_precision(parse_engine_information(_tensorrt10(opaque)))
    assert executed.blocks == (BlockPrecision("blocks.0", {"unknown": 1}),)


def test_a_product_that_only_other_kernels_name_is_unknown() -> None:
    layer = _layer("kgen", _onnx("head/Gemm", "head/Add"), [_tensor10("Half", 1, 768)])
    executed = executed_precision(parse_engine_information(_tensorrt10(layer)))
    assert executed.blocks == (BlockPrecision("head", {"unknown": 1}),)
    assert executed.unknown == ("head/Gemm: no matrix multiplication kernel names it",)


def test_a_kernel_without_a_product_name_counts_and_is_reported() -> None:
    layer = _layer("gemm", _onnx("blocks.0/strange"), [_tensor10("Half", 1, 768)])
    executed = executed_precision(parse_engine_information(_tensorrt10(layer)))
    assert executed.blocks == (BlockPrecision("graph", {"fp16": 1}),)
    assert executed.unknown == ("gemm_myl0_7: its ONNX node is not named",)


def test_an_engine_without_products_is_incomplete() -> None:
    layer = _layer("Reformat", "", [])
    executed = executed_precision(parse_engine_information(_tensorrt10(layer)))
    assert executed.unknown == ("the engine names no matrix product",)
    assert not executed


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "not JSON", "JSON"),
        ("Layer(Myelin): {ForeignNode[...]}", "not JSON: it starts with 'Layer", "JSON"),
        ('{"Layers": [{"Name": "a"', "not JSON", "JSON"),
        ("[]", 'no list of "Layers"', "get_engine_information"),
        ('{"Name": "blocks.0"}', 'no list of "Layers"', "get_engine_information"),
        ('{"Layers": {}}', 'no list of "Layers"', "get_engine_information"),
        ('{"Layers": []}', "lists no layers", "DETAILED"),
        ('{"Layers": ["a", "b"], "Bindings": ["x"]}', "names of 2 of its 2 layers", "DETAILED"),
        ('{"Layers": [{"Name": "a"}, "b"]}', "names of 1 of its 2 layers", "DETAILED"),
    ],
)
def test_text_without_detailed_layer_information_is_refused(
    text: str, message: str, hint: str
) -> None:
    with pytest.raises(EngineError, match=message) as raised:
        parse_engine_information(text)
    assert hint in raised.value.hint
    assert "\n" not in str(raised.value)


# The builder's log in the recorded layout of TensorRT 10.

_LOG10 = (
    "[V] [TRT] Layers:\n"
    "Name: Reformatting CopyNode for Input Tensor 0 to patch_embed/Conv, LayerType: Reformat, "
    "Inputs: [ { Name: image, Location: Device, Dimensions: [1,3,224,224], Format/Datatype: "
    "Row major linear FP32 }], Outputs: [ { Name: Reformatted Input Tensor 0 to patch_embed/Conv, "
    "Location: Device, Dimensions: [1,3,224,224], Format/Datatype: Row major Int8 format }], "
    "ParameterType: Reformat, Origin: REFORMAT, TacticValue: 0x00, StreamId: 0, Metadata: \n"
    "Name: patch_embed/Conv, LayerType: CaskConvolution, Inputs: [ { Name: x, Location: Device, "
    "Dimensions: [1,3,224,224], Format/Datatype: Row major Int8 format }], Outputs: [ { Name: y, "
    "Location: Device, Dimensions: [1,768,14,14], Format/Datatype: Row major linear FP16 format "
    "}], ParameterType: Convolution, Kernel: [16,16], Weights: {Type: Int8, Count: 589824}, "
    "TacticName: sm80_xmma_fprop_implicit_gemm_i8f16_i8i32_f32_nhwckrsc, StreamId: 0, "
    "Metadata: [ONNX Layer: patch_embed/Conv]\x1e[ONNX Layer: patch_embed/DQ]\n"
    "Name: blocks_0_mlp_fc1/MatMul_myl0_7, LayerType: gemm, Inputs: [ { Name: __mye5_13, "
    "Dimensions: [1,197,768], Format/Datatype: Half }, { Name: __mye6, Dimensions: [1], "
    "Format/Datatype: Float }], Outputs: [ { Name: z, Dimensions: [1,197,3072], Format/Datatype: "
    f"Half }}], TacticName: {_FP16}, StreamId: 0, "
    "Metadata: [ONNX Layer: blocks.0.mlp.fc1/MatMul]\x1f[ONNX Layer: blocks.0.mlp.fc1/Add]\n"
    "\nBindings:\nimage\nlogits\n"
)


def test_the_log_of_tensorrt_10_is_read_too() -> None:
    engine = parse_build_log(_LOG10)
    executed = executed_precision(engine)
    assert [layer.kind for layer in engine.layers] == ["Reformat", "CaskConvolution", "gemm"]
    assert engine.layers[1].weights == "int8"
    assert engine.layers[1].onnx_nodes == ("patch_embed/Conv", "patch_embed/DQ")
    assert engine.layers[2].tactic == _FP16
    assert [t.shape for t in engine.layers[2].inputs] == [(1, 197, 768), (1,)]
    assert executed.blocks == (
        BlockPrecision("patch_embed", {"int8": 1}),
        BlockPrecision("blocks.0", {"fp16": 1}),
    )
    assert executed.reformats == 1


def test_of_two_builds_in_one_log_the_last_counts() -> None:
    other = _LOG10.replace("blocks.0", "blocks.9")
    assert parse_build_log(other + _LOG10) == parse_build_log(_LOG10)


@pytest.mark.parametrize("text", ["", "[I] Engine generation completed.", "Layers:\n", "{}"])
def test_a_log_without_layers_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="lists no layers"):
        parse_build_log(text)
