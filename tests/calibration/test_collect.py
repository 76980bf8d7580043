from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration.collect import (
    COUNTED_TOKENS,
    ActivationCollector,
    CalibrationImage,
    CollectConfig,
    collect,
)
from calibration.observers import BINS
from calibration.policy import HEAD, find_linears, observed_tensors, qkv_output
from calibration.table import (
    CalibrationImageRecord,
    CalibrationTable,
    load_table,
    merge_tables,
    pack,
    save_table,
)
from clipdeploy.core.errors import ArtifactError, CalibrationError, FileError, GraphError
from clipdeploy.core.files import sha256_file
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.headers import read_passport

Images = list[CalibrationImage]
Done = frozenset[CalibrationImageRecord]


class KilledError(Exception):
    """Raised to end a run early."""


def _records(images: Images) -> tuple[CalibrationImageRecord, ...]:
    """The records of images, without decoding."""
    return tuple(CalibrationImageRecord(image.name, image.sha256) for image in images)


def _source(
    images: Images, kill_after: int | None = None, log: list[int] | None = None
) -> Callable[[Done], Iterable[CalibrationImage]]:
    """The image source of ``collect``; appends the number of finished images to ``log``."""

    def left(done: Done) -> Iterator[CalibrationImage]:
        if log is not None:
            log.append(len(done))
        rest = [image for image in images if _records([image])[0] not in done]
        for index, image in enumerate(rest):
            if index == kill_after:
                raise KilledError
            yield image

    return left


def _collect(
    graph: Path, images: Images, config: CollectConfig = CollectConfig()
) -> CalibrationTable:
    return collect(graph, _source(images), _records(images), config)


def _file(table: CalibrationTable, path: Path) -> bytes:
    save_table(table, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def graph(source: Path) -> Path:
    return source


@pytest.fixture(scope="module")
def many(held_out: tuple[NDArray[np.float32], NDArray[np.int64]]) -> Images:
    """35 images: the observers count once, and some rows remain."""
    return [
        CalibrationImage(
            f"{i:02}.png",
            hashlib.sha256(pixels.tobytes()).hexdigest(),
            pixels[None],
            hashlib.md5(pixels.tobytes()).hexdigest(),
            bytes([i]) * 64,
        )
        for i, pixels in enumerate(held_out[0][:35])
    ]


@pytest.fixture(scope="module")
def images(many: Images) -> Images:
    return many[:16]


@pytest.fixture(scope="module")
def table(graph: Path, images: Images) -> CalibrationTable:
    return _collect(graph, images)


@pytest.fixture(scope="module")
def whole(graph: Path, many: Images) -> CalibrationTable:
    return _collect(graph, many)


@pytest.fixture(scope="module")
def inputs(demo_model: LoadedModel, images: Images, graph: Path) -> dict[str, NDArray[np.float32]]:
    """The observed tensors computed by PyTorch, (images, tokens, channels)."""
    seen: dict[str, list[NDArray[np.float32]]] = {}

    def keep(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value.reshape(1, -1, value.shape[-1]).numpy().copy())

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: keep(name, args[0])

    handles = [
        module.register_forward_pre_hook(before(name))
        for name, module in demo_model.module.named_modules()
        if isinstance(module, nn.Linear) and (name.startswith("blocks.") or name == HEAD)
    ]
    try:
        with torch.inference_mode():
            for image in images:
                demo_model.module(torch.from_numpy(image.input))
    finally:
        for handle in handles:
            handle.remove()
    # The export folds attention's scale into q, so the graph's weights are used.
    for site in find_linears(load_graph(graph)):
        if site.role == "attn.qkv":
            weight, bias = site.weight.const_value.numpy(), site.bias.const_value.numpy()
            seen[qkv_output(site.name)] = [x @ weight + bias for x in seen[site.name]]
    return {name: np.concatenate(arrays) for name, arrays in seen.items()}


def test_table_names_every_tensor_and_its_origin(
    table: CalibrationTable, graph: Path, images: Images
) -> None:
    passport = read_passport(graph)
    assert set(table.statistics) == {name for name, _ in observed_tensors(load_graph(graph))}
    assert len(table.statistics) == 24 + 6 + 1
    assert table.model == cards.DEMO
    assert table.weights == passport.weights.identity
    assert table.source_graph == sha256_file(graph)
    assert table.preprocess == passport.preprocess
    assert table.images == _records(images)
    assert table.shard is None


def test_extremes_are_pytorchs_on_the_sampled_tokens(
    table: CalibrationTable, inputs: dict[str, NDArray[np.float32]]
) -> None:
    assert set(inputs) == set(table.statistics)
    for name, activations in inputs.items():
        found = table.of(name)
        everything = activations.min(axis=(0, 1)), activations.max(axis=(0, 1))
        token = activations[:, 0].min(axis=0), activations[:, 0].max(axis=0)
        # Two runtimes' float32 rounding over six blocks, on activations up to 20: measured 3e-6.
        slack = 3e-5
        assert (found.minimum >= everything[0] - slack).all(), name
        assert (found.maximum <= everything[1] + slack).all(), name
        # The class token is always sampled.
        assert (found.minimum <= token[0] + slack).all(), name
        assert (found.maximum >= token[1] - slack).all(), name
        if activations.shape[1] == 1:
            np.testing.assert_allclose(found.minimum, everything[0], rtol=0, atol=slack)
            np.testing.assert_allclose(found.maximum, everything[1], rtol=0, atol=slack)


def test_half_of_the_tokens_see_nearly_the_whole_range(
    table: CalibrationTable, inputs: dict[str, NDArray[np.float32]]
) -> None:
    for name, activations in inputs.items():
        if "/" in name:
            continue
        # 33 of 65 tokens of 16 images: the largest value of a tensor may be missed by a few.
        assert table.of(name).amax.max() > 0.75 * np.abs(activations).max(), name


def test_rows_are_the_class_token_and_four_more(
    table: CalibrationTable, inputs: dict[str, NDArray[np.float32]]
) -> None:
    for name, activations in inputs.items():
        found = table.of(name)
        count, tokens, channels = activations.shape
        assert found.rows == count * min(COUNTED_TOKENS, tokens), name
        assert found.counts.shape == (channels, 2, BINS)
        assert (found.counts.sum(axis=(1, 2)) == found.rows).all()
    # After the last attention only the class token remains.
    assert inputs["blocks.5.mlp.fc1"].shape[1] == 1
    assert inputs["blocks.5.attn.qkv"].shape[1] == 65


def test_class_token_statistics_are_pytorchs(
    table: CalibrationTable, inputs: dict[str, NDArray[np.float32]]
) -> None:
    # With one token nothing is sampled: the mean over the rows is the exact mean.
    for name in (*(f"blocks.5.{role}" for role in ("attn.proj", "mlp.fc1", "mlp.fc2")), HEAD):
        expected = inputs[name].astype(np.float64).mean(axis=(0, 1))
        # Rounding as for the extremes.
        np.testing.assert_allclose(table.of(name).mean, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("seed", [0])
def test_order_of_the_images_does_not_matter(
    whole: CalibrationTable, graph: Path, many: Images, seed: int, tmp_path: Path
) -> None:
    order = np.random.default_rng(seed).permutation(len(many))
    other = collect(graph, _source([many[i] for i in order]), _records(many))
    assert other == whole
    assert _file(other, tmp_path / "a.json") == _file(whole, tmp_path / "b.json")


def test_one_image_less_is_another_table(
    table: CalibrationTable, graph: Path, images: Images
) -> None:
    other = _collect(graph, images[:-1])
    assert other.statistics != table.statistics
    assert len(other.images) == len(table.images) - 1


def _kill(graph: Path, images: Images, partial: Path, after: int) -> None:
    config = CollectConfig(partial=partial, every=0.0)
    with pytest.raises(KilledError):
        collect(graph, _source(images, kill_after=after), _records(images), config)


@pytest.mark.parametrize("kills", [(1,), (33,), (3, 1, 4)])
def test_killed_and_resumed_is_the_unbroken_run(
    whole: CalibrationTable, graph: Path, many: Images, kills: tuple[int, ...], tmp_path: Path
) -> None:
    partial = tmp_path / "calibration.partial"
    for number, after in enumerate(kills):
        _kill(graph, many, partial, after)
        assert len(load_table(partial).images) == sum(kills[: number + 1])
    log: list[int] = []
    config = CollectConfig(partial=partial)
    found = collect(graph, _source(many, log=log), _records(many), config)
    assert log == [sum(kills)]
    assert found == whole
    assert _file(found, tmp_path / "a.json") == _file(whole, tmp_path / "b.json")
    assert [astuple(image) for image in found.images] == [astuple(image.record) for image in many]
    assert all(image.decoded for image in found.images)


@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_in_random_order_is_the_unbroken_run(
    whole: CalibrationTable, graph: Path, many: Images, seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    partial, left = tmp_path / "calibration.partial", len(many)
    for _ in range(3):
        after = int(rng.integers(1, 9))
        _kill(graph, [many[i] for i in rng.permutation(len(many))], partial, after)
        left -= after
    log: list[int] = []
    config = CollectConfig(partial=partial)
    found = collect(graph, _source(many, log=log), _records(many), config)
    assert log == [len(many) - left]
    assert _file(found, tmp_path / "a.json") == _file(whole, tmp_path / "b.json")


def test_images_since_the_last_save_are_looked_at_again(
    table: CalibrationTable, graph: Path, images: Images, tmp_path: Path
) -> None:
    partial = tmp_path / "calibration.partial"
    _kill(graph, images, partial, 5)
    # No second save within an hour.
    config = CollectConfig(partial=partial, every=3600.0)
    with pytest.raises(KilledError):
        collect(graph, _source(images, kill_after=6), _records(images), config)
    log: list[int] = []
    found = collect(graph, _source(images, log=log), _records(images), CollectConfig(partial))
    assert log == [5]
    assert found == table


def test_image_given_twice_is_seen(graph: Path, images: Images, table: CalibrationTable) -> None:
    # A source that repeats finished images would count them twice and change the result.
    other = collect(graph, _source([*images, images[0]]), _records(images))
    assert other.statistics != table.statistics


def _log_of_start(
    graph: Path, images: Images, config: CollectConfig
) -> tuple[list[int], CalibrationTable]:
    log: list[int] = []
    return log, collect(graph, _source(images, log=log), _records(images), config)


def test_partial_of_other_images_is_not_used(
    table: CalibrationTable, graph: Path, many: Images, images: Images, tmp_path: Path
) -> None:
    partial = tmp_path / "calibration.partial"
    _kill(graph, many[8:24], partial, 10)
    log, found = _log_of_start(graph, images, CollectConfig(partial))
    assert log == [0]
    assert found == table


def test_partial_of_a_changed_image_is_not_used(
    table: CalibrationTable, graph: Path, images: Images, tmp_path: Path
) -> None:
    partial = tmp_path / "calibration.partial"
    _kill(graph, [replace(images[0], sha256="ab" * 32), *images[1:]], partial, 4)
    log, found = _log_of_start(graph, images, CollectConfig(partial))
    assert log == [0]
    assert found == table


@pytest.mark.parametrize(
    "change",
    [{"source_graph": "cd" * 32}, {"weights": "random:3"}, {"model": "other"}, {"shard": (1, 2)}],
)
def test_partial_of_another_graph_is_not_used(
    table: CalibrationTable,
    graph: Path,
    images: Images,
    change: dict[str, object],
    tmp_path: Path,
) -> None:
    partial = tmp_path / "calibration.partial"
    _kill(graph, images, partial, 4)
    assert _log_of_start(graph, images, CollectConfig(partial))[0] == [4]
    save_table(replace(load_table(partial), **change), partial)  # type: ignore[arg-type]
    log, found = _log_of_start(graph, images, CollectConfig(partial))
    assert log == [0]
    assert found == table


def test_damaged_partial_is_not_used(
    table: CalibrationTable, graph: Path, images: Images, tmp_path: Path
) -> None:
    partial = tmp_path / "calibration.partial"
    _kill(graph, images, partial, 4)
    partial.write_bytes(partial.read_bytes()[:-200])
    log, found = _log_of_start(graph, images, CollectConfig(partial))
    assert log == [0]
    assert found == table


@pytest.mark.parametrize("count", [2, 3])
def test_shards_merged_are_one_run_byte_for_byte(
    whole: CalibrationTable, graph: Path, many: Images, count: int, tmp_path: Path
) -> None:
    parts = []
    for number in range(1, count + 1):
        config = CollectConfig(shard=(number, count))
        path = tmp_path / f"{number}.json"
        save_table(_collect(graph, many[number - 1 :: count], config), path)
        parts.append(load_table(path))
    expected = _file(whole, tmp_path / "whole.json")
    assert _file(merge_tables(parts), tmp_path / "merged.json") == expected
    assert _file(merge_tables(parts[::-1]), tmp_path / "merged.json") == expected
    with pytest.raises(CalibrationError, match="each once"):
        merge_tables(parts[1:])
    with pytest.raises(CalibrationError, match="each once"):
        merge_tables([*parts, parts[0]])
    with pytest.raises(CalibrationError, match="share images"):
        merge_tables([replace(parts[0], shard=(n, count)) for n in range(1, count + 1)])


def test_killed_shard_goes_on(
    whole: CalibrationTable, graph: Path, many: Images, tmp_path: Path
) -> None:
    partial = tmp_path / "one.partial"
    config = CollectConfig(partial=partial, every=0.0, shard=(1, 2))
    first = many[0::2]
    with pytest.raises(KilledError):
        collect(graph, _source(first, kill_after=10), _records(first), config)
    log, one = _log_of_start(graph, first, config)
    assert log == [10]
    two = _collect(graph, many[1::2], CollectConfig(shard=(2, 2)))
    assert merge_tables([one, two]) == whole


def test_collectors_statistics_merge_to_the_whole(
    table: CalibrationTable, graph: Path, images: Images
) -> None:
    parts = []
    for shard in (images[:3], images[3:]):
        collector = ActivationCollector(graph)
        for image in shard:
            collector.add(image)
        parts.append(collector.statistics())
    for name, packed in table.statistics.items():
        assert pack(parts[0][name].merge(parts[1][name])) == packed


def test_resuming_from_a_table_that_lacks_a_tensor_is_refused(
    graph: Path, table: CalibrationTable
) -> None:
    statistics = dict(table.statistics)
    del statistics["blocks.2.mlp.fc1"]
    with pytest.raises(CalibrationError, match=r"has no statistics of blocks\.2\.mlp\.fc1"):
        ActivationCollector(graph).resume(replace(table, statistics=statistics))


@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 13, 6), (2, 31, 31)])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_not_finite_is_refused_with_tensor_and_image(
    graph: Path, images: Images, pixel: tuple[int, int, int], poison: float
) -> None:
    pixels = images[1].input.copy()
    pixels[(0, *pixel)] = poison
    bad = CalibrationImage("folder/bad.png", images[1].sha256, pixels)
    with pytest.raises(CalibrationError, match=r"^\S+ is NaN or infinite on folder/bad\.png"):
        _collect(graph, [images[0], bad])


def test_no_image_is_refused(graph: Path) -> None:
    with pytest.raises(CalibrationError, match="no images to calibrate with"):
        _collect(graph, [])


def test_image_of_another_size_is_refused(graph: Path) -> None:
    small = CalibrationImage("small.png", "ab" * 32, np.zeros((1, 3, 16, 16), np.float32))
    with pytest.raises(GraphError, match="cannot run"):
        _collect(graph, [small])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_graph_that_is_not_fp32_is_refused(
    demo_workspace: Workspace, images: Images, precision: str
) -> None:
    with pytest.raises(GraphError):
        _collect(demo_workspace.graph(cards.DEMO, precision), images)


def test_damaged_and_missing_graphs_are_refused(
    graph: Path, images: Images, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=r"absent\.onnx"):
        _collect(tmp_path / "absent.onnx", images)
    (tmp_path / "cut.onnx").write_bytes(graph.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match=r"cut\.onnx is not a readable ONNX graph"):
        _collect(tmp_path / "cut.onnx", images)
