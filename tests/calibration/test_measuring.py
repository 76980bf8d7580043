"""Strengths and ranges that are measured on other views of the calibration images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.measuring import Setting, choose, measure_settings
from calibration.observers import ChannelStatistics
from calibration.table import CalibrationTable
from calibration.views import other_views
from exporters.graphs import load_graph
from exporters.headers import read_passport
from exporters.samples import Samples


def _settings(
    source: Path,
    table: CalibrationTable,
    roles: Collection[str],
    *,
    gelu: bool = True,
    narrow: ChannelStatistics | None = None,
) -> dict[str, Setting]:
    """Settings of Linears of the last block, by role, on views of four images."""
    stored = table.fitted()
    assert stored is not None
    images = Samples(other_views(stored.crops[:4]), stored.spec)
    inputs = images.as_input(read_passport(source).input)
    names = [f"blocks.5.{role}" for role in roles]
    statistics = {name: narrow or table.of(name) for name in names}
    found = measure_settings(load_graph(source), statistics, inputs, gelu=gelu)
    return {name.removeprefix("blocks.5."): setting for name, setting in found.items()}


def test_a_setting_is_measured_for_each_linear(
    source: Path, demo_table: CalibrationTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a strength of 1 each channel fills the range, so other images exceed it."""
    monkeypatch.setattr("calibration.measuring._STRENGTHS", (1.0, 0.6))
    roles = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    found = _settings(source, demo_table, roles)
    assert tuple(found) == roles
    # Only the class token leaves attention in the last block.
    for role, margin in zip(roles, (1.0, 1.15, 1.15, 1.15), strict=True):
        parts = (margin, 1.5 * margin, 2 * margin, None)
        assert found[role].part in [pytest.approx(part) for part in parts]
    assert [found[role].strength for role in roles[1:3]] == [0.6, 0.6]


def test_gelus_output_is_scaled_only_where_it_may_be(
    source: Path, demo_table: CalibrationTable
) -> None:
    assert _settings(source, demo_table, ["mlp.fc2"], gelu=False) == {}


def test_a_range_that_other_images_exceed_becomes_larger(
    source: Path, demo_table: CalibrationTable
) -> None:
    """As if the calibration images had shown less than half of each channel's range."""
    known = _settings(source, demo_table, ["mlp.fc1"])["mlp.fc1"]
    seen = demo_table.of("blocks.5.mlp.fc1")
    narrow = replace(seen, minimum=0.4 * seen.minimum, maximum=0.4 * seen.maximum)
    found = _settings(source, demo_table, ["mlp.fc1"], narrow=narrow)["mlp.fc1"]
    assert found.part == pytest.approx(2 * 1.15)
    assert known.part in (pytest.approx(1.15), None)


def test_the_other_linears_of_a_role_count_as_much_as_the_linear_itself() -> None:
    errors = {
        "blocks.0.attn.qkv": [1.0, 1.1],
        "blocks.1.attn.qkv": [2.0, 1.0],
        "blocks.10.attn.qkv": [1.0, 9.0],
        "blocks.0.mlp.fc1": [5.0, 1.0],
    }
    found = choose({name: np.asarray(each) for name, each in errors.items()})
    assert list(found.values()) == [0, 1, 0, 1]
    without = {n: np.asarray(each) for n, each in errors.items() if "10" not in n}
    assert choose(without)["blocks.0.attn.qkv"] == 1
