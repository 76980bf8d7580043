"""Overflow in float16 storage, which ONNX Runtime's CPU provider does not show."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from clipdeploy.core.errors import GraphError
from clipdeploy.core.passport import Passport
from clipdeploy.models.vit import VisionTransformer
from exporters.graphs import load_graph, save_graph
from exporters.headers import read_passport
from exporters.onnx import export_graph
from exporters.overflow import NEAR_LIMIT, check_storage, largest_values, near_limit
from exporters.precision import convert_to_fp16, half_precision
from exporters.samples import Samples
from exporters.session import OnnxSession

# Real ViT-B residual streams carry |x| of 300 to 1400 in a few channels (onnxsim#1742); the square
# of the smallest of them is beyond float16's 65504 already.
MASSIVE = 600.0


class DecomposedNorm(nn.Module):
    """LayerNorm as exporters without the LayerNormalization node write it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


def decompose(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            setattr(module, name, DecomposedNorm(child))
        else:
            decompose(child)


Exported = Callable[..., Path]


@pytest.fixture
def exported(
    traced_once: None,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> Exported:
    def export(*, decomposed: bool, massive: float = MASSIVE) -> Path:
        module = make_vit()
        module.blocks[0].mlp.fc2.bias.data[[3, 17]] += torch.tensor([massive, -massive])
        passport = make_passport(module)
        if decomposed:
            decompose(module)
        path = tmp_path / f"{decomposed}.onnx"
        export_graph(module, path, passport, tiny_samples)
        return path

    return export


def plain_half(source: Path, target: Path) -> Path:
    """The FP16 graph as a converter writes it that looks at no values."""
    model = load_graph(source)
    half_precision(model)
    save_graph(model, target, read_passport(source))
    return target


def sqnr(logits: np.ndarray, reference: np.ndarray) -> float:
    return float(10 * np.log10((reference**2).sum() / ((logits - reference) ** 2).sum()))


def test_a_decomposed_layernorm_overflows_and_is_caught(
    exported: Exported, tiny_samples: Samples, tmp_path: Path
) -> None:
    source = exported(decomposed=True)
    images = tiny_samples.pixels
    reference, peaks = largest_values(source, images)
    half = plain_half(source, tmp_path / "half.onnx")
    # What a GPU would ruin scores well on ONNX Runtime's CPU provider ...
    assert sqnr(OnnxSession(half).run(images)[0], reference) > 30
    # ... and is refused here, by the name of the tensor.
    with pytest.raises(GraphError, match=r"stored as float16, blocks\.1\.norm1/Mul\S* overflows"):
        check_storage(half, images, reference)
    assert any(name.startswith("blocks.1.norm1/Mul") for name in near_limit(peaks))


def test_tensors_near_the_limit_stay_float32_and_are_named(
    exported: Exported, tiny_samples: Samples, tmp_path: Path
) -> None:
    source = exported(decomposed=True)
    artifact = convert_to_fp16(source, tmp_path / "half.onnx", tiny_samples)
    kept = artifact.passport.settings["keep_fp32"]
    assert kept
    assert all("norm" in name for name in kept)
    reference, _ = largest_values(source, tiny_samples.pixels)
    found = check_storage(artifact.path, tiny_samples.pixels, reference)
    # Eleven bits a tensor, and a stream in which two channels outweigh all others.
    assert found is not None
    assert found > 30


def test_a_whole_layernorm_keeps_massive_channels(
    exported: Exported, tiny_samples: Samples, tmp_path: Path
) -> None:
    source = exported(decomposed=False)
    reference, peaks = largest_values(source, tiny_samples.pixels)
    assert near_limit(peaks) == ()
    assert max(peaks.values()) > 0.9 * MASSIVE
    half = plain_half(source, tmp_path / "half.onnx")
    found = check_storage(half, tiny_samples.pixels, reference)
    assert found is not None
    assert found > 30


def test_a_refused_graph_does_not_get_its_name(
    exported: Exported, tiny_samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported(decomposed=True)
    # As if the images that ranges were observed on had not shown it.
    monkeypatch.setattr("exporters.precision.near_limit", lambda peaks: ())
    with pytest.raises(GraphError, match="overflows"):
        convert_to_fp16(source, tmp_path / "half.onnx", tiny_samples)
    assert not (tmp_path / "half.onnx").exists()


def test_every_tensor_is_really_rounded(
    tiny_graph: Path, tiny_samples: Samples, tmp_path: Path
) -> None:
    images = tiny_samples.pixels
    reference, _ = largest_values(tiny_graph, images)
    half = plain_half(tiny_graph, tmp_path / "half.onnx")
    stored = check_storage(half, images, reference)
    runtime = sqnr(OnnxSession(half).run(images)[0], reference)
    # ONNX Runtime rounds the weights only; storing every tensor adds noise.
    assert stored is not None
    assert 40 < stored < runtime - 1


def test_largest_values_are_numpys(tiny_graph: Path, tiny_samples: Samples) -> None:
    images = tiny_samples.pixels
    logits, peaks = largest_values(tiny_graph, images)
    # Two sessions with other fusions: rounding of float32.
    np.testing.assert_allclose(logits, OnnxSession(tiny_graph).run(images)[0], atol=1e-5)
    assert peaks["logits"] == pytest.approx(np.abs(logits).max())
    assert len(peaks) == len([v for node in load_graph(tiny_graph).graph for v in node.outputs])


def test_near_limit_takes_nan_for_near() -> None:
    peaks = {"low": 1.0, "high": NEAR_LIMIT, "nan": float("nan"), "inf": float("inf")}
    assert near_limit(peaks) == ("high", "nan", "inf")


# Of the 8 MB that two images take in each.
_TENSORS = 60
_PEAK = """
import sys
from pathlib import Path
import numpy as np
from exporters import overflow
from exporters.session import OnnxSession

def session(path, *, in_order, **others):
    return OnnxSession(path, in_order=in_order and sys.argv[2] == "True", **others)

overflow.OnnxSession = session
_, peaks = overflow.largest_values(Path(sys.argv[1]), np.full((2, 1 << 20), -1, np.float32))
assert list(peaks.values()) == [1.0] * int(sys.argv[3])
print(open("/proc/self/status").read())
"""


def _peak_mb(graph: Path, *, in_order: bool) -> float:
    """Peak memory of :func:`largest_values` in a process of its own."""
    words = [sys.executable, "-c", _PEAK, str(graph), str(in_order), str(_TENSORS)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_tensors_are_not_in_memory_together(tmp_path: Path) -> None:
    names = ["x", *(f"y{index}" for index in range(1, _TENSORS)), "logits"]
    nodes = [helper.make_node("Neg", list(pair[:1]), list(pair[1:])) for pair in pairwise(names)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 1 << 20]) for n in names]
    graph = helper.make_graph(nodes, "g", values[:1], values[-1:], value_info=values[1:-1])
    opset = helper.make_opsetid("", 18)
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    together, in_order = (_peak_mb(path, in_order=each) for each in (False, True))
    # Without the order, all of them are; with it, a few are.
    assert together - in_order > 0.8 * _TENSORS * 8
