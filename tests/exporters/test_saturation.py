from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from clipdeploy.core.errors import GraphError
from exporters.saturation import saturation

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(0, 1, (21, 6, 5)).astype(np.float32)


def _graph(
    folder: Path,
    scale: NDArray[Any],
    zero: NDArray[Any] | None,
    *,
    name: str = "blocks.0.mlp.fc1/Q",
    axis: int = 1,
    batch: int | str = "batch",
    constant_input: bool = False,
) -> Path:
    """y = DQ(Q(x)), summed to two "logits" for each image."""
    kind = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8}.get(
        "uint8" if zero is None else zero.dtype.name, TensorProto.FLOAT8E4M3FN
    )
    constants = [onnx.numpy_helper.from_array(scale.astype(np.float32), "s")]
    inputs = ["x", "s"]
    if zero is not None:
        flat = zero.reshape(-1).tolist()
        constants.append(helper.make_tensor("z", kind, zero.shape, [float(v) for v in flat]))
        inputs.append("z")
    nodes = [
        helper.make_node("QuantizeLinear", inputs, ["q"], name=name, axis=axis),
        helper.make_node("DequantizeLinear", ["q", *inputs[1:]], ["d"], axis=axis),
        helper.make_node("ReduceSum", ["d", "axes"], ["y"], keepdims=0),
    ]
    constants.append(onnx.numpy_helper.from_array(np.asarray([1], np.int64), "axes"))
    if constant_input:
        constants.append(onnx.numpy_helper.from_array(IMAGES[0], "w"))
        nodes.append(helper.make_node("QuantizeLinear", ["w", *inputs[1:]], ["wq"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 6, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.save(model, folder / "g.onnx")
    return folder / "g.onnx"


def _expected(u: NDArray[Any], low: float, high: float, zero: float) -> tuple[float, float]:
    """The share that is clipped and the energy that is lost, for numbers rounded by numpy."""
    over = np.maximum(u - high, low - u)
    over = np.where(over > 0, over, 0)
    return float((over > 0).mean()), float((over**2).sum() / ((u - zero) ** 2).sum())


@pytest.mark.parametrize("batch", ["batch", 1, 4])
@pytest.mark.parametrize("step", [0.001, 0.01, 0.02, 1.0])
def test_int8(step: float, batch: int | str, tmp_path: Path) -> None:
    path = _graph(tmp_path, np.asarray(step), np.asarray(0, np.int8), batch=batch)
    images = IMAGES[:20] if batch == 4 else IMAGES
    (found,) = saturation(path, images)
    share, lost = _expected(images / step, -128.5, 127.5, 0)
    assert found.name == "blocks.0.mlp.fc1"
    assert found.share == pytest.approx(share, rel=1e-5)
    assert found.lost == pytest.approx(lost, rel=1e-4, abs=1e-12)
    assert (found.share > 0) == (step < 0.03)


@pytest.mark.parametrize("zero", [0, 100, 128, 255])
def test_uint8_with_a_zero_point(zero: int, tmp_path: Path) -> None:
    path = _graph(tmp_path, np.asarray(0.015), np.asarray(zero, np.uint8), name="")
    (found,) = saturation(path, IMAGES)
    share, lost = _expected(IMAGES / 0.015 + zero, -0.5, 255.5, zero)
    assert (found.name, found.share) == ("x", pytest.approx(share, rel=1e-5))
    assert found.lost == pytest.approx(lost, rel=1e-4)


def test_without_a_zero_point_the_numbers_are_uint8(tmp_path: Path) -> None:
    (found,) = saturation(_graph(tmp_path, np.asarray(0.015), None), IMAGES)
    assert found.share == pytest.approx(_expected(IMAGES / 0.015, -0.5, 255.5, 0)[0], rel=1e-5)


@pytest.mark.parametrize("step", [0.001, 0.004, 0.01])
def test_fp8_clips_what_is_beyond_its_largest_number(step: float, tmp_path: Path) -> None:
    zero = np.asarray(0, ml_dtypes.float8_e4m3fn)
    (found,) = saturation(_graph(tmp_path, np.asarray(step), zero), IMAGES)
    share, lost = _expected(IMAGES / np.float32(step), -464, 464, 0)
    assert found.share == pytest.approx(share, rel=1e-5)
    assert found.lost == pytest.approx(lost, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("axis", "shape"), [(1, (1, 6, 1)), (2, (1, 1, 5)), (-1, (1, 1, 5))])
def test_a_scale_for_each_channel(axis: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    scale = np.linspace(0.005, 0.05, max(shape)).astype(np.float32)
    path = _graph(tmp_path, scale, np.zeros(max(shape), np.int8), axis=axis)
    (found,) = saturation(path, IMAGES)
    share, _ = _expected(IMAGES / scale.reshape(shape), -128.5, 127.5, 0)
    assert found.share == pytest.approx(share, rel=1e-5)


def test_weights_are_left_out_and_no_images_are_nothing(tmp_path: Path) -> None:
    path = _graph(tmp_path, np.asarray(1.0), np.asarray(0, np.int8), constant_input=True)
    assert len(saturation(path, IMAGES)) == 1
    assert saturation(path, IMAGES[:0]) == []


def test_zeros_lose_nothing(tmp_path: Path) -> None:
    path = _graph(tmp_path, np.asarray(1.0), np.asarray(0, np.int8))
    (found,) = saturation(path, np.zeros_like(IMAGES))
    assert (found.share, found.lost) == (0, 0)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\x00nonsense")
    with pytest.raises(GraphError):
        saturation(tmp_path / "g.onnx", IMAGES)
