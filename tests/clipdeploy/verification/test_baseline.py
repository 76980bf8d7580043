"""Compares PyTorch's own accuracy with the published or expected one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from scipy import stats

from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.clip.prompts import read_prompts
from clipdeploy.verification.baseline import (
    CONFIRMING,
    Expected,
    check_baseline,
    excluded_deficit,
    passing_hits,
    rules_out_baseline,
)
from clipdeploy.verification.records import Answer, ImageRecord
from clipdeploy.verification.results import Results, RunKey

Make = Callable[..., Results]
One = Callable[..., ImageRecord]


@pytest.fixture
def run_key(made: Make) -> RunKey:
    return made([]).run_key


@pytest.fixture
def answers(one: One) -> Callable[[int, int], list[Answer]]:
    """``count`` answers, of which ``wrong`` are wrong."""
    return lambda count, wrong: [one(i, reference=i >= wrong).reference for i in range(count)]


Answers = Callable[[int, int], Sequence[Answer]]


# The demo card's top-1 is 99.4 % on its 500 images.
@pytest.mark.parametrize(
    ("wrong", "status"),
    [(0, "confirmed"), (3, "confirmed"), (9, "missed"), (100, "missed"), (440, "implausible")],
)
def test_the_cards_accuracy(wrong: int, status: str, run_key: RunKey, answers: Answers) -> None:
    baseline = check_baseline(answers(500, wrong), run_key)
    assert baseline.status == status
    assert bool(baseline) == (status == "confirmed")
    assert f"{100 - wrong / 5:.2f} %" in baseline.sentence
    assert baseline.top1_interval is not None
    assert baseline.top1_interval.low <= 100 - wrong / 5 <= baseline.top1_interval.high


@pytest.mark.parametrize(("count", "wrong"), [(1, 0), (2, 0), (10, 0), (64, 0), (100, 2)])
def test_few_images_miss_nothing_and_confirm_nothing(
    count: int, wrong: int, run_key: RunKey, answers: Answers
) -> None:
    """99.4 % is well within the interval of so few images; so is 90 %."""
    baseline = check_baseline(answers(count, wrong), run_key)
    assert (baseline.status, bool(baseline)) == ("unconfirmed", True)
    assert baseline.excludes is not None
    assert baseline.excludes > CONFIRMING
    assert "too few images to confirm it: only a reference" in baseline.sentence
    assert f"of {count} image{'s'[: count > 1]} (99 % interval " in baseline.sentence


@pytest.mark.parametrize("count", [120, 130, 500])
def test_enough_images_confirm_and_say_what_they_exclude(
    count: int, run_key: RunKey, answers: Answers
) -> None:
    baseline = check_baseline(answers(count, 1), run_key)
    assert baseline.status == "confirmed"
    assert baseline.excludes == excluded_deficit(99.4, count)
    assert baseline.excludes is not None
    # Rounded up to a tenth of a point.
    shown = f"{baseline.excludes + 0.05:.1f}"
    assert f"a reference {shown} points worse would have been noticed" in baseline.sentence


@pytest.mark.parametrize("count", [1, 10, 130, 500, 5000])
@pytest.mark.parametrize("published", [100.0, 99.4, 86.02, 50.0, 0.0])
def test_what_is_excluded_is_what_the_check_calls_missed(count: int, published: float) -> None:
    fewest, most = passing_hits(published, count)
    excludes = excluded_deficit(published, count)
    if excludes is None:
        assert fewest == 0
        return
    share = (published - excludes) / 100
    # Exactly 95 %, by SciPy's binomial; 1e-10 of bisection in the share times up to 5000 images.
    assert stats.binom.cdf(fewest - 1, count, share) == pytest.approx(0.95, abs=1e-6)
    assert fewest <= most + 1
    # A deficit smaller by 0.01 points is detected with less probability.
    assert stats.binom.cdf(fewest - 1, count, share + 1e-4) < 0.95


def test_passing_is_what_the_check_lets_pass(run_key: RunKey, answers: Answers) -> None:
    for published in (99.4, 86.02, 60.0):
        fewest, most = passing_hits(published, 60)
        for hits in range(20, 61):
            baseline = check_baseline(answers(60, 60 - hits), run_key, Expected("user", published))
            assert bool(baseline) == (fewest <= hits <= most), (published, hits)


def test_nothing_can_be_excluded_by_one_image_or_below_nothing(
    run_key: RunKey, answers: Answers
) -> None:
    assert excluded_deficit(86.02, 1) is None
    assert excluded_deficit(0.0, 50_000) is None
    baseline = check_baseline(answers(1, 0), run_key, Expected("user", 86.02))
    assert (baseline.status, baseline.excludes) == ("unconfirmed", None)
    assert "a worse reference would not have been noticed" in baseline.sentence


def test_one_image_of_each_imagenet_class_is_enough_for_every_card_and_half_is_not() -> None:
    for card in cards.all_cards():
        if card.classes == 1000 and card.top1 is not None:
            enough, half = (excluded_deficit(card.top1, n) for n in (1000, 500))
            assert enough is not None
            assert half is not None
            assert enough <= CONFIRMING < half


def test_copies_of_an_image_confirm_nothing(run_key: RunKey, answers: Answers) -> None:
    copied = answers(1, 0) * 600
    # As different images they would confirm; as copies of one they do not.
    assert check_baseline(copied, run_key).status == "confirmed"
    baseline = check_baseline(copied, run_key, different=copied[:1])
    assert baseline.status == "unconfirmed"
    assert "of 1 image (" in baseline.sentence


CARD = "clip-vit-base-p16"
FIFTY = (50,) * 1000


@pytest.fixture
def imagenet(made: Make) -> RunKey:
    card = cards.find(CARD)
    names = tuple(name for name, _ in cards.class_names(card))
    return made([], model=card.name, images=50_000, classes=1000, class_names=names).run_key


def whole(top1: float, top5: float = 97.76, count: int = 50_000) -> list[Answer]:
    """Answers with these accuracies in percent."""
    first, five = round(count * top1 / 100), round(count * top5 / 100)
    ranks = [0] * first + [1] * (five - first) + [5] * (count - five)
    return [Answer((0, 1, 2, 3, 4), rank) for rank in ranks]


# The card's accuracies are 86.02 and 97.76.
@pytest.mark.parametrize(
    ("top1", "top5", "status"),
    [
        (86.02, 97.76, "confirmed"),
        (86.024, 97.756, "confirmed"),
        (86.026, 97.76, "unconfirmed"),
        (86.02, 97.752, "unconfirmed"),
        (85.94, 97.76, "unconfirmed"),
        (86.12, 97.76, "unconfirmed"),
        (85.918, 97.76, "missed"),
        (86.122, 97.76, "missed"),
        (85.72, 97.76, "missed"),
        (86.02, 97.64, "missed"),
        (0.1, 0.5, "implausible"),
    ],
)
def test_on_the_whole_set_only_rounding_is_left(
    top1: float, top5: float, status: str, imagenet: RunKey
) -> None:
    baseline = check_baseline(whole(top1, top5), imagenet, per_class=FIFTY)
    assert baseline.status == status
    if status == "implausible":
        return
    assert baseline.excludes == pytest.approx(0.1)
    gap = max(abs(top1 - 86.02), abs(top5 - 97.76))
    said = {
        "confirmed": "equal after rounding",
        "unconfirmed": f"{gap:.3f} points apart: other versions of decoder and kernels",
        "missed": f"{gap:.3f} points apart, too far for chance",
    }
    assert said[status] in baseline.sentence


def test_anything_less_than_the_whole_set_is_a_sample(imagenet: RunKey) -> None:
    """0.3 points too low: the whole set detects it, a sample of the same size does not."""
    low = whole(85.72)
    assert check_baseline(low, imagenet, per_class=FIFTY).status == "missed"
    uneven = (49, 51, *FIFTY[2:])
    timm = replace(imagenet, recipe=Recipe(resize="timm"))
    fewer = replace(imagenet, images=50_001)
    for run_key, per_class, expected in (
        (imagenet, (), Expected()),
        (imagenet, uneven, Expected()),
        (imagenet, FIFTY[:-1], Expected()),
        (imagenet, FIFTY, Expected("user", 86.02, 97.76)),
        # Another crop than the published one, and an image that could not be read.
        (timm, FIFTY, Expected()),
        (fewer, FIFTY, Expected()),
    ):
        baseline = check_baseline(low, run_key, expected, per_class=per_class)
        assert baseline.status == "confirmed"
        assert "a reference 0.7 points worse would have been noticed" in baseline.sentence


def test_copies_count_on_the_whole_set_as_they_were_published(imagenet: RunKey) -> None:
    answers = whole(86.02)
    baseline = check_baseline(answers, imagenet, per_class=FIFTY, different=answers[:-9])
    assert baseline.status == "confirmed"
    assert "whole validation set" in baseline.sentence


@pytest.mark.parametrize(
    ("classes", "count", "wrong", "status"),
    [
        # With so few images of two classes, no number of right answers differs from guessing.
        (2, 1, 0, "unconfirmed"),
        (2, 1, 1, "unconfirmed"),
        (2, 6, 0, "unconfirmed"),
        (2, 20, 5, "unconfirmed"),
        (2, 20, 0, "unpublished"),
        (2, 500, 250, "implausible"),
        (2, 500, 100, "unpublished"),
        (1000, 1, 1, "unconfirmed"),
        (1000, 50, 50, "implausible"),
    ],
)
def test_too_few_images_are_not_called_guessing(
    classes: int, count: int, wrong: int, status: str, made: Make, answers: Answers
) -> None:
    names = tuple(f"class {number}" for number in range(classes))
    run_key = made([], classes=classes, class_names=names).run_key
    for expected in (Expected(), Expected("none")):
        baseline = check_baseline(answers(count, wrong), run_key, expected)
        skipped = status == "unpublished" and expected.source == "none"
        assert baseline.status == ("skipped" if skipped else status)
        assert bool(baseline) == (status != "implausible")
        assert ("guessing" in baseline.sentence) == (status in ("unconfirmed", "implausible"))


def test_too_good_is_a_miss_too(run_key: RunKey, answers: Answers) -> None:
    baseline = check_baseline(answers(500, 3), run_key, Expected("user", 90.0))
    assert baseline.status == "missed"
    assert "90.00 % is expected" in baseline.sentence


def test_top5_counts_too(run_key: RunKey, answers: Answers) -> None:
    """Wrong answers here have the label in second place: top-5 is 100 %."""
    expected = Expected("user", 99.4, 90.0)
    baseline = check_baseline(answers(500, 3), run_key, expected)
    assert baseline.status == "missed"
    assert "top-5" in baseline.sentence


def test_nothing_to_compare_with(made: Make, answers: Answers) -> None:
    right = answers(500, 3)
    fine_tuned = made([], classes=3, class_names=("cat", "dog", "owl")).run_key
    assert check_baseline(right, fine_tuned).status == "unpublished"
    assert check_baseline(right, fine_tuned)
    for changes in ({"labelled": False}, {"random_weights": True}):
        baseline = check_baseline(right, made([], **changes).run_key)
        assert (baseline.status, bool(baseline)) == ("skipped", True)


def test_guessing_is_implausible_whatever_is_expected(
    made: Make, run_key: RunKey, answers: Answers
) -> None:
    guesses = answers(500, 450)
    for expected in (Expected(), Expected("none"), Expected("user", 10.0)):
        assert check_baseline(guesses, run_key, expected).status == "implausible"
    fine_tuned = made([], class_names=("a",) * 10).run_key
    assert check_baseline(guesses, fine_tuned).status == "implausible"


def test_none_skips_the_comparison(run_key: RunKey, answers: Answers) -> None:
    baseline = check_baseline(answers(500, 100), run_key, Expected("none"))
    assert (baseline.status, bool(baseline)) == ("skipped", True)


def test_only_a_certain_miss_ends_a_first_look(run_key: RunKey, answers: Answers) -> None:
    assert not rules_out_baseline(answers(256, 2), run_key, Expected())
    # A miss, but one in a few hundred such samples of a correct set: not yet certain.
    assert check_baseline(answers(256, 5), run_key).status == "missed"
    assert not rules_out_baseline(answers(256, 5), run_key, Expected())
    assert rules_out_baseline(answers(256, 60), run_key, Expected())
    assert not rules_out_baseline(answers(256, 60), run_key, Expected("none"))
    assert not rules_out_baseline(answers(256, 60), run_key, Expected("user", 80.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("card", Expected("card")),
        ("none", Expected("none")),
        ("86.02", Expected("user", 86.02)),
        ("86.02,97.76", Expected("user", 86.02, 97.76)),
        ("0", Expected("user", 0.0)),
    ],
)
def test_what_can_be_expected(text: str, expected: Expected) -> None:
    assert Expected.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "cards", "101", "-1", "86,97,99", "86;97", "nan", "86,", "inf"]
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(UsageError, match="is not an accuracy"):
        Expected.parse(text)


@pytest.mark.parametrize(
    ("present", "status"), [(0, "missed"), (9, "unpublished"), (4, "unpublished")]
)
def test_a_part_of_the_classes_has_no_published_accuracy(
    present: int, status: str, run_key: RunKey, answers: Answers
) -> None:
    run_key = replace(run_key, partial_classes=present)
    baseline = check_baseline(answers(500, 20), run_key)
    assert baseline.status == status
    assert ("of the 10 classes" in baseline.sentence) == (present > 0)


def test_a_few_absent_classes_are_no_excuse(run_key: RunKey, answers: Answers) -> None:
    """20 of 1000 classes without images change the accuracy by at most 2 points."""
    card = cards.find("clip-vit-base-p16")
    names = tuple(name for name, _ in cards.class_names(card))
    many = replace(run_key, model=card.name, classes=1000, class_names=names)
    assert check_baseline(answers(500, 0), replace(many, partial_classes=980)).status == "missed"
    assert check_baseline(answers(500, 0), replace(many, partial_classes=100)).status == (
        "unpublished"
    )


# --- zero-shot classifiers

B16 = "openai/clip-vit-base-patch16"


@pytest.fixture
def zero_shot(run_key: RunKey) -> RunKey:
    """ImageNet's classes with OpenAI's templates, of OpenAI's ViT-B/16: 68.34 %."""
    names = tuple(name for name, _ in cards.imagenet_classes())
    return replace(
        run_key,
        model="vit-p16-224px-w768-d12-h12-e512",
        classes=1000,
        class_names=names,
        clip=B16,
        prompts=read_prompts("imagenet").sha256,
    )


@pytest.mark.parametrize(
    ("wrong", "status"), [(633, "confirmed"), (680, "confirmed"), (800, "missed"), (500, "missed")]
)
def test_the_published_zero_shot_accuracy(
    wrong: int, status: str, zero_shot: RunKey, answers: Answers
) -> None:
    baseline = check_baseline(answers(2000, wrong), zero_shot)
    assert (baseline.status, baseline.published_top1, baseline.published_top5) == (
        status,
        68.34,
        None,
    )
    assert "68.34 % was published" in baseline.sentence
    assert rules_out_baseline(answers(2000, 1000), zero_shot, Expected())


def test_the_whole_set_is_a_sample_of_what_another_program_measured(
    zero_shot: RunKey, answers: Answers
) -> None:
    whole = replace(zero_shot, images=50_000)
    # 68.25 %, 0.09 points less: no two programs agree on every image.
    baseline = check_baseline(answers(50_000, 15_875), whole, per_class=[50] * 1000)
    assert baseline.status == "confirmed"
    assert "whole validation set" not in baseline.sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": read_prompts("imagenet", "simple").sha256}, f"of {B16} is published for "),
        ({"clip": ""}, "no zero-shot accuracy is published for this CLIP"),
        ({"clip": "acme/clip"}, "no zero-shot accuracy is published for this CLIP"),
    ],
)
def test_other_texts_and_other_clips_have_no_published_accuracy(
    change: dict[str, str], sentence: str, zero_shot: RunKey, answers: Answers
) -> None:
    # 50 %, which would be a miss.
    baseline = check_baseline(answers(2000, 1000), replace(zero_shot, **change))
    assert (baseline.status, bool(baseline)) == ("unpublished", True)
    assert sentence in baseline.sentence
    assert not rules_out_baseline(answers(2000, 1000), replace(zero_shot, **change), Expected())


def test_a_part_of_imagenet_has_no_published_zero_shot_accuracy(
    zero_shot: RunKey, answers: Answers
) -> None:
    baseline = check_baseline(answers(2000, 1000), replace(zero_shot, partial_classes=100))
    assert baseline.status == "unpublished"
    assert "100 of the 1,000 classes" in baseline.sentence
