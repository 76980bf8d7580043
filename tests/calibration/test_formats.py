"""The formats' numbers and integrals, against the definition of E4M3 and brute force."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from calibration.formats import FORMATS, FP8, INT8, NumberFormat
from exporters.session import OnnxSession

BOTH = pytest.mark.parametrize("number_format", [INT8, FP8], ids=lambda each: each.name)


def e4m3() -> NDArray[np.float64]:
    """Every number >= 0 of E4M3 from its exponent and mantissa; 2^8 * 1.875 would be NaN."""
    normal = [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8)]
    return np.asarray([2.0**-6 * m / 8 for m in range(8)] + normal[:-1])


def numbers(number_format: NumberFormat) -> NDArray[np.float64]:
    """Every number >= 0 of the format, in ascending order."""
    return np.arange(128.0) if number_format is INT8 else e4m3()


def nearest(u: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest number to each |u|, with the sign of u; for ties the lower one."""
    return np.copysign(grid[np.abs(np.abs(u)[:, None] - grid).argmin(axis=1)], u)


def test_every_format_has_its_name() -> None:
    assert {name: each.name for name, each in FORMATS.items()} == {"int8": "int8", "fp8": "fp8"}


@BOTH
def test_the_numbers_are_kept_and_the_largest_saturates(number_format: NumberFormat) -> None:
    grid = numbers(number_format).astype(np.float32)
    assert grid[-1] == number_format.largest
    every = np.concatenate([grid, -grid])
    assert np.array_equal(number_format.rounded(every.copy()), every)
    assert np.array_equal(every.astype(number_format.dtype).astype(np.float32), every)
    beyond = np.asarray([1.2, 100, np.inf], np.float32) * number_format.largest
    assert (number_format.rounded(beyond.copy()) == number_format.largest).all()
    assert (number_format.rounded(-beyond) == -number_format.largest).all()


@BOTH
def test_values_are_rounded_to_the_nearest_number(number_format: NumberFormat) -> None:
    rng = np.random.default_rng(0)
    # Over all binades of E4M3, below its smallest number and beyond its largest.
    u = rng.choice([-1, 1], 5000) * 2 ** rng.uniform(-12, 10, 5000)
    u = u.astype(np.float32).astype(np.float64)
    expected = nearest(u, numbers(number_format))
    found = number_format.rounded(u.astype(np.float32))
    assert np.array_equal(found, expected)
    wrong = FP8 if number_format is INT8 else INT8
    assert not np.array_equal(wrong.rounded(u.astype(np.float32)), expected)


def test_fp8_ties_go_to_the_even_mantissa() -> None:
    u = np.asarray([1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10], np.float32)
    assert FP8.rounded(u).tolist() == [1.0, 1.25, 0.0, 2.0**-8]


def test_fp8_is_rounded_as_by_onnx_runtime() -> None:
    u = (np.random.default_rng(1).standard_normal((1, 4000)) * 100).astype(np.float32)
    make, kinds = onnx.helper, onnx.TensorProto
    one = make.make_tensor("one", kinds.FLOAT, [], [1.0])
    zero = make.make_tensor("zero", kinds.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes = [
        make.make_node("QuantizeLinear", ["u", "one", "zero"], ["q"]),
        make.make_node("DequantizeLinear", ["q", "one", "zero"], ["found"]),
    ]
    values = [make.make_tensor_value_info(name, kinds.FLOAT, [1, 4000]) for name in ("u", "found")]
    graph = make.make_graph(nodes, "fp8", values[:1], values[1:], [one, zero])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    (found,) = OnnxSession(model.SerializeToString(), fp8=True).run(u)
    assert np.array_equal(FP8.rounded(u.copy()), found)
    assert not np.array_equal(INT8.rounded(u.copy()), found)


def test_fp8_rounds_an_octave_at_32_and_a_half_decibels() -> None:
    """Steps of 1/8 over a mean square of 7/3, and any power of two times that."""
    for octave in (2.0**-5, 1.0, 128.0):
        ends = np.asarray([octave, 2 * octave])
        noise = np.diff(FP8.squared_integral(ends))[0] / octave
        signal = 7 / 3 * octave**2
        assert 10 * np.log10(signal / noise) == pytest.approx(32.5, abs=0.05)


@BOTH
@pytest.mark.parametrize("end", [2.0**-9, 0.03, 0.7, 1.0, 17.3, 126.9, 300.0, 448.0, 700.0])
def test_integrals_are_brute_forces(number_format: NumberFormat, end: float) -> None:
    u = (np.arange(200_000) + 0.5) / 200_000 * end
    grid = numbers(number_format)
    middles = (grid[1:] + grid[:-1]) / 2
    error = grid[np.searchsorted(middles, u)] - u
    ends = np.asarray([end, -end])
    squares = number_format.squared_integral(ends)
    # Midpoints are exact to the second order; at a jump one of 200,000 may be on the wrong side.
    assert squares[0] == pytest.approx((error**2).mean() * end, rel=1e-4)
    assert squares[1] == -squares[0]
    plain = number_format.error_integral(ends)
    assert plain[0] == pytest.approx(error.mean() * end, abs=1e-4 * end * np.abs(error).max())
    assert plain[1] == plain[0]
    shorter = number_format.squared_integral(ends / 2)
    assert shorter[0] != pytest.approx((error**2).mean() * end, rel=1e-2)


@BOTH
def test_a_step_is_a_float16_that_reaches_the_limit(number_format: NumberFormat) -> None:
    step = number_format.step(3.0)
    assert step == float(np.float16(step))
    assert step * number_format.largest == pytest.approx(3.0, rel=2**-11)
    # Float16's smallest normal number.
    assert number_format.step(0.0) == 2.0**-14


@BOTH
def test_cells_are_the_numbers_of_equal_bins(number_format: NumberFormat) -> None:
    cells = number_format.cells(2048)
    grid = numbers(number_format)
    # FP8 has 30 numbers below the middle of the first bin.
    assert (cells[0], cells[-1]) == (0 if number_format is INT8 else 30, len(grid) - 1)
    assert (np.diff(cells) >= 0).all()
    represented = grid[cells] / number_format.largest
    # INT8 divides the range into 128 equal cells; FP8's numbers are at most 1 / 14 apart.
    assert np.abs(represented - (np.arange(2048) + 0.5) / 2048).max() < 1 / 20
