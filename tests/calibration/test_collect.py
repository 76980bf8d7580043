from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration.collect import ActivationCollector, CalibrationImage, collect
from calibration.table import CalibrationTable, pack, save_table
from clipdeploy import zoo
from clipdeploy.model import LoadedModel
from clipdeploy.workspace import Workspace
from exporters.errors import ArtifactError, CalibrationError, FileError, GraphError
from exporters.files import sha256_file
from exporters.graphs import read_passport


@pytest.fixture(scope="module")
def graph(demo_workspace: Workspace) -> Path:
    return demo_workspace.graph(zoo.DEMO, "fp32")


@pytest.fixture(scope="module")
def images(demo_images: NDArray[np.float32]) -> list[CalibrationImage]:
    return [
        CalibrationImage(f"{i:02}.png", hashlib.sha256(pixels.tobytes()).hexdigest(), pixels[None])
        for i, pixels in enumerate(demo_images)
    ]


@pytest.fixture(scope="module")
def table(graph: Path, images: list[CalibrationImage]) -> CalibrationTable:
    return collect(graph, images, len(images))


@pytest.fixture(scope="module")
def inputs(
    demo_model: LoadedModel, demo_images: NDArray[np.float32]
) -> dict[str, NDArray[np.float32]]:
    """What each Linear reads in PyTorch, (images, tokens, channels)."""
    seen: dict[str, list[NDArray[np.float32]]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(args[0].numpy().copy())

        return remember

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in demo_model.module.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]
    try:
        for pixels in demo_images:
            demo_model.module(torch.from_numpy(pixels[None]))
    finally:
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(arrays) for name, arrays in seen.items()}


def test_table_names_every_linear_and_its_origin(
    table: CalibrationTable, graph: Path, images: list[CalibrationImage]
) -> None:
    passport = read_passport(graph)
    assert list(table.statistics) == [
        f"blocks.{block}.{role}"
        for block in range(6)
        for role in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert table.model == zoo.DEMO
    assert table.weights == passport.weights.identity
    assert table.source_graph == sha256_file(graph)
    assert table.preprocess == passport.preprocess
    assert [(r.name, r.sha256) for r in table.images] == [(i.name, i.sha256) for i in images]


def test_extremes_are_pytorchs(
    table: CalibrationTable, inputs: dict[str, NDArray[np.float32]]
) -> None:
    assert set(inputs) == set(table.statistics)
    for name, activations in inputs.items():
        found = table.of(name)
        # Two runtimes' float32 rounding over six blocks, on activations up to 20: measured 3e-6.
        for extreme, expected in (
            (found.minimum, activations.min(axis=(0, 1))),
            (found.maximum, activations.max(axis=(0, 1))),
        ):
            np.testing.assert_allclose(extreme, expected, rtol=0, atol=3e-5, err_msg=name)


def test_rows_are_the_class_token_and_eight_more(
    table: CalibrationTable, inputs: dict[str, NDArray[np.float32]]
) -> None:
    for name, activations in inputs.items():
        found = table.of(name)
        count, tokens, channels = activations.shape
        assert found.rows == count * min(9, tokens)
        assert found.counts.shape == (channels, 256)
        assert (found.counts.sum(axis=1) == found.rows).all()
    # After the last attention only the class token is left.
    assert inputs["blocks.5.mlp.fc1"].shape[1] == 1
    assert inputs["blocks.5.attn.qkv"].shape[1] == 65


def test_class_token_statistics_are_pytorchs(
    table: CalibrationTable, inputs: dict[str, NDArray[np.float32]]
) -> None:
    # Where one token is left, nothing is drawn: the mean over the rows is that of all of them.
    for role in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        name = f"blocks.5.{role}"
        expected = inputs[name].astype(np.float64).mean(axis=(0, 1))
        # Rounding as for the extremes.
        np.testing.assert_allclose(table.of(name).mean, expected, rtol=0, atol=3e-5)


def test_sampled_tokens_lie_within_the_extremes(table: CalibrationTable) -> None:
    for name in table.statistics:
        found = table.of(name)
        assert (found.mean <= found.maximum).all()
        assert (found.mean >= found.minimum).all()
        assert (found.minimum <= found.maximum).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_the_images_does_not_matter(
    table: CalibrationTable,
    graph: Path,
    images: list[CalibrationImage],
    seed: int,
    tmp_path: Path,
) -> None:
    order = np.random.default_rng(seed).permutation(len(images))
    other = collect(graph, [images[i] for i in order], len(images))
    assert other == table
    save_table(table, tmp_path / "a.json")
    save_table(other, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_shards_merge_to_the_whole(
    table: CalibrationTable, graph: Path, images: list[CalibrationImage]
) -> None:
    parts = []
    for shard in (images[:3], images[3:]):
        collector = ActivationCollector(graph)
        for image in shard:
            collector.add(image)
        parts.append(collector.statistics())
    for name, packed in table.statistics.items():
        assert pack(parts[0][name].merge(parts[1][name])) == packed


def test_one_image_less_is_another_table(
    table: CalibrationTable, graph: Path, images: list[CalibrationImage]
) -> None:
    other = collect(graph, images[:-1], len(images) - 1)
    assert other.statistics != table.statistics
    assert len(other.images) == len(table.images) - 1


@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 13, 6), (2, 31, 31)])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_not_finite_is_refused_with_tensor_and_image(
    graph: Path, images: list[CalibrationImage], pixel: tuple[int, int, int], poison: float
) -> None:
    pixels = images[1].input.copy()
    pixels[(0, *pixel)] = poison
    bad = CalibrationImage("folder/bad.png", images[1].sha256, pixels)
    with pytest.raises(
        CalibrationError, match=r"^blocks\.\d\.\S+ is NaN or infinite on folder/bad\.png"
    ):
        collect(graph, [images[0], bad], 2)


def test_no_image_is_refused(graph: Path) -> None:
    with pytest.raises(CalibrationError, match="no image to calibrate with"):
        collect(graph, [], 0)


def test_image_of_another_size_is_refused(graph: Path) -> None:
    small = CalibrationImage("small.png", "ab" * 32, np.zeros((1, 3, 16, 16), np.float32))
    with pytest.raises(GraphError, match="cannot run"):
        collect(graph, [small], 1)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_graph_that_is_not_fp32_is_refused(
    demo_workspace: Workspace, images: list[CalibrationImage], precision: str
) -> None:
    with pytest.raises(GraphError):
        collect(demo_workspace.graph(zoo.DEMO, precision), images, len(images))


def test_damaged_and_missing_graphs_are_refused(
    graph: Path, images: list[CalibrationImage], tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=r"absent\.onnx"):
        collect(tmp_path / "absent.onnx", images, len(images))
    (tmp_path / "cut.onnx").write_bytes(graph.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match=r"cut\.onnx is no readable ONNX graph"):
        collect(tmp_path / "cut.onnx", images, len(images))
