"""Opens ONNX Runtime's sessions on one provider, and finds out whether CUDA works here.

ONNX Runtime itself goes on without CUDA in three ways: if a library of CUDA does not load, it opens
the session on the CPU and logs a warning; if CUDA fails, it prints on stdout and opens it on the
CPU; and without cuDNN, it opens the session on CUDA and fails in the first convolution.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import EngineError, first_line

__all__ = ["CPU", "CUDA", "FATAL_ONLY", "cuda_problem", "open_session"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FATAL_ONLY, _WARNINGS = 4, 2
# The part of a message that names the cause, and not ONNX Runtime's own functions and files.
_CAUSE = re.compile(r"(cuDNN is unavailable.*|CU\w+ failure \d+: [^;]*)")


@cache
def _preload() -> str:
    """Load the libraries of CUDA and cuDNN from PyTorch's wheels or the system, once.

    Returns:
        The first one that does not load and the reason, as ONNX Runtime prints it; or empty.
    """
    if not hasattr(ort, "preload_dlls"):  # added in 1.21
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ort.preload_dlls()
    found = re.search(r"Failed to load [^:]+: (.*)", printed.getvalue())
    return found[1] if found else ""


def open_session(
    model: str | bytes, options: ort.SessionOptions, provider: str = CPU
) -> ort.InferenceSession:
    """Open a session on ``provider``; ``model`` is a path or a serialised model.

    An operator that CUDA lacks runs on the CPU.

    Raises:
        EngineError: the libraries of CUDA do not load.
        Exception: ONNX Runtime's own exceptions, which share no public base class.
    """
    # TF32 has 10 mantissa bits instead of 23; an FP32 graph must run in FP32.
    settings = {"use_tf32": "0"} if provider == CUDA else {}
    missing = _preload() if provider == CUDA else ""
    printed = io.StringIO()
    # Old releases (1.20) ignore the argument, print on stdout and open the session on the CPU.
    with contextlib.redirect_stdout(printed):
        session = ort.InferenceSession(
            model, options, providers=[(provider, settings)], enable_fallback=0
        )
    session.disable_fallback()
    if session.get_providers()[0] != provider:
        unknown = "the library of its CUDA provider does not load"
        raise EngineError(missing or _cause(printed.getvalue()) or unknown)
    return session


def _cause(text: str) -> str:
    found = _CAUSE.search(text)
    return found[1].strip() if found else ""


def _probe() -> bytes:
    """A graph with the two operations of a ViT that need cuDNN and cuBLAS."""
    kernel = numpy_helper.from_array(np.ones((4, 3, 2, 2), np.float32), "kernel")
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["patches"], strides=[2, 2]),
        helper.make_node("MatMul", ["patches", "weight"], ["result"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 4, 4])
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, 4, 2, 2])
    graph = helper.make_graph(nodes, "probe", [image], [result], [kernel, weight])
    opset = helper.make_opsetid("", 17)
    model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
    return model


@contextlib.contextmanager
def _silent_logger() -> Iterator[None]:
    # A session's own severity does not cover the loading of providers.
    ort.set_default_logger_severity(FATAL_ONLY)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_WARNINGS)


@cache
def cuda_problem() -> str:
    """Why ONNX Runtime cannot compute on a GPU here; empty if it can.

    A convolution and a matrix product are run, once per process, because a missing cuDNN appears
    only then.
    """
    if not gpus():
        return "there is no GPU"
    if CUDA not in ort.get_available_providers():
        return "onnxruntime without -gpu is installed"
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    try:
        with _silent_logger():
            session = open_session(_probe(), options, CUDA)
            session.run(None, {"image": np.ones((1, 3, 4, 4), np.float32)})
    except Exception as error:  # see open_session
        return _cause(str(error)) or first_line(error)
    return ""
