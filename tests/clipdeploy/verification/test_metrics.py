from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from clipdeploy.verification.metrics import FidelityMeter, accuracy_of, fidelity_of
from clipdeploy.verification.paired import Interval, wilson_interval
from clipdeploy.verification.records import Answer, ImageId, ImageRecord, measure_images

Array = NDArray[np.float32]


def records(
    logits: Array, reference: Array, labels: Sequence[int | None] | None = None
) -> list[ImageRecord]:
    count = len(reference)
    names = [ImageId(f"{i}.png", f"{i:064x}", "", b"") for i in range(count)]
    return measure_images(names, labels or [None] * count, [""] * count, reference, [logits])


def hits(logits: Array, labels: Sequence[int], k: int) -> list[bool]:
    return [record.outcomes[0].answer.right(k) for record in records(logits, logits, labels)]


def test_hits_on_a_worked_example() -> None:
    logits = np.asarray([[3, 2, 1], [1, 2, 3], [0, 5, 4]], np.float32)
    labels = [0, 0, 2]
    assert hits(logits, labels, 1) == [True, False, False]
    assert hits(logits, labels, 2) == [True, False, True]


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf, -np.inf])
def test_constant_nan_and_infinite_logits_hit_nothing(value: float) -> None:
    assert not any(hits(np.full((4, 10), value, np.float32), [0] * 4, 5))


def test_the_answers_are_the_five_largest_first_and_nan_is_none_of_them() -> None:
    logits = np.asarray([[0, 5, np.nan, 3, 4, 1, 2]], np.float32)
    assert records(logits, logits)[0].outcomes[0].answer.top == (1, 4, 3, 6, 5)


def test_figures_by_hand() -> None:
    reference = np.asarray([[3, 4], [4, 3]], np.float32)
    logits = np.asarray([[3, 4], [3, 4]], np.float32)
    got = fidelity_of(records(logits, reference, [1, 0]), 0, 2, labelled=True)
    assert got.max_abs == 1
    assert got.mean_abs == 0.5
    assert got.cosine == pytest.approx(24 / 25)
    # Signal 50, noise 2: 10 log10(25).
    assert got.sqnr_db == pytest.approx(13.979400086720377)
    assert got.agreement == 50
    assert got.accuracy is not None
    assert got.accuracy.top1 == 50
    assert (got.lost, got.gained) == (1, 0)


def test_accuracy_has_wilsons_intervals() -> None:
    got = accuracy_of([Answer((0,), 0)] * 8 + [Answer((1,), 3)] * 2)
    assert (got.top1, got.top5) == (80, 100)
    assert got.top1_interval == wilson_interval(8, 10)
    assert isinstance(got.top5_interval, Interval)


def test_the_order_of_images_and_batches_changes_no_bit() -> None:
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((40, 10)).astype(np.float32)
    logits = reference + generator.lognormal(0, 6, (40, 10)).astype(np.float32)
    labels = generator.integers(0, 10, 40).tolist()
    whole = records(logits, reference, labels)
    parts = [
        record
        for part in (slice(25, 40), slice(0, 7), slice(7, 25))
        for record in records(logits[part], reference[part], labels[part])
    ]
    one = fidelity_of(whole, 0, 10, labelled=True)
    assert fidelity_of(parts, 0, 10, labelled=True) == one
    # Added up from left to right the two differ: the exact sum is what makes them equal.
    noise = [[record.outcomes[0].noise or 0 for record in each] for each in (whole, parts)]
    assert sum(noise[0]) != sum(noise[1])


def test_equal_logits_have_no_noise_and_nan_is_seen() -> None:
    logits = np.ones((2, 3), np.float32)
    assert fidelity_of(records(logits, logits), 0, 3, labelled=False).sqnr_db is None
    ruined = logits.copy()
    ruined[1, 2] = np.nan
    got = fidelity_of(records(ruined, logits), 0, 3, labelled=False)
    assert not got.finite
    assert got.accuracy is None
    assert not fidelity_of(records(logits, ruined), 0, 3, labelled=False).finite


def test_nan_agrees_with_nobody() -> None:
    reference = np.eye(3, dtype=np.float32)
    got = fidelity_of(records(np.full((3, 3), np.nan, np.float32), reference), 0, 3, labelled=False)
    assert got.agreement == 0


def test_a_meter_adds_batches_up_and_its_drop_is_lost_less_gained() -> None:
    reference = np.eye(4, dtype=np.float32)
    logits = np.roll(reference, 1, axis=0)
    labels = np.asarray([0, 1, 2, 1])
    meter = FidelityMeter()
    meter.add(logits[:3], reference[:3], labels[:3])
    meter.add(logits[3:], reference[3:], labels[3:])
    got = meter.result()
    assert got == fidelity_of(records(logits, reference, labels.tolist()), 0, 4, labelled=True)
    # Right before: images 0, 1, 2. Right after: none, as each answers its neighbour's class but
    # image 3, which answers 2.
    assert (got.lost, got.gained, got.drop) == (3, 0, 75.0)
    bare = FidelityMeter()
    bare.add(logits, reference, None)
    assert bare.result().drop is None
