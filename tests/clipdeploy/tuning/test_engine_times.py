"""Times of engines are measured once, under the same conditions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from calibration.scheme import SchemeConfig
from clipdeploy.engines.roofline import Formats
from clipdeploy.tuning.engine_times import Conditions, PairTimer, forget_times, kept_times

HERE = Conditions(
    gpu="NVIDIA L4",
    sm="SM 8.9",
    driver="570.1",
    cuda="12.8",
    backend="tensorrt-rtx",
    backend_version="1.7.1",
    batch=8,
    graph="a" * 64,
    calibration="b" * 64,
    scheme=SchemeConfig(),
)
QKV: Formats = {"blocks.0.attn.qkv": "int8"}


def recorded(asked: list[Formats], slower: float = 1.0) -> PairTimer:
    """FP16 takes 100 us; each product in 8 bits saves 10; everything is ``slower``."""

    def measure(formats: Formats) -> tuple[float, float]:
        asked.append(formats)
        return 100.0 * slower, (100.0 - 10.0 * len(formats)) * slower

    return measure


def test_each_engine_is_measured_once(tmp_path: Path) -> None:
    path, asked = tmp_path / "times.json", list[Formats]()
    for _ in range(2):
        time = kept_times(recorded(asked), path, HERE)
        assert [time({}), time(QKV), time({})] == [100.0, 90.0, 100.0]
    assert asked == [{}, QKV]


def test_a_clock_that_drifts_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    assert kept_times(recorded([]), path, HERE)({}) == 100.0
    # Without the pair, an engine that is faster would look slower.
    assert kept_times(recorded([], slower=1.2), path, HERE)(QKV) == pytest.approx(90.0)


@pytest.mark.parametrize(
    "other",
    [
        {"gpu": "NVIDIA L40S"},
        {"sm": "SM 9.0"},
        {"driver": "580.1"},
        {"cuda": "13.0"},
        {"backend": "tensorrt"},
        {"backend_version": "1.8.0"},
        {"batch": 32},
        {"graph": "c" * 64},
        {"calibration": "c" * 64},
        {"scheme": SchemeConfig("mse")},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_conditions_are_measured_on_their_own(tmp_path: Path, other: dict[str, str]) -> None:
    path, asked = tmp_path / "times.json", list[Formats]()
    kept_times(recorded(asked), path, HERE)({})
    there = replace(HERE, **other)  # type: ignore[arg-type]
    assert kept_times(recorded(asked, slower=2.0), path, there)({}) == 200.0
    # The first ones are still there.
    assert kept_times(recorded(asked), path, HERE)({}) == 100.0
    assert asked == [{}, {}]
    forget_times(path, HERE)
    kept_times(recorded(asked), path, HERE)({})
    assert kept_times(recorded(asked), path, there)({}) == 200.0
    assert asked == [{}, {}, {}]


def test_formats_are_told_apart(tmp_path: Path) -> None:
    asked = list[Formats]()
    time = kept_times(recorded(asked), tmp_path / "times.json", HERE)
    fp8: Formats = {"blocks.0.attn.qkv": "fp8"}
    rounded: Formats = QKV | {"blocks.0.attn.qkv.output": "int8"}
    for formats in (QKV, fp8, rounded):
        time(formats)
    assert asked == [QKV, {}, fp8, rounded]


def test_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    path, asked = tmp_path / "times.json", list[Formats]()

    def interrupted(formats: Formats) -> tuple[float, float]:
        if formats:
            raise KeyboardInterrupt
        return recorded(asked)(formats)

    time = kept_times(interrupted, path, HERE)
    time({})
    with pytest.raises(KeyboardInterrupt):
        time(QKV)
    again = kept_times(recorded(asked), path, HERE)
    assert [again({}), again(QKV)] == [100.0, 90.0]
    assert asked == [{}, QKV]


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    path, asked = tmp_path / "times.json", list[Formats]()
    kept_times(recorded(asked), path, HERE)({})
    path.write_text(path.read_text()[:-20])
    assert kept_times(recorded(asked), path, HERE)({}) == 100.0
    assert asked == [{}, {}]
