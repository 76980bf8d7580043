from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import exporters.onnx as exporter
from clipdeploy.core.errors import GraphError
from clipdeploy.core.passport import Passport, TensorSpec
from clipdeploy.models.clip.text import CONTEXT, TextGeometry, TextTower
from clipdeploy.models.vit import BlockConfig, VisionTransformer, ViTConfig
from exporters.blocks import block_of
from exporters.graphs import load_graph
from exporters.onnx import ExportConfig, export_graph, trace, trace_whole
from exporters.repeated import Run, UnrepeatableError, repeat_blocks, runs_of, shortened
from exporters.samples import Samples

# The trace of an architecture does not depend on its weights.
pytestmark = pytest.mark.usefixtures("traced_once")

# The last block computes only the class token, so that it is not like the others.
_DEPTH = 5

_Module = TypeVar("_Module", bound=nn.Module)

_RUN = Run("blocks", 0, _DEPTH - 2)


def _vit(kind: type[VisionTransformer] = VisionTransformer) -> VisionTransformer:
    return _random(kind(ViTConfig(4, 16, 5, width=32, depth=_DEPTH, heads=2)))


def _random(module: _Module) -> _Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter.requires_grad_(False), std=0.2, generator=generator)
    return module.eval()


class _Combined(VisionTransformer):
    """A classifier that combines its blocks in another way."""

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> logits (B, classes)."""
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self._pool(self._through(x, list(self.blocks))))
        return logits

    def _through(self, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        raise NotImplementedError


class _Backwards(_Combined):
    def _through(self, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        for block in (*blocks[-2::-1], blocks[-1]):
            x = block(x)
        return x


class _OneTwice(_Combined):
    def _through(self, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        for block in (blocks[0], *blocks):
            x = block(x)
        return x


class _SumOfAll(_Combined):
    def _through(self, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        total = x
        for block in blocks:
            x = block(x)
            total = total + x
        return total


class _Indexed(_Combined):
    def _through(self, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        for index in range(_DEPTH):
            x = self.blocks[index](x)
        return x


class _DividedByDepth(VisionTransformer):
    """How many blocks were traced decides its logits."""

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> logits (B, classes)."""
        return super().forward(image) / len(self.blocks)


def _nodes(model: ir.Model) -> list[tuple[object, ...]]:
    return [
        (
            node.name,
            node.op_type,
            [value and _content(value) for value in node.inputs],
            [(value.name, str(value.type), str(value.shape)) for value in node.outputs],
            str(node.attributes),
        )
        for node in model.graph
    ]


def _content(value: ir.Value) -> object:
    return value.name if value.const_value is None else value.const_value.numpy().tolist()


def _text_tower() -> TextTower:
    tower = TextTower(TextGeometry(BlockConfig(32, 2, 64, 1e-5, "quick"), _DEPTH, 8))
    return _random(tower)


def _text_passport(make_passport: Callable[..., Passport]) -> Passport:
    passport = make_passport(_vit())
    ids = TensorSpec("ids", "int32", ("batch", CONTEXT))
    return replace(passport, input=ids, output=TensorSpec("embedding", "float32", ("batch", 8)))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_graph_is_that_of_a_whole_trace(
    tower: str, make_passport: Callable[..., Passport], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _vit() if tower == "image" else _text_tower()
    passport = make_passport(module) if tower == "image" else _text_passport(make_passport)
    repeated = trace(module, passport, ExportConfig())
    monkeypatch.setattr(exporter, "runs_of", lambda _: ())
    whole = trace(module, passport, ExportConfig())
    assert _nodes(repeated) == _nodes(whole)
    assert len(repeated.graph.initializers) == len(whole.graph.initializers)


def test_two_of_the_equal_blocks_and_the_last_one_are_traced() -> None:
    module = _vit()
    assert runs_of(module) == (_RUN,)
    short = shortened(module, (_RUN,))
    blocks = dict(short.blocks.named_children())
    assert list(blocks) == ["0", "1", str(_DEPTH - 1)]
    assert blocks[str(_DEPTH - 1)] is module.blocks[-1]
    assert not torch.equal(blocks["0"].mlp.fc1.weight, module.blocks[0].mlp.fc1.weight)
    # The module itself is as it was.
    assert len(module.blocks) == _DEPTH


def _other_epsilon(block: nn.Module) -> None:
    block.norm2.eps = 1e-6


def _other_gelu(block: nn.Module) -> None:
    block.mlp.gelu = torch.tanh


def _wider(block: nn.Module) -> None:
    block.mlp.fc1, block.mlp.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)


def _with_a_buffer(block: nn.Module) -> None:
    block.register_buffer("shift", torch.zeros(1))


def _in_training(block: nn.Module) -> None:
    block.train()


@pytest.mark.parametrize(
    "change", [_other_epsilon, _other_gelu, _wider, _with_a_buffer, _in_training]
)
def test_a_block_that_computes_something_else_is_traced(
    change: Callable[[nn.Module], None],
) -> None:
    module = _vit()
    change(module.blocks[2])
    assert runs_of(module) == ()


@pytest.mark.parametrize("kind", [_Backwards, _OneTwice, _SumOfAll])
def test_blocks_in_another_order_are_not_repeated(
    kind: type[VisionTransformer], make_passport: Callable[..., Passport]
) -> None:
    module = _vit(kind)
    short = shortened(module, (_RUN,))
    model = trace_whole(short, make_passport(module))
    with pytest.raises(UnrepeatableError):
        repeat_blocks(model, short, module, (_RUN,))


def test_what_cannot_be_repeated_is_traced_whole(
    make_passport: Callable[..., Passport], tiny_samples: Samples, tmp_path: Path
) -> None:
    module = _vit(_Indexed)
    path = tmp_path / "x.onnx"
    # Its logits are compared with PyTorch's.
    export_graph(module, path, make_passport(module), tiny_samples)
    blocks = {block_of(node.name or "") for node in load_graph(path).graph}
    assert {f"blocks.{index}" for index in range(_DEPTH)} <= blocks


def test_a_trace_that_depends_on_the_number_of_blocks_is_refused(
    make_passport: Callable[..., Passport], tiny_samples: Samples, tmp_path: Path
) -> None:
    module = _vit(_DividedByDepth)
    with pytest.raises(GraphError, match="the graph's logits differ from PyTorch's"):
        export_graph(module, tmp_path / "x.onnx", make_passport(module), tiny_samples)


def test_weights_of_another_block_are_noticed(
    make_passport: Callable[..., Passport],
    tiny_samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exchanged(model: ir.Model, short: nn.Module, module: nn.Module, runs: tuple[Run]) -> None:
        other = copy.deepcopy(module)
        other.blocks[2], other.blocks[3] = module.blocks[3], module.blocks[2]
        repeat_blocks(model, short, other, runs)

    module = _vit()
    monkeypatch.setattr(exporter, "repeat_blocks", exchanged)
    with pytest.raises(GraphError, match="the graph's logits differ from PyTorch's"):
        export_graph(module, tmp_path / "x.onnx", make_passport(module), tiny_samples)
