from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from clipdeploy.core.errors import GraphError
from clipdeploy.core.passport import Passport, TensorSpec
from clipdeploy.models import vit
from clipdeploy.models.vit import VisionTransformer
from exporters.checks import PARITY_TOLERANCE, check_parity, check_structure, parity_bound
from exporters.graphs import load_graph, write_model
from exporters.headers import read_passport
from exporters.initializers import write_initializer

Logits = dict[int, NDArray[np.float32]]


def test_parity_holds_at_every_batch(
    tiny_graph: Path, tiny_images: NDArray[np.float32], tiny_logits: Logits
) -> None:
    worst = check_parity(tiny_graph, tiny_images, tiny_logits)
    # float32 rounding on logits of about 1 costs a few 1e-6 in both runtimes.
    assert 0 <= worst < 1e-5


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("sign", [-1, 1])
def test_one_wrong_logit_at_one_batch_is_refused(
    tiny_graph: Path,
    tiny_images: NDArray[np.float32],
    tiny_logits: Logits,
    count: int,
    sign: int,
) -> None:
    wrong = {n: logits.copy() for n, logits in tiny_logits.items()}
    # Twice the bound: clear of it by more than both runtimes' rounding.
    bound = parity_bound(tiny_logits.values())
    wrong[count][-1, 3] += sign * 2 * bound
    with pytest.raises(GraphError, match=r"differ from PyTorch's by 2.[89].e-04, more than 1.4"):
        check_parity(tiny_graph, tiny_images, wrong)


def _tanh_gelu(module: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    for block in module.blocks:
        mlp = block.mlp
        assert isinstance(mlp, vit.Mlp)
        mlp.forward = lambda x, m=mlp: m.fc2(F.gelu(m.fc1(x), approximate="tanh"))
    return module(images)


def _swapped_positions(module: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    module.position.data = module.position[:, [0, 2, 1, *range(3, module.config.tokens)]]
    return module(images)


def _head_bias(module: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    module.head.bias.data[3] += 1e-3
    return module(images)


def _class_token_lost(module: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    module.position.data[:, 0] = 0
    return module(images)


@pytest.mark.parametrize("defect", [_tanh_gelu, _swapped_positions, _head_bias, _class_token_lost])
def test_another_model_is_refused(
    defect: Callable[[VisionTransformer, torch.Tensor], torch.Tensor],
    make_vit: Callable[..., VisionTransformer],
    tiny_graph: Path,
    tiny_images: NDArray[np.float32],
) -> None:
    logits = defect(make_vit(), torch.from_numpy(tiny_images)).numpy()
    with pytest.raises(GraphError, match="differ from PyTorch's"):
        check_parity(tiny_graph, tiny_images, {7: logits})


def _head_times(factor: float, path: Path, target: Path) -> Path:
    model = load_graph(path)
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    for index in (1, 2):
        value = gemm.inputs[index]
        assert value is not None
        assert value.const_value is not None
        write_initializer(gemm, index, np.float32(factor) * value.const_value.numpy())
    write_model(model, target)
    return target


# The largest logits are 85 and 0.04, and 4 million.
@pytest.mark.parametrize("factor", [1.0, 20.0, 0.01, 1e6])
@pytest.mark.parametrize("defect", [None, _tanh_gelu, _head_bias])
def test_the_bound_grows_with_the_logits(
    factor: float,
    defect: Callable[[VisionTransformer, torch.Tensor], torch.Tensor] | None,
    make_vit: Callable[..., VisionTransformer],
    tiny_graph: Path,
    tiny_images: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    graph = _head_times(factor, tiny_graph, tmp_path / "scaled.onnx")
    module, images = make_vit(), torch.from_numpy(tiny_images)
    logits = (module if defect is None else partial(defect, module))(images)
    reference = {7: (factor * logits).numpy()}
    if defect is None:
        # float32 rounding alone is a hundred times less than what is refused.
        assert check_parity(graph, tiny_images, reference) < 0.03 * parity_bound(reference.values())
        return
    with pytest.raises(GraphError, match="differ from PyTorch's"):
        check_parity(graph, tiny_images, reference)


def test_what_logits_have_in_common_is_no_spread() -> None:
    logits = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    bound = parity_bound([logits])
    assert bound == pytest.approx(PARITY_TOLERANCE * logits.std(), rel=0.1)
    # Rounding at 10 is 1e-6; a bound by the largest logit would be ten times as wide.
    assert parity_bound([logits - 10]) < 1.2 * bound
    assert parity_bound([logits[:, :1]]) == pytest.approx(
        PARITY_TOLERANCE * np.sqrt((logits[:, 0] ** 2).mean()), rel=0.1
    )
    assert parity_bound([np.zeros((3, 5), np.float32)]) == 0


def test_other_shape_is_refused(tiny_graph: Path, tiny_images: NDArray[np.float32]) -> None:
    with pytest.raises(
        GraphError, match=r"at batch 2 the graph returns shape \(2, 5\), PyTorch \(2, 6\)"
    ):
        check_parity(tiny_graph, tiny_images, {2: np.zeros((2, 6), np.float32)})


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(
    tiny_graph: Path, tiny_images: NDArray[np.float32], tiny_logits: Logits, poison: float
) -> None:
    images = tiny_images.copy()
    images[1, 0, 0, 0] = poison
    with pytest.raises(GraphError, match="at batch 2 the graph's logits are not finite"):
        check_parity(tiny_graph, images, {2: tiny_logits[2]})


def test_reference_of_nan_is_refused(
    tiny_graph: Path, tiny_images: NDArray[np.float32], tiny_logits: Logits
) -> None:
    with pytest.raises(GraphError):
        check_parity(tiny_graph, tiny_images, {2: np.full_like(tiny_logits[2], np.nan)})


def test_structure_of_an_exported_graph_is_accepted(tiny_graph: Path) -> None:
    check_structure(load_graph(tiny_graph), read_passport(tiny_graph))


@pytest.mark.parametrize(
    ("role", "change"),
    [
        ("input", {"shape": (2, 3, 16, 16)}),
        ("input", {"shape": ("batch", 3, 32, 32)}),
        ("input", {"name": "pixels"}),
        ("input", {"dtype": "float16"}),
        ("output", {"shape": ("batch", 1000)}),
        ("output", {"name": "scores"}),
        ("output", {"dtype": "float64"}),
    ],
)
def test_broken_promise_is_refused(tiny_graph: Path, role: str, change: dict[str, object]) -> None:
    passport = read_passport(tiny_graph)
    spec: TensorSpec = getattr(passport, role)
    broken: Passport = replace(passport, **{role: replace(spec, **change)})
    with pytest.raises(GraphError, match=f"the graph of tiny has {role} .*its passport has"):
        check_structure(load_graph(tiny_graph), broken)


def _unknown_operator(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "Gelu").op_type = "Gelux"


def _missing_weight(model: ir.Model) -> None:
    del model.graph.initializers["head.weight"]


def _old_opset(model: ir.Model) -> None:
    # Gelu came with opset 20.
    model.graph.opset_imports[""] = 19


def _wrong_width(model: ir.Model) -> None:
    weight = model.graph.initializers["blocks.1.mlp.fc1.weight"]
    weight.const_value = ir.Tensor(np.zeros((31, 128), np.float32), name=weight.name)
    weight.shape = ir.Shape((31, 128))


def _wrong_type(model: ir.Model) -> None:
    weight = model.graph.initializers["head.weight"]
    weight.const_value = ir.Tensor(np.zeros((5, 32), np.float16), name=weight.name)
    weight.type = ir.TensorType(ir.DataType.FLOAT16)


@pytest.mark.parametrize(
    "spoil", [_unknown_operator, _missing_weight, _old_opset, _wrong_width, _wrong_type]
)
def test_invalid_graph_is_refused(tiny_graph: Path, spoil: Callable[[ir.Model], None]) -> None:
    model = load_graph(tiny_graph)
    spoil(model)
    with pytest.raises(GraphError, match="the graph of tiny is not valid ONNX: "):
        check_structure(model, read_passport(tiny_graph))
