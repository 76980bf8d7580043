"""An image's record, compared with plain NumPy."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from clipdeploy.verification.records import Answer, ImageId, ImageRecord, measure_images

REFERENCE = np.random.default_rng(0).normal(0, 3, (6, 10)).astype(np.float32)
LABELS = REFERENCE.argmax(axis=1).tolist()
NAMES = [ImageId(f"{i}.png", f"{i:064x}", f"{i:032x}", bytes(range(i, i + 64))) for i in range(6)]


def measured(
    artifact: NDArray[np.float32],
    reference: NDArray[np.float32] = REFERENCE,
    labels: list[int | None] | None = None,
) -> list[ImageRecord]:
    count = len(reference)
    given = labels if labels is not None else LABELS[:count]
    return measure_images(NAMES[:count], given, [""] * count, reference, [artifact])


def test_figures_are_numpys() -> None:
    artifact = REFERENCE + np.random.default_rng(1).normal(0, 0.1, REFERENCE.shape)
    artifact = artifact.astype(np.float32)
    for index, record in enumerate(measured(artifact)):
        ours, theirs = artifact[index].astype(float), REFERENCE[index].astype(float)
        (outcome,) = record.outcomes
        # float64 sums in another order.
        assert outcome.max_abs == np.abs(ours - theirs).max()
        assert outcome.sum_abs == pytest.approx(np.abs(ours - theirs).sum(), rel=1e-12)
        assert outcome.noise == pytest.approx(((ours - theirs) ** 2).sum(), rel=1e-12)
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert outcome.cosine == pytest.approx(cosine, rel=1e-12)
        assert record.signal == pytest.approx((theirs**2).sum(), rel=1e-12)
        assert outcome.answer.top == tuple(np.argsort(-artifact[index])[:5])


def test_equal_logits_have_no_noise() -> None:
    for record in measured(REFERENCE.copy()):
        (outcome,) = record.outcomes
        assert (outcome.max_abs, outcome.sum_abs, outcome.noise) == (0, 0, 0)
        assert outcome.answer == record.reference
        assert outcome.answer.right()


@pytest.mark.parametrize("rank", range(10))
def test_the_rank_is_how_many_are_before(rank: int) -> None:
    logits = -np.arange(10, dtype=np.float32)[None]
    (record,) = measured(logits, REFERENCE[:1], [rank])
    answer = record.outcomes[0].answer
    assert answer.rank == rank
    assert [answer.right(k) for k in (1, 5)] == [rank == 0, rank < 5]


def test_a_tie_counts_against_the_label() -> None:
    logits = np.zeros((1, 10), np.float32)
    (record,) = measured(logits, REFERENCE[:1], [0])
    assert record.outcomes[0].answer.top == (0, 1, 2, 3, 4)
    # Constant logits have class 0 first, and are never right, not even among five.
    assert not record.outcomes[0].answer.right(5)
    logits[0, [2, 7]] = 1
    (record,) = measured(logits, REFERENCE[:1], [7])
    assert record.outcomes[0].answer == Answer((2, 7, 0, 1, 3), 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 9])
def test_a_logit_that_is_no_number(value: float, place: int) -> None:
    artifact = REFERENCE.copy()
    artifact[2, place] = value
    records = measured(artifact)
    assert [record.outcomes[0].finite for record in records] == [i != 2 for i in range(6)]
    spoilt = records[2].outcomes[0]
    assert (spoilt.max_abs, spoilt.sum_abs, spoilt.noise, spoilt.cosine) == (None,) * 4
    if np.isnan(value):
        assert spoilt.answer.top[0] != place


def test_nan_at_the_label_is_never_right() -> None:
    artifact = np.full((1, 10), np.nan, np.float32)
    (record,) = measured(artifact, REFERENCE[:1], [0])
    assert record.outcomes[0].answer.rank is None
    assert not record.outcomes[0].answer.right(5)


def test_a_reference_that_is_no_number_spoils_the_outcome() -> None:
    reference = REFERENCE[:1].copy()
    reference[0, 3] = np.nan
    (record,) = measured(REFERENCE[:1], reference)
    assert not record.outcomes[0].finite
    assert record.signal == 0


def test_without_a_label_nothing_is_right() -> None:
    (record,) = measured(REFERENCE[:1], REFERENCE[:1], [None])
    assert record.label is None
    assert record.reference.rank is None
    assert not record.reference.right(5)


def test_a_record_is_of_its_image_alone() -> None:
    """Independent of the neighbours in a batch, as shards and resumed runs need."""
    artifact = (REFERENCE * np.float32(1.01)).astype(np.float32)
    together = measured(artifact)
    for index in range(6):
        one = slice(index, index + 1)
        alone = measure_images(NAMES[one], LABELS[one], [""], REFERENCE[one], [artifact[one]])
        assert alone == [together[index]]


def test_a_record_survives_json_to_the_last_bit() -> None:
    artifact = (REFERENCE / np.float32(3)).astype(np.float32)
    artifact[0, 0] = np.nan
    records = measured(artifact)
    again = msgspec.json.decode(msgspec.json.encode(records), type=list[ImageRecord])
    assert again == records


def test_few_classes_have_few_answers() -> None:
    (record,) = measured(REFERENCE[:1, :3], REFERENCE[:1, :3], [2])
    assert len(record.reference.top) == 3
    assert record.reference.right(5)
