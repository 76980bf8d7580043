"""Sums of INT8 products beyond float16: the graph, its plans, and the judgement of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from script_module import load_script

from clipdeploy.core.device import gpus
from exporters.session import OnnxSession


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench/sums")


def exact(script: ModuleType, form: str, cut_off: float = np.inf) -> np.ndarray:
    """The logits in float64; sums end at ``cut_off``."""
    given = script.constants(form)
    x = script.images(2).astype(np.float16).reshape(-1, script.WIDTH).astype(np.float64)
    numbers = np.clip(np.rint(x / float(given["x_scale"])), -128, 127)
    sums = np.minimum(numbers @ given["numbers"].astype(np.float64), cut_off)
    # Above this every sum overflows.
    assert cut_off < np.inf or sums.min() > 40 * 65504
    scale = given["scales"].astype(np.float64) * given.get("ratio", np.float16(1))
    found = float(given["x_scale"]) * scale * sums + given["bias"].astype(np.float64)
    return found.reshape(2, -1).astype(np.float32)


@pytest.mark.parametrize("form", ["channel", "ratio", "tensor"])
def test_sums_beyond_float16_are_found_by_their_results(script: ModuleType, form: str) -> None:
    expected = exact(script, form)
    found = OnnxSession(script.graph(form)).run(script.images(2))[0]
    assert script.largest_error(found, expected) < script.MOST_ERROR / 2
    # What an overflow gives: infinity, or the largest number.
    infinite = found.copy()
    infinite[1, 3] = np.inf
    assert script.largest_error(infinite, expected) == np.inf
    infinite[1, 3] = np.nan
    assert script.largest_error(infinite, expected) == np.inf
    assert script.largest_error(exact(script, form, 65504), expected) > 50 * script.MOST_ERROR


def test_the_plan_of_the_channel_form_overflows(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    channel, ratio = (script.try_form("tensorrt-rtx", each, tmp_path) for each in FORMS)
    assert (channel.plan, channel.ours, ratio.plan, ratio.ours) == (
        *("overflows", False),
        *("does not", True),
    )
    assert not script.is_wrong(channel)
    assert not script.is_wrong(ratio)
    if not gpus():
        assert {channel.run, ratio.run} == {"not run"}
        assert "no GPU on this machine" in ratio.said
    # The same findings, of the form that clipdeploy builds.
    assert script.is_wrong(replace(channel, ours=True))
    assert script.is_wrong(replace(ratio, built=False))


FORMS = ("channel", "ratio")
