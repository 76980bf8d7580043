from __future__ import annotations

import numpy as np
import pytest

from clipdeploy.verification.statistics import FidelityMeter, top_k_hits


def test_top_k_hits_on_a_worked_example() -> None:
    logits = np.asarray([[3, 2, 1], [1, 2, 3], [0, 5, 4]], np.float32)
    labels = np.asarray([0, 0, 2])
    assert top_k_hits(logits, labels, 1).tolist() == [True, False, False]
    assert top_k_hits(logits, labels, 2).tolist() == [True, False, True]


def test_constant_and_nan_logits_hit_nothing() -> None:
    labels = np.zeros(4, np.int64)
    assert not top_k_hits(np.ones((4, 10), np.float32), labels, 5).any()
    assert not top_k_hits(np.full((4, 10), np.nan, np.float32), labels, 5).any()


def test_figures_by_hand() -> None:
    reference = np.asarray([[3, 4], [4, 3]], np.float32)
    logits = np.asarray([[3, 4], [3, 4]], np.float32)
    meter = FidelityMeter()
    meter.add(logits, reference, np.asarray([1, 0]))
    got = meter.result()
    assert got.max_abs == 1
    assert got.mean_abs == 0.5
    assert got.cosine == pytest.approx(24 / 25)
    # Signal 50, noise 2: 10 log10(25).
    assert got.sqnr_db == pytest.approx(13.979400086720377)
    assert got.agreement == 50
    assert got.accuracy is not None
    assert got.reference_accuracy is not None
    assert (got.accuracy.top1, got.reference_accuracy.top1) == (50, 100)
    assert got.drop == 50


def test_batches_add_up_to_one_batch() -> None:
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((12, 10)).astype(np.float32)
    logits = reference + generator.standard_normal((12, 10)).astype(np.float32)
    labels = generator.integers(0, 10, 12)
    whole, parts = FidelityMeter(), FidelityMeter()
    whole.add(logits, reference, labels)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        parts.add(logits[part], reference[part], labels[part])
    one, two = whole.result(), parts.result()
    assert one.accuracy == two.accuracy
    assert one.sqnr_db == pytest.approx(two.sqnr_db)
    assert one.mean_abs == pytest.approx(two.mean_abs)


def test_equal_logits_have_no_noise_and_nan_is_seen() -> None:
    logits = np.ones((2, 3), np.float32)
    meter = FidelityMeter()
    meter.add(logits, logits, None)
    assert meter.result().sqnr_db is None
    assert meter.result().drop is None
    meter.add(logits * np.nan, logits, None)
    assert not meter.result().finite
