"""Finds the precision of every matrix product in a TensorRT engine, per block.

TensorRT describes an engine in two forms, and this module reads both:

- JSON from a loaded engine: ``IEngineInspector.get_engine_information``.  Up to TensorRT 10 a
  tensor has one "Format/Datatype" and the engine "Bindings"; from 11 on they are "Format",
  "Datatype" and "I/O Tensors", and a layer lists its weights under "Constants" (TensorRT
  documentation, "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x").
- lines in the builder's log at VERBOSE severity, also on a machine without a GPU.

Both need an engine that was built with ``ProfilingVerbosity.DETAILED``.  The "Metadata" of a layer
names the ONNX nodes that were compiled into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipdeploy.core.errors import EngineError
from exporters.blocks import UNKNOWN, BlockPrecision, Product, block_of, by_block

__all__ = [
    "EngineLayer",
    "EngineLayers",
    "EngineTensor",
    "ExecutedPrecision",
    "differences",
    "executed_precision",
    "parse_build_log",
    "parse_engine_information",
]

# Words in "Datatype" and "Format/Datatype": "Half", "Thirty-two wide ... row major Int8 format".
_DTYPES = {
    **dict.fromkeys(("float", "fp32", "float32"), "fp32"),
    **dict.fromkeys(("half", "fp16", "float16"), "fp16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
    **{name: name for name in ("int8", "fp8", "fp4", "int4", "uint8", "int32", "int64", "bool")},
}
_INDICES = {"int32", "int64", "bool"}
# Types that a kernel may unpack to floating point before it multiplies.
_PACKED = {"int8", "uint8", "int4", "fp8", "fp4"}

# The types of the two operands in the name of an NVIDIA kernel: i8f16_i8i32_f32 multiplies i8 by
# i8, f32f32_tf32f32_f32 rounds float32 to TF32 first.
_TYPE = "i8|f16|bf16|f32|tf32|e4m3|e5m2"
_TACTIC = re.compile(rf"_({_TYPE})(?:i32|{_TYPE})_({_TYPE})(?:i32|{_TYPE})_(?:i32|{_TYPE})(?:_|$)")
_MATH = {"i8": "int8", "f16": "fp16", "f32": "fp32", "e4m3": "fp8", "e5m2": "fp8"}

# Matrix multiplication kernels by type, name or tactic.  Element-wise kernels that apply the scale
# or the bias name the same ONNX nodes.
_PRODUCT_KIND = re.compile(r"gemm|conv(?!er)|correlation|matrixmultiply", re.IGNORECASE)
_PRODUCT_NAME = re.compile(r"xmma_(?:sparse_)?(?:gemm|fprop)|^__myl_\w*Fc(?![a-z])")
_ATTENTION_KERNEL = re.compile(r"^_\w*mha|fmha_")
# The name of a fused kernel lists its steps: FcAdd multiplies its operands directly, CastMulCastFc
# (CasMulCasFc in some releases) dequantises them first.  TensorRT does that without a message if it
# has no integer kernel for the Q/DQ, such as for weight scales along the input channels.
_CASTS_FIRST = re.compile(r"^__myl_\w*Cas\w*(?:Fc|MulSum)(?![a-z])")
_GEMV_NAME = re.compile(r"^__myl_\w*MulSum(?![a-z])")
# Several kernels can name one product: a fused attention kernel also names the qkv Linear that
# supplies its scale and bias, and one kernel can hold a second product, with a vector.  The kernel
# of the lowest rank computes the product.
_GEMM, _ATTENTION, _GEMV, _NO_PRODUCT = range(4)

_OPAQUE = re.compile(r"^\{?ForeignNode|^Myelin$")

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_ONNX_PRODUCT = re.compile(
    r"(?:^|[/._])(?:matmul|gemm|conv|conv2d|einsum|linear)(?:_\d+)?$", re.IGNORECASE
)
_ATTENTION_NODE = re.compile(r"^blocks[._]\d+[._]attn/MatMul")
_KERNEL_SUFFIX = re.compile(r"(?:_U\d+)?(?:_myl\d+_\d+)?(?: \[profile \d+\])?$")

_LINE = re.compile(
    r"^Name: (?P<Name>.*), LayerType: (?P<LayerType>[^,]*)"
    r", Inputs: \[(?P<Inputs>.*?)\](?:, Constants: \[(?P<Constants>.*?)\])?"
    r", Outputs: \[(?P<Outputs>| \{.*?\})\](?=, [A-Z]|$)(?P<rest>.*)$",
    re.MULTILINE,
)
_LINE_HEADER = re.compile(r"\bLayers:\s*$", re.MULTILINE)
_LINE_TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<Dimensions>[-\d,]*)\]"
    r".*?\b(?:Format/)?Datatype: (?P<Datatype>[^,}]*)"
)
_LINE_REST = re.compile(r", (TacticName|Metadata): (.*?)(?=, [A-Z]\w+: |$)")
_LINE_WEIGHTS = re.compile(r", Weights: \{Type: (\w+)")
_LINE_IO = re.compile(r"^ *Name: (?P<Name>.*), IOMode: \w+, DataType: (?P<DataType>\w+)", re.M)

_DETAILED = "build the engine with ProfilingVerbosity.DETAILED"


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of an engine; ``shape`` is None if it is not listed, and -1 is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class EngineLayer:
    """One kernel, or one opaque layer (ForeignNode, Myelin).

    ``onnx_nodes`` come from "Metadata", or else from the layer's name.  ``constants`` are the
    weights, biases and scales that the layer reads, if TensorRT lists them; ``weights`` is the type
    of a convolution's weights, if TensorRT gives only that.
    """

    name: str
    kind: str
    inputs: tuple[EngineTensor, ...] = ()
    constants: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    onnx_nodes: tuple[str, ...] = ()
    tactic: str = ""
    weights: str = UNKNOWN


@dataclass(frozen=True)
class EngineLayers:
    """The layers of an engine in execution order, and the engine's inputs and outputs."""

    layers: tuple[EngineLayer, ...]
    io: tuple[EngineTensor, ...] = ()


@dataclass(frozen=True)
class ExecutedPrecision:
    """The precision that an engine computes in; true if TensorRT describes all of it.

    Compare ``blocks`` with :func:`exporters.products.requested_precision`.  ``reformats`` counts
    the layers that only change a tensor's layout or type.  ``unknown`` lists what the description
    leaves out, in one sentence each.
    """

    blocks: tuple[BlockPrecision, ...]
    reformats: int
    unknown: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.unknown


def _dtype(text: object) -> str:
    words = re.findall(r"\w+", text.lower()) if isinstance(text, str) else []
    return next((_DTYPES[word] for word in words if word in _DTYPES), UNKNOWN)


def _text(raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    return value if isinstance(value, str) else ""


def _tensor(raw: object) -> EngineTensor:
    if not isinstance(raw, dict):
        return EngineTensor(str(raw), UNKNOWN)
    axes = raw.get("Dimensions")
    listed = isinstance(axes, list) and all(isinstance(axis, int) for axis in axes)
    dtype = raw.get("Datatype", raw.get("DataType", raw.get("Format/Datatype")))
    return EngineTensor(_text(raw, "Name"), _dtype(dtype), tuple(axes or ()) if listed else None)


def _tensors(raw: dict[str, Any], key: str) -> tuple[EngineTensor, ...]:
    value = raw.get(key)
    return tuple(_tensor(entry) for entry in value) if isinstance(value, list) else ()


def _layer(raw: dict[str, Any]) -> EngineLayer:
    name = _text(raw, "Name")
    nodes = _ONNX_NODE.findall(_text(raw, "Metadata"))
    if not nodes:
        nodes = [_KERNEL_SUFFIX.sub("", part.strip()) for part in re.split(r" ?\+ ?", name)]
    weights = raw.get("Weights")
    return EngineLayer(
        name,
        _text(raw, "LayerType"),
        _tensors(raw, "Inputs"),
        _tensors(raw, "Constants"),
        _tensors(raw, "Outputs"),
        tuple(dict.fromkeys(filter(None, nodes))),
        _text(raw, "TacticName"),
        _dtype(weights.get("Type")) if isinstance(weights, dict) else UNKNOWN,
    )


def _engine(raw: dict[str, Any]) -> EngineLayers:
    io = _tensors(raw, "I/O Tensors") or _tensors(raw, "Bindings")
    return EngineLayers(tuple(_layer(layer) for layer in raw["Layers"]), io)


def parse_engine_information(text: str) -> EngineLayers:
    """Read the JSON of ``inspector.get_engine_information(LayerInformationFormat.JSON)``.

    A field that a layer lacks is unknown; :func:`executed_precision` reports what is missing.

    Raises:
        EngineError: the text has another format, or the engine was built without detailed
            profiling verbosity.
    """
    try:
        # TensorRT separates the names in "Metadata" with control characters, escaped or not.
        raw = json.loads(text, strict=False)
    except ValueError as error:
        raise EngineError(
            f"the engine's layer information is not JSON: it starts with {text[:40]!r}",
            hint="ask the inspector for LayerInformationFormat.JSON",
        ) from error
    layers = raw.get("Layers") if isinstance(raw, dict) else None
    if not isinstance(layers, list):
        raise EngineError(
            'the engine\'s layer information has no list of "Layers"',
            hint="pass the output of get_engine_information, not a profile or a single layer",
        )
    if not layers:
        raise EngineError("the engine lists no layers", hint=_DETAILED)
    if named_only := [layer for layer in layers if not isinstance(layer, dict)]:
        raise EngineError(
            f"the engine lists only the names of {len(named_only)} of its {len(layers)} layers, "
            "not their precision",
            hint=_DETAILED,
        )
    return _engine(raw)


def _line_tensors(text: str | None) -> list[dict[str, Any]]:
    return [
        {**match.groupdict(), "Dimensions": [int(axis) for axis in match[2].split(",") if axis]}
        for match in _LINE_TENSOR.finditer(text or "")
    ]


def _line_layer(match: re.Match[str]) -> dict[str, Any]:
    raw: dict[str, Any] = {key: match[key] for key in ("Name", "LayerType")}
    raw |= {key: _line_tensors(match[key]) for key in ("Inputs", "Constants", "Outputs")}
    raw |= dict(_LINE_REST.findall(match["rest"]))
    if weights := _LINE_WEIGHTS.search(match["rest"]):
        raw["Weights"] = {"Type": weights[1]}
    return raw


def parse_build_log(text: str) -> EngineLayers:
    """Read the layers that the builder lists at the end of its log, at VERBOSE severity.

    If the log holds several builds, the last one is read.

    TensorRT-RTX lists the layers and types that it compiled ahead of time.  It generates kernels
    when the engine first runs, so their tactics are not in the log.

    Raises:
        EngineError: the log lists no layers.
    """
    last = _LINE_HEADER.split(text)[-1]
    layers = [_line_layer(match) for match in _LINE.finditer(last)]
    if not layers:
        raise EngineError(
            "the build log lists no layers",
            hint=f"{_DETAILED} and log at verbose severity",
        )
    io = [match.groupdict() for match in _LINE_IO.finditer(last)]
    return _engine({"Layers": layers, "I/O Tensors": io})


def _tactic_precision(tactic: str) -> str:
    match = _TACTIC.search(tactic)
    if match is None:
        return UNKNOWN
    left, right = match.groups()
    if {left, right} <= {"f32", "tf32"}:
        return "tf32" if "tf32" in (left, right) else "fp32"
    return _MATH.get(left, left) if left == right else UNKNOWN


def _casting_precision(layer: EngineLayer) -> str:
    """The product's type in a kernel that unpacks its operands first, if only one is possible."""
    tensors = (*layer.inputs, *layer.constants, *layer.outputs)
    floats = {tensor.dtype for tensor in tensors} - _PACKED - _INDICES
    # A kernel that rounds may quantise its operands rather than unpack them.
    return floats.pop() if len(floats) == 1 and "Rou" not in layer.name else UNKNOWN


def _operand_precision(layer: EngineLayer) -> str:
    """The type of the operands that a product kernel multiplies, without scales and biases."""
    read = [tensor for tensor in layer.inputs if tensor.dtype not in _INDICES]
    inputs = {t.dtype for t in read if t.shape is None or any(axis != 1 for axis in t.shape)}
    # A bias or a per-channel scale has one axis, a weight at least two.
    weights = {t.dtype for t in layer.constants if sum(axis != 1 for axis in t.shape or ()) > 1}
    if layer.weights != UNKNOWN:
        weights = {layer.weights}
    if (inputs | weights) & _PACKED and _CASTS_FIRST.search(layer.name):
        return _casting_precision(layer)
    if not weights:
        return inputs.pop() if len(inputs) == 1 else UNKNOWN
    # An unpacked weight has the product's type, whatever the activation's type.  A packed weight
    # has it only if an activation has the same type.
    certain = len(weights) == 1 and (not weights & _PACKED or weights <= inputs)
    return weights.pop() if certain else UNKNOWN


def _kernel_precision(layer: EngineLayer) -> str:
    found = {_operand_precision(layer), _tactic_precision(layer.tactic)} - {UNKNOWN}
    if found == {"fp32", "tf32"}:
        return "tf32"
    return found.pop() if len(found) == 1 else UNKNOWN


def _rank(layer: EngineLayer) -> int:
    """Rank a kernel that names a product: the lowest computes it, _NO_PRODUCT never does."""
    texts = (layer.name, layer.tactic)
    if any(_ATTENTION_KERNEL.search(text) for text in texts):
        return _ATTENTION
    if _PRODUCT_KIND.search(layer.kind) or any(_PRODUCT_NAME.search(text) for text in texts):
        return _GEMM
    return _GEMV if any(_GEMV_NAME.search(text) for text in texts) else _NO_PRODUCT


def _why_unknown(kernels: Sequence[EngineLayer]) -> str:
    if not kernels:
        return "no matrix multiplication kernel names it"
    parts = []
    for kernel in kernels:
        read = ", ".join(dict.fromkeys(t.dtype for t in (*kernel.inputs, *kernel.constants)))
        tactic = f" with tactic {kernel.tactic}" if kernel.tactic else ""
        name = kernel.name or "an unnamed layer"
        parts.append(f"{name} reads {read or 'no listed tensor'}{tactic}")
    return "; ".join(parts)


def _mentions(layers: Sequence[EngineLayer]) -> tuple[dict[str, list[EngineLayer]], list[str]]:
    """Map each product to the layers that name it, in order, and list what they leave out."""
    found: dict[str, list[EngineLayer]] = {}
    missing = []
    for layer in layers:
        title = layer.name or "an unnamed layer"
        names = [node for node in layer.onnx_nodes if _ONNX_PRODUCT.search(node)]
        if _OPAQUE.search(layer.kind) or _OPAQUE.search(layer.name) or not layer.kind:
            missing.append(f"{title}: its operations are not listed")
        elif not names and _rank(layer) <= _ATTENTION:
            names = [layer.name]
            missing.append(f"{title}: its ONNX node is not named")
        for name in names:
            found.setdefault(name, []).append(layer)
    return found, missing


def executed_precision(engine: EngineLayers) -> ExecutedPrecision:
    """Find the precision of every matrix product that the engine runs, per block.

    Each ONNX node that the kernels name counts once, in however many kernels it is; one kernel may
    hold several nodes.  A kernel's precision is the type of the operands that it reads (int8 in ->
    int8), unless its name shows that it casts them first.  The name of its tactic may give the
    precision, too.  If the two differ, or neither is known, the precision is ``unknown``.  Of a
    fused attention kernel only the inputs are known, not the types between its two products.
    ``tf32`` appears only in tactics: fp32 without a tactic may be TF32.

    Attention products are recognised by clipdeploy's node names and by fused attention kernels.  In
    a graph with other names, attention that was not fused counts among the GEMMs.
    """
    layers = [layer for layer in engine.layers if layer.kind != "Reformat"]
    mentions, missing = _mentions(layers)
    products = []
    for name, mentioning in mentions.items():
        rank = min(map(_rank, mentioning))
        kernels = [layer for layer in mentioning if _rank(layer) == rank < _NO_PRODUCT]
        kinds = {_kernel_precision(kernel) for kernel in kernels}
        precision = kinds.pop() if len(kinds) == 1 else UNKNOWN
        if precision == UNKNOWN:
            missing.append(f"{name}: {_why_unknown(kernels)}")
        attention = rank == _ATTENTION or bool(_ATTENTION_NODE.match(name))
        products.append(Product(name, block_of(name), attention, precision))
    if not products:
        missing.append("the engine names no matrix product")
    reformats = len(engine.layers) - len(layers)
    return ExecutedPrecision(by_block(products), reformats, tuple(missing))


def differences(asked: Sequence[BlockPrecision], executed: ExecutedPrecision) -> tuple[str, ...]:
    """List the blocks whose products do not run in the requested precision, a sentence each."""
    found = {block.block: block for block in executed.blocks}
    lines = []
    for block in asked:
        other = found.get(block.block, BlockPrecision(block.block))
        for what in ("gemms", "attention"):
            requested, got = getattr(block, what), getattr(other, what)
            if requested != got:
                lines.append(f"{block.block}: asked for {_counts(requested)}, got {_counts(got)}")
    return tuple(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"
