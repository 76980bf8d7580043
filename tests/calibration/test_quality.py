"""An INT8 graph is measured before it is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from planted import calibrated, edit, outlier_behind_gelu

from calibration.collect import CalibrationImage, collect
from calibration.config import QuantizeConfig
from calibration.policy import find_linears
from calibration.qdq import QuantizedGraph, quantize
from calibration.quality import MIN_SQNR_DB, Quality, Weakest, check_quality
from calibration.table import CalibrationTable, load_table, save_table
from clipdeploy.core.errors import CalibrationError, UsageError
from clipdeploy.imaging import open_images
from clipdeploy.models import cards
from clipdeploy.stages.calibrate import _calibration_images, _records
from exporters.graphs import load_graph
from exporters.headers import read_passport
from exporters.samples import Samples
from exporters.session import OnnxSession

Array = NDArray[np.float32]
WEAKEST = Weakest("blocks.2.mlp.fc2", 11.0, "its weights have outliers")


def _sqnr(graph: Path, made: Path, images: Array) -> float:
    (expected,) = OnnxSession(graph).run(images)
    (found,) = OnnxSession(made, exact_int8="fp32" in made.name).run(images)
    return 10 * math.log10(float((expected**2).sum() / ((found - expected) ** 2).sum()))


def _int8(graph: Path, samples: Samples, folder: Path, config: QuantizeConfig) -> QuantizedGraph:
    table = folder / "table.json"
    calibrated(graph, table, images=16)
    return quantize(graph, table, folder / f"{config.remainder}.onnx", samples, config)


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_the_figure_is_that_of_the_logits_on_calibration_images(
    remainder: str, source: Path, samples: Samples, tmp_path: Path
) -> None:
    config = QuantizeConfig(remainder=remainder)  # type: ignore[arg-type]
    made = _int8(source, samples, tmp_path, config)
    quality = made.quality
    assert quality is not None
    assert (quality.images, quality.warnings) == (8, ())
    kept = load_table(tmp_path / "table.json").samples()
    assert kept is not None
    # Storing float16 limits the SQNR to about 60 dB; ONNX Runtime's float32 does not.
    found = _sqnr(source, made.artifact.path, kept.pixels)
    assert quality.sqnr_db == pytest.approx(found, abs=0.3)
    assert found > 30
    settings = read_passport(made.artifact.path).settings
    assert settings["quality"]["sqnr_db"] == quality.sqnr_db
    assert settings["int8_left_out"] == {}


def _fires(block: int, size: float, share: float) -> dict[str, Callable[[Array], Array]]:
    """Edits that make a neuron ``size`` times larger, and its weights smaller by a share of it."""

    def column(array: Array) -> Array:
        array = array.copy()
        array[..., 5] *= size
        return array

    def row(array: Array) -> Array:
        array = array.copy()
        array[5] /= size * share
        return array

    mlp = f"blocks.{block}.mlp"
    return {f"{mlp}.fc1.weight": column, f"{mlp}.fc1.bias": column, f"{mlp}.fc2.weight": row}


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("kind", ["constant", "fires"])
def test_a_linear_that_int8_would_ruin_is_left_out_and_named(
    kind: str, block: int, source: Path, samples: Samples, demo_images: Array, tmp_path: Path
) -> None:
    graph = tmp_path / "outlier.onnx"
    if kind == "constant":
        outlier_behind_gelu(source, graph, block, 3000)
    else:
        edit(source, graph, _fires(block, 3000, 1.0))
    made = _int8(graph, samples, tmp_path, QuantizeConfig())
    name = f"blocks.{block}.mlp.fc2"
    left_out = [entry for entry in made.placement.entries if entry.reason.startswith("INT8 would")]
    assert [entry.name for entry in left_out] == [name]
    assert "channel 5 of its input reaches" in left_out[0].reason
    assert name in {site.name for site in find_linears(load_graph(made.artifact.path))}
    assert made.artifact.passport.settings["int8_nodes"] == 23
    assert _sqnr(graph, made.artifact.path, demo_images) > 30
    worse = _int8(graph, samples, tmp_path, QuantizeConfig(min_sqnr=None))
    assert worse.quality is None
    assert _sqnr(graph, worse.artifact.path, demo_images) < 28


def _darker(source: Path, path: Path) -> Path:
    """A table with ranges from images with a tenth of the contrast, and regular crops."""
    digits = open_images(cards.demo_file("calibration.zip"))
    few = type(digits)(digits.root, digits.entries[::20])
    passport = read_passport(source)

    def images(done: object) -> Iterator[CalibrationImage]:
        for image in _calibration_images(few, passport, None):
            low = image.input.min()
            yield replace(image, input=(low + 0.1 * (image.input - low)).astype(np.float32))

    save_table(collect(source, images, _records(few)), path)
    return path


def test_a_graph_below_the_minimum_is_refused_and_leaves_no_file(
    source: Path, samples: Samples, tmp_path: Path
) -> None:
    table, graph = _darker(source, tmp_path / "table.json"), tmp_path / "int8.onnx"
    with pytest.raises(CalibrationError, match=r"the INT8 logits have an SQNR of .*weakest") as no:
        quantize(source, table, graph, samples)
    assert "--min-sqnr" in no.value.hint
    assert not graph.exists()
    made = quantize(source, table, graph, samples, QuantizeConfig(min_sqnr=-10))
    assert made.quality is not None
    assert len(made.quality.warnings) == 1


def test_a_minimum_that_no_linear_reaches_is_refused(
    source: Path, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="every Linear below 60 dB; the weakest"):
        _int8(source, samples, tmp_path, QuantizeConfig(min_sqnr=60))


def _dimmed(table: Path, level: int) -> CalibrationTable:
    """The table with the thumbnails of dim images."""
    known = load_table(table)
    images = [replace(image, thumbnail=bytes([level, 0] * 32)) for image in known.images]
    return save_table(replace(known, images=tuple(images), crops=()), table)


def test_without_calibration_images_the_samples_judge(
    source: Path, samples: Samples, tmp_path: Path
) -> None:
    table = tmp_path / "table.json"
    calibrated(source, table, images=8)
    _dimmed(table, 9)
    quality = quantize(source, table, tmp_path / "x.onnx", samples).quality
    assert quality is not None
    assert quality.images == 0
    assert quality.sqnr_db == quality.sample_sqnr_db


def _table(level: int, demo_table: CalibrationTable) -> CalibrationTable:
    images = [replace(image, thumbnail=bytes([level, 0] * 32)) for image in demo_table.images]
    return replace(demo_table, images=tuple(images))


@pytest.mark.parametrize(
    ("ours", "of_samples", "level", "refused", "words"),
    [
        (42.0, 41.0, 255, False, []),
        (None, None, 255, False, []),
        (
            9.9,
            41.0,
            255,
            True,
            ["9.9 dB on the calibration images, below 10 dB; the weakest"],
        ),
        (
            15.0,
            41.0,
            255,
            False,
            ["15.0 dB, little above the minimum of 10 dB; the weakest"],
        ),
        (42.0, 3.0, 255, False, ["only 3.0 dB on clipdeploy's sample images"]),
        (42.0, 3.0, 40, True, ["dim or flat, their grey levels spread by 20 of 255"]),
        (42.0, 30.0, 40, False, []),
    ],
)
def test_what_is_refused_and_what_is_said(
    ours: float | None,
    of_samples: float | None,
    level: int,
    refused: bool,
    words: list[str],
    demo_table: CalibrationTable,
) -> None:
    quality = Quality(ours, of_samples, 8, WEAKEST)
    table = _table(level, demo_table)
    if refused:
        with pytest.raises(CalibrationError, match=words[0]):
            check_quality(quality, table, MIN_SQNR_DB)
        # A lower minimum accepts the graph.
        check_quality(quality, table, 0.0)
        return
    warnings = check_quality(quality, table, MIN_SQNR_DB)
    assert len(warnings) == len(words)
    for warning, word in zip(warnings, words, strict=True):
        assert word in warning


@pytest.mark.parametrize("minimum", [math.nan, math.inf])
def test_a_minimum_that_is_no_number_is_refused(minimum: float) -> None:
    with pytest.raises(UsageError, match=f"invalid value {minimum} for min_sqnr"):
        QuantizeConfig(min_sqnr=minimum)
