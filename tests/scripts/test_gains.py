"""The gain that a quantised Linear's output lacks."""

from __future__ import annotations

import numpy as np
from script_module import load_script


def test_a_planted_gain_is_found() -> None:
    script = load_script("bench/gains")
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(4000, 3)).astype(np.float32)
    planted = np.asarray([0.8, 1.0, 1.25], np.float32)
    noise = 0.01 * rng.normal(size=exact.shape).astype(np.float32)
    found = script.least_squares_gain(exact, exact / planted + noise + 5)
    assert np.allclose(found, planted, rtol=1e-3)
    # Twin: channels in another order have nothing in common.
    assert np.abs(script.least_squares_gain(exact, exact[:, ::-1])[::2]).max() < 0.1
    # A constant output keeps its scale.
    assert script.least_squares_gain(exact, np.ones_like(exact)).tolist() == [1, 1, 1]
