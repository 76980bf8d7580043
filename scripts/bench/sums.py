"""Runs 8-bit products whose sums exceed float16's range on a GPU, and says whether they overflow.

    python scripts/bench/sums.py --backend tensorrt [--json]

An engine that writes the int32 sums of an INT8 product as float16, before it multiplies them by
their scales, overflows at 65504: its logits are infinite, NaN or wrong.  The text of a plan of
TensorRT-RTX shows that (:mod:`clipdeploy.engines.plan_text`); a plan of TensorRT contains no such
text, so that only a run can tell.  The graph is one Linear of ViT-B's width, on positive numbers:

    y[t, j] = s_x s_j sum_c q[t, c] Q[c, j] + b,   c = 1 ... 768,   64 <= q, Q <= 127

so that every sum is above 768 * 64^2 = 3.1e6, while y is about 5, within float16.  Each form of the
weight scales s_j (``quantize --weight-scales``) is compiled, and run if there is a GPU:

    plan   what the plan's text says: raw sums as float16 or not; unknown for TensorRT
    run    what the GPU computed, beside ONNX Runtime's CPU provider: the largest relative error
           and whether it overflows; or why it did not run, in TensorRT's words

The exit code is 1 if a form that clipdeploy builds with this backend overflows or is not built.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import ClipdeployError
from clipdeploy.core.passport import ScaleForm, TensorSpec
from clipdeploy.engines.backends import (
    Backend,
    choose_backend,
    compute_capabilities,
    scale_forms,
    targets_capabilities,
    tensorrt_module,
)
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.plan_text import checked_products, overflowing, read_programs
from exporters.session import OnnxSession

F32 = NDArray[np.float32]
FORMS: tuple[ScaleForm, ...] = get_args(ScaleForm)
SPEC = TensorSpec("image", "float32", ("batch", 3, 32, 32))
# 3 * 32 * 32 numbers are 4 tokens of ViT-B's width.
TOKENS, WIDTH, CHANNELS = 4, 768, 64
BATCHES = (1, 8, 32)
# Three roundings to float16 (the scaled sum, its product with the ratio, the sum with the bias) are
# 3 * 2^-11 = 0.0015 of the result; a sum cut off at 65504 is at most 0.02 of what it should be.
MOST_ERROR = 0.01


@dataclass(frozen=True)
class Found:
    """What the plan says of one form, and what the run showed.

    ``ours`` is whether clipdeploy builds the form with this backend.  ``plan`` and ``run`` are
    ``overflows``, ``does not``, or ``unknown`` and ``not run``; ``error`` is the largest relative
    error, None if nothing ran; ``said`` is why it did not run.
    """

    form: str
    ours: bool
    built: bool
    plan: str
    run: str
    error: float | None = None
    said: str = ""


def constants(form: ScaleForm) -> dict[str, NDArray[Any]]:
    """The graph's constants; ``ratio`` is only that of the ratio form."""
    generator = np.random.default_rng(0)
    numbers = generator.integers(64, 128, (WIDTH, CHANNELS)).astype(np.int8)
    scales = (1e-4 * generator.uniform(0.5, 1.5, CHANNELS)).astype(np.float16)
    given = scales if form == "channel" else scales.max()
    found = {
        "tokens": np.array([-1, TOKENS, WIDTH]),
        "flat": np.array([-1, TOKENS * CHANNELS]),
        "x_scale": np.float16(1 / 127),
        "zero": np.int8(0),
        "numbers": numbers,
        "scales": given,
        "zeros": np.zeros(given.shape, np.int8),
        "bias": np.full(CHANNELS, 0.5, np.float16),
    }
    ratio = {"ratio": scales / scales.max()} if form == "ratio" else {}
    return {name: np.asarray(each) for name, each in (found | ratio).items()}


def graph(form: ScaleForm) -> bytes:
    """The graph, (batch, 3, 32, 32) -> (batch, 256)."""
    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    node, tensor = helper.make_node, helper.make_tensor_value_info
    # One scale has no axis.
    axis = {"axis": 1} if form == "channel" else {}
    scaled = "scaled" if form == "ratio" else "sum"
    nodes = [
        node("Cast", ["image"], ["half"], to=float16),
        node("Reshape", ["half", "tokens"], ["x"]),
        node("QuantizeLinear", ["x", "x_scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "x_scale", "zero"], ["dq"]),
        node("DequantizeLinear", ["numbers", "scales", "zeros"], ["weight"], **axis),
        node("MatMul", ["dq", "weight"], ["sum"], name="blocks.0.attn.qkv/MatMul"),
        *([node("Mul", ["sum", "ratio"], ["scaled"])] if form == "ratio" else []),
        node("Add", [scaled, "bias"], ["y"]),
        node("Reshape", ["y", "flat"], ["y_flat"]),
        node("Cast", ["y_flat"], ["logits"], to=float32),
    ]
    made = helper.make_graph(
        nodes,
        "sums",
        [tensor("image", float32, SPEC.shape)],
        [tensor("logits", float32, ["batch", TOKENS * CHANNELS])],
        [numpy_helper.from_array(each, name) for name, each in constants(form).items()],
    )
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(made, opset_imports=[opset], ir_version=10)
    return bytes(model.SerializeToString())


def images(batch: int) -> F32:
    """Numbers (batch, 3, 32, 32) from 0.5 to 1, which are 64 to 127 in INT8."""
    return np.random.default_rng(1).uniform(0.505, 1, (batch, 3, 32, 32)).astype(np.float32)


def largest_error(found: F32, expected: F32) -> float:
    """The largest relative error; infinite if a value is not finite."""
    error = np.abs(found - expected) / np.abs(expected)
    return float(np.where(np.isfinite(found), error, np.inf).max())


def compiled(backend: Backend, model: bytes) -> bytes:
    """The plan of a graph, for this GPU if the backend can target it.

    Raises:
        BuildError: TensorRT refuses the graph.
    """
    choose_backend(backend)
    module = tensorrt_module(backend)
    known = compute_capabilities(module) if targets_capabilities(module) else ()
    here = tuple(gpu.capability for gpu in gpus()[:1] if gpu.capability in known)
    compiler, config = Compiler(backend, module), BuildConfig(compute_capability=here)
    pieces: list[bytes] = []
    compiler.compile(model, SPEC, config, None, lambda piece: pieces.append(bytes(piece)))
    return b"".join(pieces)


def plan_says(plan: Path) -> str:
    """Whether the text of a plan shows raw sums in float16."""
    with plan.open("rb") as stream:
        programs = read_programs(stream)
    kernels = [kernel for program in programs for kernel in program]
    if not checked_products(kernels):
        return "unknown"
    return "overflows" if overflowing(kernels) else "does not"


def run_on_gpu(backend: Backend, plan: Path, model: bytes) -> float:
    """The largest relative error of the engine from ONNX Runtime's CPU provider.

    Raises:
        ClipdeployError: there is no GPU, or TensorRT cannot load or run the engine.
    """
    from clipdeploy.runners import engine as runner_module

    session = OnnxSession(model)
    # An engine without a passport does not say which backend it is for.
    with (
        patch.object(runner_module, "_backend", lambda plan: backend),
        runner_module.EngineRunner(plan, trust=True) as runner,
    ):
        return max(
            largest_error(runner(images(batch)), session.run(images(batch))[0]) for batch in BATCHES
        )


def try_form(backend: Backend, form: ScaleForm, folder: Path) -> Found:
    """Compile one form, read its plan, and run it."""
    model, ours = graph(form), form in scale_forms(backend)
    plan = folder / f"{form}.engine"
    try:
        plan.write_bytes(compiled(backend, model))
    except ClipdeployError as problem:
        return Found(form, ours, False, "unknown", "not run", said=str(problem))
    says = plan_says(plan)
    try:
        error = run_on_gpu(backend, plan, model)
    except ClipdeployError as problem:
        return Found(form, ours, True, says, "not run", said=str(problem))
    overflows = "overflows" if error > MOST_ERROR else "does not"
    return Found(form, ours, True, says, overflows, error)


def is_wrong(found: Found) -> bool:
    """Whether a form that clipdeploy builds is not built, or overflows."""
    return found.ours and (not found.built or "overflows" in (found.plan, found.run))


def main() -> int:
    """Print what was found; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=get_args(Backend), required=True)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [try_form(chosen.backend, form, Path(folder)) for form in FORMS]
    if chosen.json:
        print(json.dumps([asdict(each) for each in found]))
    else:
        print(f"{'form':9}{'plan':11}{'run':11}{'largest error':14}")
        for each in found:
            error = "" if each.error is None else f"{each.error:.1e}"
            print(f"{each.form:9}{each.plan:11}{each.run:11}{error:14}{each.said}".rstrip())
    return int(any(map(is_wrong, found)))


if __name__ == "__main__":
    raise SystemExit(main())
