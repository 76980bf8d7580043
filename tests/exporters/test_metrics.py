from __future__ import annotations

import math

import numpy as np
import pytest

from exporters.metrics import BROKEN_DB, ratio_db, sqnr_db

TINY = 5e-324


@pytest.mark.parametrize(
    ("signal", "noise", "db"),
    [
        (50.0, 2.0, 13.979400086720377),
        (1.0, 1.0, 0.0),
        (1.0, 1e3, -30.0),
        (1e300, TINY, 10 * (300 - math.log10(TINY))),
    ],
)
def test_a_ratio_in_decibels(signal: float, noise: float, db: float) -> None:
    assert ratio_db(signal, noise) == pytest.approx(db, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_without_noise_the_values_are_equal(signal: float) -> None:
    assert ratio_db(signal, 0.0) is None


@pytest.mark.parametrize(
    ("signal", "noise"),
    [(0.0, 1.0), (1.0, math.inf), (1.0, math.nan), (math.inf, 1.0), (math.nan, 0.0)],
)
def test_noise_without_signal_and_values_that_are_not_finite(signal: float, noise: float) -> None:
    assert ratio_db(signal, noise) == BROKEN_DB


def test_sqnr_of_arrays_is_summed_in_float64() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(64, 1000)).astype(np.float32)
    found = reference + rng.normal(scale=0.01, size=reference.shape).astype(np.float32)
    noise = (found - reference).astype(np.float64)
    expected = 10 * math.log10((reference.astype(np.float64) ** 2).sum() / (noise**2).sum())
    assert sqnr_db(reference, found) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(40, abs=0.1)


def test_sqnr_of_equal_zero_and_broken_arrays() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert sqnr_db(one, one) is None
    assert sqnr_db(zero, zero) is None
    assert sqnr_db(zero, one) == BROKEN_DB
    assert sqnr_db(one, np.asarray([1, np.nan, 1], np.float32)) == BROKEN_DB
