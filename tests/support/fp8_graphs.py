"""Turns an INT8 graph into one of FP8 with the same nodes, to see which kernels it compiles to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

__all__ = ["as_fp8"]

_FP8 = TensorProto.FLOAT8E4M3FN


def as_fp8(int8: Path) -> ModelProto:
    """The graph at ``int8`` with FP8 integers, whose values mean nothing."""
    model = onnx.load(int8)
    kind = helper.tensor_dtype_to_np_dtype(_FP8)
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.INT8:
            values = numpy_helper.to_array(weight).astype(np.float32).astype(kind)
            raw = helper.make_tensor(weight.name, _FP8, weight.dims, values.tobytes(), raw=True)
            weight.CopyFrom(raw)
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = _FP8
    return model
