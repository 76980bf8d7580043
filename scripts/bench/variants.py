"""Compiles variants of an 8-bit graph with TensorRT-RTX, and counts their kernels.

    python scripts/bench/variants.py

The graph is the demo model in INT8 with weight scales in ratio form, compiled for SM 8.9 without a
GPU.  For each variant: kernels of block 3 and of the whole plan, and the type that the products of
qkv and fc1 write.  The variants

* have the rounding of proj's input at other places behind attention,
* round the output of qkv and fc1 behind the MatMul, the ratio or the bias,
* have FP8 in place of INT8 in some Linears or attention.

Scales and FP8 numbers of a variant mean nothing: it is only compiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.config import QuantizeConfig
from calibration.policy import Scope
from clipdeploy.core.passport import TensorSpec
from clipdeploy.engines.backends import tensorrt_module
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.plan_text import PlanKernel, kernels_by_block, read_programs
from clipdeploy.models import cards
from clipdeploy.pipeline import calibrate_model, export_model, quantize_model
from clipdeploy.workspace.folder import Workspace

SPEC = TensorSpec("image", "float32", ("batch", 3, 32, 32))
BLOCK = "blocks.3"
FP8 = TensorProto.FLOAT8E4M3FN
# The blocks whose attention has more than one row.
INNER = range(5)
STEP = 0.05
Edit = Callable[[ModelProto], None]


def named(model: ModelProto, name: str) -> NodeProto:
    """The node ``name``."""
    return next(node for node in model.graph.node if node.name == name)


def constant(model: ModelProto, name: str, value: np.generic) -> str:
    """Add a scalar constant and return its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def in_order(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Move ``nodes``, which are in the graph, to the place of the first, and chain them."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    kept = list(model.graph.node)
    at = min(kept.index(node) for node in nodes)
    start = kept[at].input[0]
    readers = [node for node in kept if nodes_end(nodes) in node.input and node not in nodes]
    for node in nodes:
        kept.remove(node)
    for copy in copies:
        copy.input[0], start = start, copy.output[0]
    for reader in readers:
        reader.input[list(reader.input).index(nodes_end(nodes))] = start
    del model.graph.node[:]
    model.graph.node.extend([*kept[:at], *copies, *kept[at:]])


def nodes_end(nodes: list[NodeProto]) -> str:
    """The output of the DequantizeLinear, which is the last node as clipdeploy writes them."""
    return next(node.output[0] for node in nodes if node.op_type == "DequantizeLinear")


def rounding_of_attention(*names: str) -> Edit:
    """Put the nodes between attention and proj into this order."""

    def edit(model: ModelProto) -> None:
        for block in INNER:
            in_order(model, [named(model, f"blocks.{block}.{name}") for name in names])

    return edit


def rounded_outputs(behind: str) -> Edit:
    """Round the outputs of qkv and fc1 ``behind`` MatMul, ratio or Add."""

    def edit(model: ModelProto) -> None:
        for block in INNER:
            for role in ("attn.qkv", "mlp.fc1"):
                name = f"blocks.{block}.{role}"
                round_output(model, named(model, f"{name}/{behind}"), f"{name}.output")

    return edit


def round_output(model: ModelProto, node: NodeProto, name: str) -> None:
    """Put Q/DQ behind ``node``."""
    value, end = node.output[0], f"{name}/DQ"
    scale = constant(model, f"{name}/scale", np.float16(STEP))
    zero = constant(model, f"{name}/zero", np.int8(0))
    readers = [other for other in model.graph.node if value in other.input]
    pair = [
        helper.make_node("QuantizeLinear", [value, scale, zero], [f"{name}/Q"], f"{name}/Q"),
        helper.make_node("DequantizeLinear", [f"{name}/Q", scale, zero], [end], end),
    ]
    for reader in readers:
        reader.input[list(reader.input).index(value)] = f"{name}/DQ"
    at = list(model.graph.node).index(node) + 1
    for offset, new in enumerate(pair):
        model.graph.node.insert(at + offset, new)


def in_fp8(*parts: str) -> Edit:
    """Turn the INT8 pairs whose node names contain one of ``parts`` into FP8."""

    def edit(model: ModelProto) -> None:
        kind = helper.tensor_dtype_to_np_dtype(FP8)
        read = {
            name
            for node in model.graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear")
            and any(part in node.name for part in parts)
            for name in node.input
        }
        for weight in model.graph.initializer:
            if weight.name in read and weight.data_type == TensorProto.INT8:
                values = numpy_helper.to_array(weight).astype(np.float32).astype(kind)
                raw = helper.make_tensor(weight.name, FP8, weight.dims, values.tobytes(), raw=True)
                weight.CopyFrom(raw)

    return edit


Q, DQ, TRANSPOSE, RESHAPE = "attn.proj/Q", "attn.proj/DQ", "attn/Transpose_2", "attn/Reshape_1"
PLAIN: dict[str, Edit] = {
    "INT8": lambda model: None,
    "Q, Transpose, Reshape, DQ": rounding_of_attention(Q, TRANSPOSE, RESHAPE, DQ),
    "Transpose, Q, Reshape, DQ": rounding_of_attention(TRANSPOSE, Q, RESHAPE, DQ),
    "Q, DQ, Transpose, Reshape": rounding_of_attention(Q, DQ, TRANSPOSE, RESHAPE),
    "Q/DQ behind MatMul": rounded_outputs("MatMul"),
    "Q/DQ behind ratio": rounded_outputs("ratio"),
    "Q/DQ behind bias": rounded_outputs("Add"),
    "FP8 in fc2": in_fp8("mlp.fc2/"),
    "FP8 in proj": in_fp8("attn.proj/"),
    "FP8 in odd blocks": in_fp8("blocks.1.", "blocks.3.", "blocks.5."),
}
WITH_ATTENTION: dict[str, Edit] = {
    "INT8 + attention": lambda model: None,
    "FP8 in attention": in_fp8("attn.scores", "attn.mix"),
    "FP8 in attention and proj": in_fp8("attn.scores", "attn.mix", "attn.proj/"),
}


def compiled(model: ModelProto, compiler: Compiler) -> tuple[PlanKernel, ...]:
    """The kernels of a graph's plan."""
    del model.graph.value_info[:]
    with tempfile.TemporaryFile() as plan:
        one_gpu = BuildConfig(compute_capability=("8.9",))
        compiler.compile(model.SerializeToString(), SPEC, one_gpu, None, plan.write)
        plan.flush()
        return read_programs(plan)[0]


def rows(graph: Path, edits: dict[str, Edit]) -> Iterator[str]:
    """A row of the table for each variant of ``graph``."""
    compiler = Compiler("tensorrt-rtx", tensorrt_module("tensorrt-rtx"))
    for title, edit in edits.items():
        model = onnx.load(graph)
        edit(model)
        found = compiled(model, compiler)
        written = {kernel.layers[0]: kernel.output for kernel in found if kernel.output}
        types = " ".join(
            str(written.get(f"{BLOCK}.{role}/MatMul")) for role in ("attn.qkv", "mlp.fc1")
        )
        yield f"{title:28}{kernels_by_block(found)[BLOCK]:6}{len(found):6}  {types}"


def main() -> None:
    """Print the table."""
    print(f"{'':28}{'block':>6}{'all':>6}  qkv and fc1 write")
    with tempfile.TemporaryDirectory() as temporary:
        workspace = Workspace(Path(temporary))
        export_model(workspace, cards.DEMO)
        calibrate_model(workspace, cards.DEMO, cards.demo_file("calibration.zip"))
        for scope, edits in ((Scope(), PLAIN), (Scope(attention=True), WITH_ATTENTION)):
            config = QuantizeConfig(scope=scope, weight_scales="ratio")
            made = quantize_model(workspace, cards.DEMO, config, backend="tensorrt-rtx")
            for row in rows(made.artifact.path, edits):
                print(row, flush=True)


if __name__ == "__main__":
    main()
