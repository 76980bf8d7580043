from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from clipdeploy.core.passport import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Passport,
    Preprocess,
)
from clipdeploy.models.vit import VisionTransformer
from exporters.onnx import ExportConfig, export_graph
from exporters.precision import convert_to_fp16
from exporters.preprocess_graph import scale_and_offset
from exporters.samples import Samples, normalise
from exporters.session import OnnxSession

# Both sides multiply and add in float32; a fused multiply-add saves one rounding of values up to 3.
TOLERANCE = 1e-5


@pytest.fixture
def graph(
    traced_once: None,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> Path:
    module = make_vit()
    config = ExportConfig(preprocess=True)
    path = tmp_path / "uint8.onnx"
    export_graph(module, path, make_passport(module), tiny_samples, config)
    return path


def normalised(graph: Path, crops: np.ndarray) -> np.ndarray:
    proto = onnx.load(graph)
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info("preprocess/normalised", onnx.TensorProto.FLOAT, None)
    )
    return OnnxSession(proto.SerializeToString()).run(crops)[1]


def test_the_graph_normalises_as_numpy_does(graph: Path) -> None:
    crops = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = normalise(crops, Preprocess(16, CLIP_MEAN, CLIP_STD))
    assert np.abs(normalised(graph, crops) - expected).max() <= TOLERANCE
    other = normalise(crops, Preprocess(16, IMAGENET_MEAN, IMAGENET_STD))
    assert np.abs(normalised(graph, crops) - other).max() > 100 * TOLERANCE


def test_logits_equal_the_outside_variants(
    graph: Path, tiny_graph: Path, tiny_samples: Samples
) -> None:
    inside = OnnxSession(graph).run(tiny_samples.crops)[0]
    outside = OnnxSession(tiny_graph).run(tiny_samples.pixels)[0]
    assert np.abs(inside - outside).max() <= TOLERANCE
    turned = OnnxSession(graph).run(tiny_samples.crops[..., ::-1].copy())[0]
    assert np.abs(turned - outside).max() > 100 * TOLERANCE


def test_pixels_are_not_rounded_to_half_in_an_fp16_graph(
    graph: Path, tiny_samples: Samples, tmp_path: Path
) -> None:
    half = tmp_path / "half.onnx"
    convert_to_fp16(graph, half, tiny_samples)
    crops = tiny_samples.crops
    expected = tiny_samples.pixels
    assert np.abs(normalised(half, crops) - expected).max() <= TOLERANCE
    proto = onnx.load(half)
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_scale_and_offset_by_hand() -> None:
    scale, offset = scale_and_offset(Preprocess(8, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)))
    assert scale.tolist() == pytest.approx([2 / 255, 4 / 255, 1 / 255])
    assert offset.tolist() == [-1.0, -1.0, 0.0]


def test_samples_start_again_where_there_are_too_few(tiny_samples: Samples) -> None:
    more = tiny_samples.of(9).crops
    assert np.array_equal(more[7:], tiny_samples.crops[:2])
    assert len(tiny_samples.of(2).crops) == 2
