from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.probing import Recognition, probe, shuffled_cells
from calibration.table import CalibrationCrop, CalibrationTable
from exporters.graphs import load_graph, save_graph
from exporters.headers import read_passport
from exporters.initializers import values_of, write_initializer

Pixels = NDArray[np.uint8]


def _probed(
    source: Path, table: CalibrationTable, crops: Pixels, *, trained: bool = True
) -> dict[str, str]:
    passport = read_passport(source)
    stored = tuple(
        CalibrationCrop.of(f"{i}.png", f"{i:064x}", each) for i, each in enumerate(crops)
    )
    table = replace(table, crops=stored)
    found = probe(source, passport, table, trained=trained)
    return {finding.kind: finding.sentence for finding in found}


@pytest.fixture(scope="module")
def digits(demo_table: CalibrationTable) -> Pixels:
    stored = demo_table.stored()
    assert stored is not None
    return stored.crops


def test_the_demos_digits_have_no_findings(
    source: Path, demo_table: CalibrationTable, digits: Pixels
) -> None:
    assert demo_table.findings == ()
    assert len(digits) == 40
    assert _probed(source, demo_table, digits) == {}
    assert _probed(source, demo_table, digits[:1]) == {}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda x: 255 - x, {"negatives"}),
        (lambda x: np.rot90(x, axes=(1, 2)), {"unlike"}),
        (lambda x: x // 8, {"unlike", "classes"}),
        (shuffled_cells, {"unlike"}),
        (lambda x: np.random.default_rng(0).integers(0, 256, x.shape, np.uint8), {"unlike"}),
    ],
    ids=["negatives", "turned", "dim", "shuffled", "noise"],
)
def test_images_that_the_model_does_not_recognise(
    source: Path,
    demo_table: CalibrationTable,
    digits: Pixels,
    change: Callable[[Pixels], Pixels],
    kinds: set[str],
) -> None:
    changed = np.ascontiguousarray(change(digits))
    assert kinds <= set(_probed(source, demo_table, changed)) <= kinds | {"classes", "still"}


def test_images_of_one_class(source: Path, demo_table: CalibrationTable, digits: Pixels) -> None:
    names = [crop.name for crop in demo_table.crops]
    same = np.asarray([name.startswith("3/") for name in names])
    threes = digits[same].repeat(16, axis=0)[:16]
    found = _probed(source, demo_table, threes)
    assert "gives 16 of the images the same class" in found["classes"]


def test_the_same_image_again_and_again(
    source: Path, demo_table: CalibrationTable, digits: Pixels
) -> None:
    found = _probed(source, demo_table, digits[:1].repeat(16, axis=0))
    assert "hardly varies over 16 images" in found["still"]
    assert "/output" not in found["still"]


def test_random_weights_recognise_nothing(
    source: Path, demo_table: CalibrationTable, digits: Pixels
) -> None:
    assert _probed(source, demo_table, 255 - digits, trained=False) == {}


def test_a_linear_whose_input_hardly_varies_is_named(
    source: Path, demo_table: CalibrationTable, digits: Pixels, tmp_path: Path
) -> None:
    model = load_graph(source)
    norm = next(node for node in model.graph if node.name == "blocks.2.norm2/LayerNormalization")
    scale, shift = values_of(norm.inputs[1]), values_of(norm.inputs[2])
    write_initializer(norm, 1, scale * np.float32(0.01))
    write_initializer(norm, 2, shift + np.float32(1))
    path = save_graph(model, tmp_path / "still.onnx", read_passport(source)).path
    found = _probed(path, demo_table, digits, trained=False)
    assert found.keys() == {"still"}
    assert "the input of blocks.2.mlp.fc1" in found["still"]


def test_shuffling_keeps_the_cells() -> None:
    crops = np.random.default_rng(0).integers(0, 256, (3, 35, 35, 3), np.uint8)
    changed = shuffled_cells(crops)
    assert changed.shape == crops.shape
    assert (changed != crops).any()
    for one, other in zip(crops, changed, strict=True):
        cells = [
            sorted(
                part[y : y + 4, x : x + 4].tobytes()
                for y in range(0, 32, 4)
                for x in range(0, 32, 4)
            )
            for part in (one, other)
        ]
        assert cells[0] == cells[1]
    assert np.array_equal(changed[:, 32:], crops[:, 32:])


def test_a_share_of_a_change_that_was_not_tried_is_zero() -> None:
    known = Recognition(np.arange(4), {"negative": np.asarray([True, False, False, True])})
    assert (known.share("negative"), known.share("swapped")) == (0.5, 0.0)
