from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
import shared_traces as _shared
import torch
from numpy.typing import NDArray
from shared_traces import shared_traces
from torch import Tensor, nn
from torch.nn import functional as F

from clipdeploy.core.errors import GraphError, UsageError
from clipdeploy.core.passport import Passport
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.models.vit import VisionTransformer
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.headers import read_passport
from exporters.onnx import ExportConfig, export_graph
from exporters.samples import Samples
from exporters.session import OnnxSession

# float32 rounding of two runtimes on logits of about 10, over six blocks.
ROUNDING = 2e-5

_NODE_NAME = re.compile(
    r"^(patch_embed|norm_pre|norm|head|vit"
    r"|blocks\.\d+(\.norm1|\.norm2|\.attn|\.attn\.qkv|\.attn\.proj|\.mlp|\.mlp\.fc1|\.mlp\.fc2)?)"
    r"/[A-Z][A-Za-z]+(_\d+)?$"
)


class _Impostor(nn.Module):
    """``reference`` when PyTorch asks, ``exported`` when torch.onnx traces."""

    def __init__(self, reference: nn.Module, exported: nn.Module) -> None:
        super().__init__()
        self.reference, self.exported = reference, exported

    def forward(self, image: Tensor) -> Tensor:
        return self.exported(image) if torch.compiler.is_exporting() else self.reference(image)


class _TanhMlp(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _tanh_gelu(module: VisionTransformer) -> None:
    for block in module.blocks:
        block.mlp = _TanhMlp(block.mlp)


def _smaller_eps(module: VisionTransformer) -> None:
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-6


def _swapped_positions(module: VisionTransformer) -> None:
    module.position.data = module.position[:, [0, 2, 1, *range(3, module.config.tokens)]]


def _head_bias(module: VisionTransformer) -> None:
    module.head.bias.data[3] += 1e-3


def _operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in load_graph(path).graph)


def test_one_node_for_each_layer(demo_workspace: Workspace) -> None:
    operators = _operators(demo_workspace.graph(cards.DEMO, "fp32"))
    depth = cards.find(cards.DEMO).depth
    assert operators["LayerNormalization"] == 2 * depth + 2
    assert operators["Gelu"] == depth
    assert operators["Softmax"] == depth
    # Four Linears and two products of attention in every block; the head is a Gemm.
    assert operators["MatMul"] == 6 * depth
    assert (operators["Conv"], operators["Gemm"]) == (1, 1)


def test_no_node_computes_shapes(demo_workspace: Workspace) -> None:
    operators = _operators(demo_workspace.graph(cards.DEMO, "fp32"))
    shape_work = {"Shape", "Expand", "Squeeze", "Unsqueeze", "Concat", "ConstantOfShape", "Cast"}
    decomposed = {"Erf", "Tanh", "ReduceMean", "Pow", "Sqrt", "Identity", "Constant", "If"}
    assert not (shape_work | decomposed) & set(operators)


def test_only_the_batch_is_symbolic(demo_workspace: Workspace) -> None:
    proto = onnx.load(str(demo_workspace.graph(cards.DEMO, "fp32")))
    (image,), (logits,) = proto.graph.input, proto.graph.output
    dims = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert (image.name, dims) == ("image", ["batch", 3, 32, 32])
    dims = [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim]
    assert (logits.name, dims) == ("logits", ["batch", 10])
    onnx.checker.check_model(proto, full_check=True)


def test_every_node_says_block_and_role(demo_workspace: Workspace) -> None:
    nodes = list(load_graph(demo_workspace.graph(cards.DEMO, "fp32")).graph)
    names = [node.name or "" for node in nodes]
    assert [name for name in names if not _NODE_NAME.match(name)] == []
    assert len(set(names)) == len(names)
    blocks = [m[1] for name in names if (m := re.match(r"blocks\.(\d+)", name))]
    assert set(blocks) == {str(i) for i in range(6)}
    for node, name in zip(nodes, names, strict=True):
        assert name.rpartition("/")[2].split("_")[0] == node.op_type


def test_every_weight_has_its_parameters_name(
    demo_workspace: Workspace, demo_model: LoadedModel
) -> None:
    found = load_graph(demo_workspace.graph(cards.DEMO, "fp32")).graph.initializers
    parameters = dict(demo_model.module.named_parameters())
    assert set(parameters) <= set(found)
    for name in set(found) - set(parameters):
        tensor = found[name].const_value
        assert tensor is not None
        # Shapes, axes and splits: a weight would be larger.
        assert tensor.size <= 8


def test_every_constant_is_read(demo_workspace: Workspace) -> None:
    graph = load_graph(demo_workspace.graph(cards.DEMO, "fp32")).graph
    read = {value for node in graph for value in node.inputs}
    assert [name for name, value in graph.initializers.items() if value not in read] == []


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_logits_are_pytorchs(
    demo_workspace: Workspace,
    demo_model: LoadedModel,
    demo_images: NDArray[np.float32],
    count: int,
) -> None:
    session = OnnxSession(demo_workspace.graph(cards.DEMO, "fp32"))
    logits = session.run(demo_images[:count])[0]
    expected = demo_model.module(torch.from_numpy(demo_images[:count])).numpy()
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ROUNDING)


def test_images_do_not_mix(demo_workspace: Workspace, demo_images: NDArray[np.float32]) -> None:
    session = OnnxSession(demo_workspace.graph(cards.DEMO, "fp32"))
    together = session.run(demo_images)[0]
    alone = np.concatenate([session.run(image[None])[0] for image in demo_images])
    np.testing.assert_allclose(together, alone, rtol=0, atol=ROUNDING)


def test_image_of_another_size_is_refused(demo_workspace: Workspace) -> None:
    session = OnnxSession(demo_workspace.graph(cards.DEMO, "fp32"))
    with pytest.raises(GraphError, match="cannot run"):
        session.run(np.zeros((1, 3, 36, 36), np.float32))


@pytest.mark.parametrize(
    ("defect", "small_residual"),
    [
        (_tanh_gelu, False),
        # On a residual of usual size 1e-6 for 1e-5 costs 2e-5, below any bound of float32 parity.
        (_smaller_eps, True),
        (_swapped_positions, False),
        (_head_bias, False),
    ],
)
def test_wrong_export_is_refused_and_leaves_no_file(
    defect: Callable[[VisionTransformer], None],
    small_residual: bool,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> None:
    module = make_vit(small_residual=small_residual)
    wrong = copy.deepcopy(module)
    defect(wrong)
    path = tmp_path / "tiny.onnx"
    path.write_bytes(b"the export of last week")
    with pytest.raises(GraphError, match="the graph's logits differ from PyTorch's"):
        export_graph(_Impostor(module, wrong), path, make_passport(module), tiny_samples)
    assert os.listdir(tmp_path) == ["tiny.onnx"]
    assert path.read_bytes() == b"the export of last week"


@pytest.mark.usefixtures("traced_once")
def test_wrong_promise_leaves_no_file(
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> None:
    passport = make_passport(make_vit())
    module = make_vit()
    module.head = nn.Linear(32, 6).requires_grad_(False)
    with pytest.raises(GraphError, match=r"has output .* its passport has"):
        export_graph(module, tmp_path / "tiny.onnx", passport, tiny_samples)
    assert os.listdir(tmp_path) == []


class _Undecided(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) if image.sum() > 0 else image.amax((2, 3))


def test_untraceable_module_is_a_graph_error(
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> None:
    with pytest.raises(GraphError, match=r"torch\.onnx cannot trace tiny"):
        export_graph(_Undecided(), tmp_path / "x.onnx", make_passport(make_vit()), tiny_samples)
    assert os.listdir(tmp_path) == []


def test_two_exports_are_the_same_bytes(
    tiny_graph: Path,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> None:
    module = make_vit()
    artifact = export_graph(module, tmp_path / "again.onnx", make_passport(module), tiny_samples)
    assert artifact.path.read_bytes() == tiny_graph.read_bytes()
    assert artifact.passport == read_passport(artifact.path)
    assert artifact.passport.settings["opset"] == 20
    assert artifact.changed


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("opset", [17, 18, 19, 21, 22, 23])
def test_other_opsets_pass_the_same_checks(
    opset: int,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> None:
    module = make_vit()
    path = tmp_path / "tiny.onnx"
    export_graph(module, path, make_passport(module), tiny_samples, ExportConfig(opset))
    assert load_graph(path).graph.opset_imports[""] == opset
    assert read_passport(path).settings["opset"] == opset
    assert _operators(path)["Gelu"] == (2 if opset >= 20 else 0)
    assert _operators(path)["Erf"] == (0 if opset >= 20 else 2)
    assert _operators(path)["LayerNormalization"] == 6


@pytest.mark.parametrize("opset", [16, 24])
def test_opsets_beyond_are_refused(opset: int) -> None:
    with pytest.raises(UsageError, match=f"invalid value {opset} for opset"):
        ExportConfig(opset)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_a_fixed_batch_is_fixed_everywhere(
    batch: int,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> None:
    module = make_vit()
    path = tmp_path / "tiny.onnx"
    config = ExportConfig(batch=batch)
    artifact = export_graph(module, path, make_passport(module), tiny_samples, config)
    assert artifact.passport.input.shape == (batch, 3, 16, 16)
    assert artifact.passport.output.shape == (batch, 5)
    proto = onnx.load(path)
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim]
    assert not [dim.dim_param for dim in dims if dim.dim_param]
    with pytest.raises(GraphError, match="cannot run"):
        OnnxSession(path).run(tiny_samples.of(batch + 1).pixels)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_nothing_is_refused(batch: int) -> None:
    with pytest.raises(UsageError, match=f"invalid value {batch} for batch"):
        ExportConfig(batch=batch)


@pytest.mark.usefixtures("traced_once")
def test_without_any_image_nothing_is_exported(
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> None:
    module = make_vit()
    none = Samples(tiny_samples.crops[:0], tiny_samples.spec)
    with pytest.raises(GraphError, match="no image"):
        export_graph(module, tmp_path / "x.onnx", make_passport(module), none)
    assert os.listdir(tmp_path) == []


def test_a_shared_trace_gives_the_same_file(
    tmp_path: Path,
    tiny_samples: Samples,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
) -> None:
    """See ``tests/support/shared_traces.py``."""

    def export(name: str, **options: object) -> bytes:
        module = make_vit(**options)
        path = tmp_path / name
        export_graph(module, path, make_passport(module), tiny_samples)
        return path.read_bytes()

    own = export("own.onnx", seed=1)
    with shared_traces():
        assert export("first.onnx") != own
        with mock.patch.object(_shared, "_TORCH_EXPORT", side_effect=AssertionError("traced")):
            assert export("shared.onnx", seed=1) == own
            # Another architecture is traced.
            with pytest.raises(AssertionError, match="traced"):
                export("heads.onnx", heads=8)


def test_weights_of_another_module_fail_in_a_shared_trace(
    tmp_path: Path,
    tiny_samples: Samples,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, other = make_vit(), make_vit(seed=1)
    real = _shared.Traced.with_weights

    def swapped(traced: _shared.Traced, module: nn.Module) -> object:
        return real(traced, other)

    monkeypatch.setattr(_shared.Traced, "with_weights", swapped)
    with shared_traces(), pytest.raises(GraphError, match="differ from PyTorch's"):
        export_graph(module, tmp_path / "x.onnx", make_passport(module), tiny_samples)
