"""What an engine does: the precision of every matrix product that TensorRT compiled, per block.

TensorRT describes an engine in two forms, and both are read here:

- as JSON, from a loaded engine: ``IEngineInspector.get_engine_information``.  Up to TensorRT 10 a
  tensor has one "Format/Datatype" and the engine "Bindings"; from 11 on they are "Format",
  "Datatype" and "I/O Tensors", and a layer lists its weights under "Constants" (TensorRT
  documentation, "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x").
- as lines, in the log of the builder at its verbose severity, also on a machine without a GPU.

Either way the engine must have been built with ``ProfilingVerbosity.DETAILED``.  A layer names the
ONNX nodes that went into it in its "Metadata".
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

# Words of "Datatype" and "Format/Datatype": "Half", "Thirty-two wide ... row major Int8 format".
_DTYPES = {
    **dict.fromkeys(("float", "fp32", "float32"), "fp32"),
    **dict.fromkeys(("half", "fp16", "float16"), "fp16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
    **{name: name for name in ("int8", "fp8", "fp4", "int4", "uint8", "int32", "int64", "bool")},
}
_INDICES = {"int32", "int64", "bool"}
# What a kernel may read and unpack, to multiply in floating point.
_PACKED = {"int8", "uint8", "int4", "fp8", "fp4"}

# The types of a kernel's two operands, as NVIDIA's kernels are named: i8f16_i8i32_f32 multiplies
# i8 by i8, f32f32_tf32f32_f32 rounds float32 to TF32 first.
_TYPE = "i8|f16|bf16|f32|tf32|e4m3|e5m2"
_TACTIC = re.compile(rf"_({_TYPE})(?:i32|{_TYPE})_({_TYPE})(?:i32|{_TYPE})_(?:i32|{_TYPE})(?:_|$)")
_MATH = {"i8": "int8", "f16": "fp16", "f32": "fp32", "e4m3": "fp8", "e5m2": "fp8"}

# Kernels that multiply matrices, by their type, name or tactic; element-wise kernels around them
# name the same ONNX nodes, since they apply the scale or the bias.
_PRODUCT_KIND = re.compile(r"gemm|conv(?!er)|correlation|matrixmultiply", re.IGNORECASE)
_PRODUCT_NAME = re.compile(r"xmma_(?:sparse_)?(?:gemm|fprop)|^__myl_\w*Fc(?![a-z])")
_ATTENTION_KERNEL = re.compile(r"^_\w*mha|fmha_")
# A fused kernel is named by its steps: FcAdd multiplies what it reads, CastMulCastFc (CasMulCasFc
# in some releases) dequantises first.  TensorRT does that, silently, where it has no integer kernel
# for the Q/DQ, such as for weight scales along the input channels.
_CASTS_FIRST = re.compile(r"^__myl_\w*Cas\w*(?:Fc|MulSum)(?![a-z])")
_GEMV_NAME = re.compile(r"^__myl_\w*MulSum(?![a-z])")
# A fused attention kernel also names the qkv Linear whose scale and bias it applies, and a product
# with a vector may follow another product in one kernel: the plainer kernel is the product's own.
_GEMM, _ATTENTION, _GEMV, _NO_PRODUCT = range(4)

_CLOSED = re.compile(r"^\{?ForeignNode|^Myelin$")

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
    """A tensor of an engine; ``shape`` is None where it is not told, -1 an axis known at run."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class EngineLayer:
    """One kernel, or one layer that TensorRT keeps closed.

    ``onnx_nodes`` come from "Metadata", else from the layer's own name.  ``constants`` are the
    weights, biases and scales that the layer reads, where TensorRT lists them; ``weights`` is the
    type of a convolution's weights, where it gives that instead.
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
    """The layers of an engine in the order of execution, and its inputs and outputs."""

    layers: tuple[EngineLayer, ...]
    io: tuple[EngineTensor, ...] = ()


@dataclass(frozen=True)
class ExecutedPrecision:
    """What an engine runs in: compare ``blocks`` with :func:`exporters.blocks.requested_precision`.

    ``reformats`` counts layers that only change a tensor's layout or type; ``untold`` has a
    sentence for everything that the description does not tell, and is empty if it tells all.
    """

    blocks: tuple[BlockPrecision, ...]
    reformats: int
    untold: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.untold


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
    told = isinstance(axes, list) and all(isinstance(axis, int) for axis in axes)
    dtype = raw.get("Datatype", raw.get("DataType", raw.get("Format/Datatype")))
    return EngineTensor(_text(raw, "Name"), _dtype(dtype), tuple(axes or ()) if told else None)


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

    Fields that a layer lacks are unknown; :func:`executed_precision` says what that hides.

    Raises:
        EngineError: it is something else, or of an engine without detailed profiling verbosity.
    """
    try:
        # TensorRT separates the names in "Metadata" with control characters, escaped or not.
        raw = json.loads(text, strict=False)
    except ValueError as error:
        raise EngineError(
            f"the engine's layer information is no JSON: it starts with {text[:40]!r}",
            hint="ask the inspector for LayerInformationFormat.JSON",
        ) from error
    layers = raw.get("Layers") if isinstance(raw, dict) else None
    if not isinstance(layers, list):
        raise EngineError(
            'the engine\'s layer information has no list of "Layers"',
            hint="pass what get_engine_information gives, not a profile or one layer",
        )
    if not layers:
        raise EngineError("the engine tells nothing of its layers", hint=_DETAILED)
    if closed := [layer for layer in layers if not isinstance(layer, dict)]:
        raise EngineError(
            f"the engine tells only the names of {len(closed)} of its {len(layers)} layers, "
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
    """Read the layers that the builder lists in its log, at verbose severity, when it is done.

    Of several builds in one log, the last.

    TensorRT-RTX lists the layers and types that it compiled ahead of time; it makes the kernels
    for them, whose tactics are not told, when the engine is first run.

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
    """The product's type in a kernel that unpacks its operands first: the only one it could be."""
    tensors = (*layer.inputs, *layer.constants, *layer.outputs)
    floats = {tensor.dtype for tensor in tensors} - _PACKED - _INDICES
    # A kernel that rounds may quantise its operands rather than unpack them.
    return floats.pop() if len(floats) == 1 and "Rou" not in layer.name else UNKNOWN


def _operand_precision(layer: EngineLayer) -> str:
    """The type of the operands that a product kernel multiplies; scales and biases aside."""
    read = [tensor for tensor in layer.inputs if tensor.dtype not in _INDICES]
    inputs = {t.dtype for t in read if t.shape is None or any(axis != 1 for axis in t.shape)}
    # A bias or a scale per channel has one axis, a weight at least two.
    weights = {t.dtype for t in layer.constants if sum(axis != 1 for axis in t.shape or ()) > 1}
    if layer.weights != UNKNOWN:
        weights = {layer.weights}
    if (inputs | weights) & _PACKED and _CASTS_FIRST.search(layer.name):
        return _casting_precision(layer)
    if not weights:
        return inputs.pop() if len(inputs) == 1 else UNKNOWN
    # A weight that is not packed has the product's type, whatever the kernel makes its activation
    # of; a packed one says so only beside an activation of its type.
    told = len(weights) == 1 and (not weights & _PACKED or weights <= inputs)
    return weights.pop() if told else UNKNOWN


def _kernel_precision(layer: EngineLayer) -> str:
    found = {_operand_precision(layer), _tactic_precision(layer.tactic)} - {UNKNOWN}
    if found == {"fp32", "tf32"}:
        return "tf32"
    return found.pop() if len(found) == 1 else UNKNOWN


def _rank(layer: EngineLayer) -> int:
    """Which of the kernels that name a product computes it: the lowest; _NO_PRODUCT never does."""
    texts = (layer.name, layer.tactic)
    if any(_ATTENTION_KERNEL.search(text) for text in texts):
        return _ATTENTION
    if _PRODUCT_KIND.search(layer.kind) or any(_PRODUCT_NAME.search(text) for text in texts):
        return _GEMM
    return _GEMV if any(_GEMV_NAME.search(text) for text in texts) else _NO_PRODUCT


def _why_unknown(kernels: Sequence[EngineLayer]) -> str:
    if not kernels:
        return "no kernel that multiplies matrices names it"
    said = []
    for kernel in kernels:
        read = ", ".join(dict.fromkeys(t.dtype for t in (*kernel.inputs, *kernel.constants)))
        tactic = f" with tactic {kernel.tactic}" if kernel.tactic else ""
        said.append(f"{kernel.name or 'a nameless layer'} reads {read or 'nothing named'}{tactic}")
    return "; ".join(said)


def _mentions(layers: Sequence[EngineLayer]) -> tuple[dict[str, list[EngineLayer]], list[str]]:
    """The layers that name each product, in their order, and what they do not tell."""
    found: dict[str, list[EngineLayer]] = {}
    untold = []
    for layer in layers:
        title = layer.name or "a nameless layer"
        names = [node for node in layer.onnx_nodes if _ONNX_PRODUCT.search(node)]
        if _CLOSED.search(layer.kind) or _CLOSED.search(layer.name) or not layer.kind:
            untold.append(f"{title}: what it computes inside")
        elif not names and _rank(layer) <= _ATTENTION:
            names = [layer.name]
            untold.append(f"{title}: which ONNX node it computes")
        for name in names:
            found.setdefault(name, []).append(layer)
    return found, untold


def executed_precision(engine: EngineLayers) -> ExecutedPrecision:
    """The precision of every matrix product that the engine runs, per block.

    Products are counted by the ONNX nodes that the kernels name, each once, however many kernels
    it became: one kernel may hold several.  A kernel's precision is the type of the operands that
    it reads (int8 in -> int8), unless its name says that it casts them first, and the one that its
    tactic's name gives; where these disagree, or say nothing, it is ``unknown``.  For a fused
    attention kernel only what it reads is told, not what it does between its two products.
    ``tf32`` shows only in tactics: fp32 without one may be TF32.

    Which products are attention's is told by clipdeploy's names of nodes and by fused attention
    kernels; in a graph with other names, attention that was not fused counts among the GEMMs.
    """
    layers = [layer for layer in engine.layers if layer.kind != "Reformat"]
    mentions, untold = _mentions(layers)
    products = []
    for name, mentioning in mentions.items():
        rank = min(map(_rank, mentioning))
        kernels = [layer for layer in mentioning if _rank(layer) == rank < _NO_PRODUCT]
        kinds = {_kernel_precision(kernel) for kernel in kernels}
        precision = kinds.pop() if len(kinds) == 1 else UNKNOWN
        if precision == UNKNOWN:
            untold.append(f"{name}: {_why_unknown(kernels)}")
        attention = rank == _ATTENTION or bool(_ATTENTION_NODE.match(name))
        products.append(Product(name, block_of(name), attention, precision))
    if not products:
        untold.append("the engine names no matrix product")
    reformats = len(engine.layers) - len(layers)
    return ExecutedPrecision(by_block(products), reformats, tuple(untold))


def differences(asked: Sequence[BlockPrecision], executed: ExecutedPrecision) -> tuple[str, ...]:
    """A sentence for every block whose products do not run in the precision asked for."""
    found = {block.block: block for block in executed.blocks}
    lines = []
    for block in asked:
        other = found.get(block.block, BlockPrecision(block.block))
        for what in ("gemms", "attention"):
            wanted, got = getattr(block, what), getattr(other, what)
            if wanted != got:
                lines.append(f"{block.block}: asked for {_counts(wanted)}, got {_counts(got)}")
    return tuple(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"
