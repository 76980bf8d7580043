"""``--effort best``: what is fitted to the images, and images that it must not be fitted to.

Covers: calibration/blocks.py, calibration/gelu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration import fitting
from calibration.config import QuantizeConfig, is_made_with, stored_settings
from calibration.fitting import check_gains
from calibration.measuring import Setting
from calibration.policy import find_linears
from calibration.qdq import quantize, smooth
from calibration.rounding import Moments
from calibration.scheme import SchemeConfig, fold_all_gelu
from calibration.table import CalibrationTable, save_table
from calibration.views import coarse_views
from clipdeploy.core.errors import CalibrationError, UsageError
from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.models import cards
from exporters.graphs import load_graph, write_model
from exporters.headers import read_passport
from exporters.metrics import sqnr_db
from exporters.samples import Samples
from exporters.session import OnnxSession

Make = Callable[[QuantizeConfig], Path]
HeldOut = tuple[NDArray[np.float32], NDArray[np.int64]]

FAST = QuantizeConfig(remainder="fp32")
BEST = replace(FAST, effort="best")
# Without the search of smoothing and range, which takes most of the time.
FITTED = replace(BEST, scheme=SchemeConfig(strength=0.65), exclude=("blocks.[1-4].*",))


def _db(graph: Path, held_out: HeldOut, reference: NDArray[np.float32]) -> float:
    (found,) = OnnxSession(graph, exact_int8=True).run(held_out[0])
    db = sqnr_db(reference, found)
    assert db is not None
    return db


def test_best_is_closer_to_fp32_on_held_out_images(
    make_int8: Make, held_out: HeldOut, reference: NDArray[np.float32]
) -> None:
    fast, best = (_db(make_int8(each), held_out, reference) for each in (FAST, BEST))
    assert best > fast + 1


def test_best_is_closer_to_fp32_on_images_of_a_lower_resolution_too(
    make_int8: Make, source: Path, demo_table: CalibrationTable
) -> None:
    """None of the calibration's images has one, and their ranges are not those of such images."""
    digits = select(open_images(cards.demo_file("test.zip")), 100, seed=0)
    crops = np.stack([crop.pixels for crop in iter_crops(digits, demo_table.preprocess)])
    coarse = Samples(coarse_views(crops), demo_table.preprocess)
    images = coarse.as_input(read_passport(source).input)
    (expected,) = OnnxSession(source).run(images)

    def db(config: QuantizeConfig) -> float:
        (found,) = OnnxSession(make_int8(config), exact_int8=True).run(images)
        return sqnr_db(expected, found) or 0.0

    assert db(BEST) > db(FAST) + 1


def test_the_effort_is_stored_unless_it_is_the_default() -> None:
    assert "effort" not in stored_settings(FAST)
    assert stored_settings(BEST)["effort"] == "best"
    with pytest.raises(UsageError, match="the effort cannot be 'most'"):
        replace(FAST, effort="most")


def test_a_graph_of_the_other_effort_is_not_the_one_asked_for() -> None:
    for asked, other in ((FAST, BEST), (BEST, FAST)):
        made = {"opset": 20, **stored_settings(asked), "int8_nodes": 24, "keep_fp32": []}
        assert is_made_with(made, asked)
        assert not is_made_with(made, other)
        assert not is_made_with(made, replace(asked, min_sqnr=None))
        assert not is_made_with({**made, "scope": {}}, asked)


def test_the_same_images_give_the_same_graph(
    make_int8: Make, source: Path, calibration: Path, samples: Samples, tmp_path: Path
) -> None:
    quantize(source, calibration, tmp_path / "again.onnx", samples, FITTED)
    assert (tmp_path / "again.onnx").read_bytes() == make_int8(FITTED).read_bytes()


def _scrambled(moments: Moments) -> NDArray[np.float64]:
    order = np.random.default_rng(0).permutation(len(moments.mean))
    return _covariance(moments)[np.ix_(order, order)]


def _of_other_images(moments: Moments) -> NDArray[np.float64]:
    mixing = np.random.default_rng(0).normal(size=(len(moments.mean), 8))
    return mixing @ mixing.T


_covariance = Moments.covariance.fget  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [_scrambled, _of_other_images])
def test_wrong_second_moments_are_detected(
    wrong: Callable[[Moments], NDArray[np.float64]],
    source: Path,
    calibration: Path,
    samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rounded(weight, scale, covariance, number_format):  # type: ignore[no-untyped-def]
        moments = Moments(len(covariance))
        monkeypatch.setattr(Moments, "covariance", property(lambda self: covariance))
        changed = wrong(moments)
        monkeypatch.setattr(Moments, "covariance", property(_covariance))
        return round_weight(weight, scale, changed, number_format)

    round_weight = fitting.round_weight
    monkeypatch.setattr(fitting, "round_weight", rounded)
    with pytest.raises(CalibrationError, match=r"second moments are of unlike images, or their"):
        quantize(source, calibration, tmp_path / "wrong.onnx", samples, FITTED)


def test_linears_that_do_not_gain_are_named() -> None:
    assert check_gains({"a": 2.0, "b": 0.5, "c": 1.1}) == ("b",)
    with pytest.raises(CalibrationError, match=r"in 2 of 3 Linears, in b 4\.0 times"):
        check_gains({"a": 2.0, "b": 0.25, "c": 0.9})


@pytest.mark.parametrize("count", [0, 8, 15])
def test_a_calibration_that_stores_few_images_is_refused(
    count: int, source: Path, demo_table: CalibrationTable, samples: Samples, tmp_path: Path
) -> None:
    """8 are those of an earlier version; calibrating again without --force would keep them."""
    table = replace(demo_table, crops=demo_table.crops[:count])
    save_table(table, tmp_path / "table.json")
    with pytest.raises(CalibrationError, match=f"needs 16 .* stores {count}:") as caught:
        quantize(source, tmp_path / "table.json", tmp_path / "x.onnx", samples, BEST)
    assert "calibrate --force" in caught.value.hint
    assert "--effort fast" in caught.value.hint


def test_the_fewest_images_are_enough(
    source: Path, demo_table: CalibrationTable, samples: Samples, tmp_path: Path
) -> None:
    save_table(replace(demo_table, crops=demo_table.crops[:16]), tmp_path / "table.json")
    config = replace(FITTED, exclude=("blocks.[1-5].*",))
    quantize(source, tmp_path / "table.json", tmp_path / "x.onnx", samples, config)


def test_scaling_the_output_of_gelu_keeps_the_function(
    source: Path, demo_table: CalibrationTable, demo_images: NDArray[np.float32], tmp_path: Path
) -> None:
    model = load_graph(source)
    sites = find_linears(model)
    statistics = {site.name: demo_table.of(site.name) for site in sites}
    assert fold_all_gelu(sites, statistics)
    write_model(model, tmp_path / "scaled.onnx")
    (found,) = OnnxSession(tmp_path / "scaled.onnx").run(demo_images)
    (expected,) = OnnxSession(source).run(demo_images)
    assert np.abs(found - expected).max() < 1e-4


def test_smoothing_takes_the_measured_strength(source: Path, demo_table: CalibrationTable) -> None:
    name = "blocks.2.mlp.fc1"
    setting = {name: Setting(0.35)}
    model = load_graph(source)
    assert smooth(model, demo_table, frozenset([name]), None, setting)[name].strength == 0.35
