from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.observers import BINS, ChannelObserver, ChannelStatistics, bin_edges
from clipdeploy.core.errors import CalibrationError

CHANNELS = 6


def _images(count: int = 12, seed: int = 0) -> list[NDArray[np.float32]]:
    """Tokens (K, CHANNELS) of images: scales from far below the first bin to above the last."""
    rng = np.random.default_rng(seed)
    scales = np.float32([1e-7, 1e-3, 0.1, 1.0, 50.0, 3000.0])
    return [
        (rng.standard_normal((7 + index % 3, CHANNELS)) * scales).astype(np.float32)
        for index in range(count)
    ]


def _observe(images: list[NDArray[np.float32]]) -> ChannelStatistics:
    observer = ChannelObserver("x", CHANNELS)
    for rows in images:
        observer.collect(rows.min(axis=0), rows.max(axis=0), rows)
    return observer.compute()


def _bits(statistics: ChannelStatistics) -> tuple[bytes | int, ...]:
    arrays = (statistics.minimum, statistics.maximum, statistics.counts, statistics.total)
    return (*(array.tobytes() for array in arrays), statistics.rows)


def test_bins_are_eight_an_octave_over_24_octaves() -> None:
    edges = bin_edges()
    assert edges.shape == (BINS + 1,) == (193,)
    assert edges[0] == 0.0
    assert (np.diff(edges) > 0).all()
    assert (edges[1], edges[8], edges[BINS]) == (2**-13 * 1.125, 2.0**-12, 2.0**11)
    octave = (1 + np.arange(8) / 8) * 1.0
    assert np.array_equal(edges[13 * 8 : 14 * 8], octave)


def _numpy_counts(everything: NDArray[np.float64], channel: int) -> NDArray[np.int64]:
    """(2, BINS) counts of one channel by numpy.histogram, positive values first."""
    edges = bin_edges()
    edges[-1] = np.inf
    column = everything[:, channel]
    return np.stack(
        [np.histogram(np.abs(column[column < 0 if s else column >= 0]), edges)[0] for s in (0, 1)]
    )


@pytest.mark.parametrize("count", [1, 12, 31, 32, 33, 70])
def test_histogram_is_numpys(count: int) -> None:
    images = _images(count)
    everything = np.concatenate(images).astype(np.float64)
    found = _observe(images).counts
    assert (found.shape, found.dtype) == ((CHANNELS, 2, BINS), np.int32)
    for channel in range(CHANNELS):
        assert np.array_equal(found[channel], _numpy_counts(everything, channel))


def test_flipped_signs_swap_the_halves_and_are_seen() -> None:
    images = _images()
    found, flipped = _observe(images).counts, _observe([-rows for rows in images]).counts
    assert np.array_equal(flipped, found[:, ::-1])
    assert not np.array_equal(flipped, found)


@pytest.mark.parametrize(
    ("value", "sign", "index"),
    [
        (0.0, 0, 0),
        (-0.0, 1, 0),
        (1e-45, 0, 0),
        (-1e-45, 1, 0),
        (2.0**-13, 0, 0),
        (2.0**-13 * 1.125, 0, 1),
        (1.0, 0, 104),
        (-1.0, 1, 104),
        (float(np.nextafter(np.float32(1), np.float32(0))), 0, 103),
        (1.125, 0, 105),
        (2.0**11 - 1, 0, 191),
        (2.0**11, 0, 191),
        (-(2.0**11), 1, 191),
        (2.0**20, 0, 191),
        (-(2.0**20), 1, 191),
    ],
)
def test_bin_of_a_value(value: float, sign: int, index: int) -> None:
    observer = ChannelObserver("x", 1)
    rows = np.float32([[value]])
    observer.collect(rows[0], rows[0], rows)
    assert np.argwhere(observer.compute().counts[0]).tolist() == [[sign, index]]


def test_channel_slice_is_an_observation_of_these_channels() -> None:
    images = _images(40)
    observer = ChannelObserver("part", 3)
    for rows in images:
        part = rows[:, 2:5]
        observer.collect(part.min(axis=0), part.max(axis=0), part)
    expected = _bits(observer.compute())
    assert _bits(_observe(images).channel_slice(2, 5)) == expected
    assert _bits(_observe(images).channel_slice(1, 4)) != expected


def test_extremes_are_exact_and_over_every_token() -> None:
    observer = ChannelObserver("x", 2)
    rows = np.float32([[0.5, -1.0]])
    observer.collect(np.float32([-3.7, -1.0]), np.float32([0.5, 9.1]), rows)
    observer.collect(np.float32([-2.0, -1.5]), np.float32([0.75, 2.0]), rows)
    found = observer.compute()
    assert found.minimum.tolist() == np.float32([-3.7, -1.5]).tolist()
    assert found.maximum.tolist() == np.float32([0.75, 9.1]).tolist()
    assert found.amax.tolist() == np.float32([3.7, 9.1]).tolist()
    assert (found.rows, found.channels) == (2, 2)


def test_mean_is_that_of_the_rows() -> None:
    images = _images()
    everything = np.concatenate(images).astype(np.float64)
    # Each value is rounded to 2 ** -24, so the mean is off by half of that at most.
    np.testing.assert_allclose(_observe(images).mean, everything.mean(axis=0), rtol=0, atol=2**-25)


def test_totals_are_integers_of_the_fixed_point() -> None:
    images = _images()
    expected = [
        sum(round(float(x) * 2**24) for rows in images for x in rows[:, channel])
        for channel in range(CHANNELS)
    ]
    assert _observe(images).total.tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_order_does_not_matter(seed: int) -> None:
    images = _images(75)
    order = np.random.default_rng(seed).permutation(len(images))
    assert _bits(_observe([images[i] for i in order])) == _bits(_observe(images))


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("count", [12, 32, 75])
def test_any_sharding_merges_to_the_same_bits(shards: int, count: int) -> None:
    images = _images(count)
    rng = np.random.default_rng(shards)
    order = rng.permutation(count)
    parts = [_observe([images[i] for i in p]) for p in np.array_split(order, shards)]
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = forwards.merge(part)
    for part in parts[-2::-1]:
        backwards = part.merge(backwards)
    assert _bits(forwards) == _bits(backwards) == _bits(_observe(images))


@pytest.mark.parametrize("splits", [[1], [31], [32], [33], [64], [74], [7, 31, 32, 40, 65]])
def test_any_resume_gives_the_same_bits(splits: list[int]) -> None:
    images = _images(75)
    observer = ChannelObserver("x", CHANNELS)
    for index, rows in enumerate(images):
        if index in splits:
            # ``resume`` discards what was collected before, including waiting rows.
            fresh = ChannelObserver("x", CHANNELS)
            fresh.collect(rows.max(axis=0), rows.max(axis=0), 3 * rows)
            fresh.resume(observer.compute())
            observer = fresh
        observer.collect(rows.min(axis=0), rows.max(axis=0), rows)
    assert _bits(observer.compute()) == _bits(_observe(images))


def test_an_image_lost_or_doubled_at_a_resume_is_seen() -> None:
    images = _images(40)
    for again in (32, 34):
        observer = ChannelObserver("x", CHANNELS)
        observer.resume(_observe(images[:33]))
        for rows in images[again:]:
            observer.collect(rows.min(axis=0), rows.max(axis=0), rows)
        assert _bits(observer.compute()) != _bits(_observe(images))


def test_resuming_does_not_change_the_earlier_statistics() -> None:
    images = _images(40)
    earlier = _observe(images[:20])
    before = _bits(earlier)
    observer = ChannelObserver("x", CHANNELS)
    observer.resume(earlier)
    for rows in images[20:]:
        observer.collect(rows.min(axis=0), rows.max(axis=0), rows)
    observer.compute()
    assert _bits(earlier) == before


def test_resuming_other_channels_is_refused() -> None:
    with pytest.raises(CalibrationError, match="y has 5 channels, the earlier run 6"):
        ChannelObserver("y", 5).resume(_observe(_images()))


def test_rows_given_again_in_the_same_array_are_copied() -> None:
    images = _images(40)
    buffer = np.empty((9, CHANNELS), np.float32)
    observer = ChannelObserver("x", CHANNELS)
    for rows in images:
        view = buffer[: len(rows)]
        view[:] = rows
        observer.collect(view.min(axis=0), view.max(axis=0), view)
    assert _bits(observer.compute()) == _bits(_observe(images))


def test_one_image_more_is_seen() -> None:
    images = _images()
    assert _bits(_observe(images)) != _bits(_observe(images[:-1]))


def test_order_of_signed_zeros_does_not_matter() -> None:
    zeros = [np.zeros((1, CHANNELS), np.float32), -np.zeros((1, CHANNELS), np.float32)]
    assert _bits(_observe(zeros)) == _bits(_observe(zeros[::-1]))


def test_merging_other_channels_is_refused() -> None:
    one = ChannelObserver("x", 1)
    one.collect(np.float32([0]), np.float32([0]), np.float32([[0]]))
    with pytest.raises(CalibrationError, match="cannot merge statistics of 1 and 6 channels"):
        one.compute().merge(_observe(_images()))


@pytest.mark.parametrize("place", ["minimum", "maximum", "rows"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused_with_names_and_forgotten(place: str, poison: float) -> None:
    observer = ChannelObserver("blocks.3.mlp.fc2", CHANNELS)
    rows = _images(1)[0]
    observer.collect(rows.min(axis=0), rows.max(axis=0), rows, "good.png")
    before = _bits(observer.compute())
    arrays = {"minimum": rows.min(axis=0), "maximum": rows.max(axis=0), "rows": rows.copy()}
    arrays[place].flat[2] = poison
    with pytest.raises(
        CalibrationError, match=r"blocks\.3\.mlp\.fc2 is NaN or infinite on bad\.png"
    ):
        observer.collect(arrays["minimum"], arrays["maximum"], arrays["rows"], "bad.png")
    assert _bits(observer.compute()) == before


@pytest.mark.parametrize("channels", [1, CHANNELS - 1, CHANNELS + 1])
def test_changed_shape_is_refused(channels: int) -> None:
    observer = ChannelObserver("x", CHANNELS)
    good, bad = np.zeros(CHANNELS, np.float32), np.zeros(channels, np.float32)
    with pytest.raises(CalibrationError, match="x has 6 channels, got"):
        observer.collect(bad, bad, np.zeros((4, channels), np.float32))
    with pytest.raises(CalibrationError, match="x has 6 channels, got"):
        observer.collect(good, good, np.zeros((4, channels), np.float32))
    with pytest.raises(CalibrationError, match="no images were collected for x"):
        observer.compute()


@pytest.mark.parametrize(
    ("maximum", "rows"), [((1,), (4, CHANNELS)), ((CHANNELS,), (CHANNELS,))], ids=["max", "rows"]
)
def test_every_shape_is_checked(maximum: tuple[int, ...], rows: tuple[int, ...]) -> None:
    observer = ChannelObserver("x", CHANNELS)
    with pytest.raises(CalibrationError):
        observer.collect(
            np.zeros(CHANNELS, np.float32), np.zeros(maximum, np.float32), np.zeros(rows, "f4")
        )


def test_nothing_collected_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no images were collected for x"):
        ChannelObserver("x", 3).compute()


def test_reset_forgets_everything() -> None:
    images = _images()
    observer = ChannelObserver("x", CHANNELS)
    for rows in images[:5]:
        observer.collect(rows.min(axis=0), rows.max(axis=0), rows)
    observer.reset()
    with pytest.raises(CalibrationError, match="no images were collected"):
        observer.compute()
    for rows in images[5:]:
        observer.collect(rows.min(axis=0), rows.max(axis=0), rows)
    assert _bits(observer.compute()) == _bits(_observe(images[5:]))


def test_computed_statistics_do_not_change_later() -> None:
    images = _images()
    observer = ChannelObserver("x", CHANNELS)
    observer.collect(images[0].min(axis=0), images[0].max(axis=0), images[0])
    first = observer.compute()
    before = _bits(first)
    observer.collect(images[1].min(axis=0), images[1].max(axis=0), images[1])
    assert _bits(first) == before
    assert _bits(observer.compute()) != before


def test_mean_of_no_rows_is_zero_not_a_division() -> None:
    empty = replace(_observe(_images(1)), total=np.zeros(CHANNELS, np.int64), rows=0)
    assert empty.mean.tolist() == [0.0] * CHANNELS


@pytest.mark.parametrize("value", [2.0**20 + 1, -1e12])
def test_absurdly_large_values_are_refused_with_names(value: float) -> None:
    observer = ChannelObserver("blocks.1.mlp.fc2", 1)
    rows = np.float32([[value]])
    with pytest.raises(
        CalibrationError, match=r"blocks\.1\.mlp\.fc2 reaches 1\.0e\+\d\d on a\.png"
    ):
        observer.collect(rows[0], rows[0], rows, "a.png")
    with pytest.raises(CalibrationError, match="no images were collected"):
        observer.compute()


def test_more_rows_than_an_int32_counts_are_refused() -> None:
    many = replace(_observe(_images(1)), rows=2**31 - 2)
    with pytest.raises(CalibrationError, match="more than 2147483647 rows"):
        many.merge(_observe(_images(1)))
