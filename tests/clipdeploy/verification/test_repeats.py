"""Repeated calls: which ones are made, and what they show of unrepeatable artifacts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from clipdeploy.core.errors import ArtifactError, EngineError
from clipdeploy.core.passport import TensorSpec
from clipdeploy.runners.base import Closing, Images, Logits, batch_ranges, in_parts
from clipdeploy.verification.repeats import (
    Call,
    RepeatPlan,
    batch_sizes,
    excluded_share,
    repeat_calls,
)

Answers = Callable[[Images], Logits]
# Images of four numbers, and a classifier of ten classes without effects between images.
WEIGHT = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)


def sound(images: Images) -> Logits:
    logits: Logits = images @ WEIGHT
    return logits


class Classifier(Closing):
    """A classifier of images (B, 4), which has ``profiles`` if any are given."""

    name, input = "classifier", TensorSpec("image", "float32", ("batch", 4))

    def __init__(
        self, answers: Answers = sound, *profiles: tuple[int, int, int], fixed: int | None = None
    ) -> None:
        self._answers = answers
        self.profiles = profiles
        self.batches: tuple[int, int | None] = (1, None) if fixed is None else (fixed, fixed)
        if profiles:
            self.batches = min(p[0] for p in profiles), max(p[2] for p in profiles)
        self.asked: list[tuple[int, int | None]] = []

    def __call__(self, images: Images) -> Logits:
        self.asked.append((len(images), None))
        return in_parts(self._answers, images, batch_ranges(self))

    def run_in(self, profile: int, images: Images) -> Logits:
        self.asked.append((len(images), profile))
        return self._answers(images)


def images_of(count: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


def calls(runner: Classifier, images: int = 500, size: int = 16) -> dict[int, list[Call]]:
    plan = RepeatPlan(-(-images // size), size)
    return {
        number: list(plan.calls(number, min(size, images - number * size), runner))
        for number in range(plan.batches)
    }


@pytest.mark.parametrize(("images", "size"), [(500, 16), (380, 380), (130, 50), (64, 8), (3, 16)])
def test_images_are_asked_alone_by_twos_and_at_every_size(images: int, size: int) -> None:
    made = calls(Classifier(), images, size)
    flat = [call for each in made.values() for call in each]
    assert sum(call.kind == "alone" for call in flat) >= min(images, 100)
    mixed = [call for call in flat if call.kind == "mixed"]
    sizes = {each for each in (*range(2, 33), 48, 64, 96, 128) if each <= len(made) * size}
    assert {len(call.images) for call in mixed} == sizes
    twos = {
        (number, *sorted(call.images.tolist()))
        for number, each in made.items()
        for call in each
        if call.kind == "mixed" and len(call.images) == 2
    }
    assert len(twos) >= min(images - size % images, 340)
    # As many as the interval needs without a difference: z^2 / (n + z^2).
    different = len(made) + len(mixed)
    if images >= 64:
        assert excluded_share(different) <= max(100 * 3.85 / (images + 3.85), 1.0)
    for number, each in made.items():
        count = min(size, images - number * size)
        assert all(((call.images >= 0) & (call.images < count)).all() for call in each)
    # The calls depend on the number of the batch: a shard makes those of its batches.
    again = calls(Classifier(), images, size)
    for number, each in made.items():
        assert [(c.kind, c.images.tolist()) for c in each] == [
            (c.kind, c.images.tolist()) for c in again[number]
        ]


def test_late_batches_are_each_asked_once() -> None:
    made = calls(Classifier(), 50_000, 16)
    assert [call.kind for call in made[3000]] == ["alone"]
    assert sum(len(each) for each in made.values()) < 3125 + 550
    assert len({int(made[number][0].images[0]) for number in range(100, 200)}) > 5


def test_a_mixed_call_has_other_neighbours() -> None:
    for call in calls(Classifier())[0]:
        if call.kind == "mixed" and len(call.images) > 4:
            assert call.images.tolist() != sorted(call.images.tolist())
            rows, counts = np.unique(call.images, return_counts=True)
            assert counts.max() - counts.min() <= 1
            assert len(rows) == min(16, len(call.images))


def test_the_sizes_are_those_that_a_runner_takes() -> None:
    assert batch_sizes(Classifier(), 100) == (*range(2, 33), 48, 64, 96)
    assert batch_sizes(Classifier(), 20) == tuple(range(2, 21))
    assert batch_sizes(Classifier(fixed=16), 500) == batch_sizes(Classifier(fixed=16), 3) == (16,)
    assert batch_sizes(Classifier(sound, (1, 4, 8)), 3) == (2, 3, 7, 8)
    assert batch_sizes(Classifier(sound, (1, 4, 8)), 500) == tuple(range(2, 9))
    large = (*range(2, 33), 48, 64, 96, 128, 255, 256)
    assert batch_sizes(Classifier(sound, (1, 64, 256)), 500) == large
    # Between two profiles there is no batch.
    gap = Classifier(sound, (1, 1, 1), (8, 8, 10))
    assert batch_sizes(gap, 500) == (8, 9, 10)
    assert {len(call.images) for each in calls(gap).values() for call in each} == {1, 8, 9, 10, 16}


def test_every_profile_is_tried_at_its_ends_and_its_best() -> None:
    runner = Classifier(sound, (1, 1, 4), (2, 8, 16), (16, 32, 64))
    made = [call for each in calls(runner).values() for call in each if call.kind == "profile"]
    assert sorted((call.profile, len(call.images)) for call in made) == [
        *((0, size) for size in (1, 4)),
        *((1, size) for size in (2, 8, 16)),
        *((2, size) for size in (16, 32, 64)),
    ]
    with pytest.raises(EngineError, match="has no profile 0"):
        Closing().run_in(0, images_of(1))


def asked_again(runner: Classifier, images: int = 128) -> list[tuple[str, int, float | None]]:
    """The kind, size and worst share of every call of a run over ``count`` images."""
    found = []
    for number, each in calls(runner, images).items():
        batch = images_of(16, seed=number)
        first = runner(batch)
        for repeat in repeat_calls(runner, "a.onnx", batch, first, sound(batch), iter(each)):
            found.append((repeat.kind, repeat.size, repeat.worst))
    return found


def test_a_sound_classifier_repeats() -> None:
    shown = asked_again(Classifier())
    # Sums of four products in another kernel: 1e-7 of their size.
    assert all(worst is not None and worst < 1e-12 for *_, worst in shown)


def _at(size: int) -> Answers:
    return lambda images: sound(images) * (0.9 if len(images) == size else 1.0)


def _roll(images: Images) -> Logits:
    return np.roll(sound(images), 1, axis=0)


def _last_repeats(images: Images) -> Logits:
    logits = sound(images)
    logits[-1] = logits[-2] if len(logits) > 1 else logits[-1]
    return logits


def _mean_taken_off(images: Images) -> Logits:
    return sound(images - images.mean(axis=0))


def _content(images: Images) -> Logits:
    """About a tenth of all calls is wrong, whichever images are in it."""
    spoilt = float(np.abs(images).sum()) % 1 < 0.1
    return sound(images) * (-1 if spoilt else 1)


def _noise() -> Answers:
    generator = np.random.default_rng(0)
    return lambda images: sound(images) + generator.normal(size=(len(images), 10)).astype("f4")


FAULTS: dict[str, Callable[[], Classifier]] = {
    **{f"wrong at {size}": (lambda size=size: Classifier(_at(size))) for size in range(1, 33)},
    "wrong at 48": lambda: Classifier(_at(48)),
    "wrong at 64": lambda: Classifier(_at(64)),
    "wrong at 128": lambda: Classifier(_at(128)),
    "wrong above 64": lambda: Classifier(lambda x: sound(x) * (1 - 0.1 * (len(x) > 64))),
    "wrong above 16": lambda: Classifier(lambda x: sound(x) * (1 - 0.1 * (len(x) > 16))),
    "wrong at odd sizes": lambda: Classifier(lambda x: sound(x) * (1 - 0.1 * (len(x) % 2))),
    "a neighbour's answer": lambda: Classifier(_roll),
    "the last row repeats": lambda: Classifier(_last_repeats),
    "the batch's mean taken off": lambda: Classifier(_mean_taken_off),
    "whole calls by their content": lambda: Classifier(_content),
    "noise": lambda: Classifier(_noise()),
    "wrong at the largest batch": lambda: Classifier(_at(96), (1, 8, 96)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_in_some_call(name: str) -> None:
    shown = asked_again(FAULTS[name]())
    assert max(worst for *_, worst in shown if worst is not None) > 0.005


def test_a_profile_that_is_wrong_shows() -> None:
    class Engine(Classifier):
        def run_in(self, profile: int, images: Images) -> Logits:
            return sound(images) * (0.5 if profile == 1 else 1.0)

    shown = asked_again(Engine(sound, (1, 8, 16), (1, 16, 32)))
    bad = {(kind, size) for kind, size, worst in shown if worst is not None and worst > 0.2}
    assert bad == {("profile", 1), ("profile", 16), ("profile", 32)}


def test_logits_that_are_no_numbers_in_one_call_alone() -> None:
    def broken(images: Images) -> Logits:
        logits = sound(images)
        if len(images) == 5:
            logits[2, 3] = math.nan
        return logits

    shown = asked_again(Classifier(broken))
    assert [(kind, size) for kind, size, worst in shown if worst is None] == [("mixed", 5)]


@pytest.mark.parametrize("extra", [-1, 1, 16])
def test_more_or_fewer_rows_than_images_are_refused(extra: int) -> None:
    def padded(images: Images) -> Logits:
        return np.resize(sound(images), (len(images) + extra, 10))

    with pytest.raises(ArtifactError, match=rf"\({16 + extra}, 10\) for 16 images"):
        Classifier(padded)(images_of(16))
    # In one profile only.
    runner = Classifier(padded, (2, 8, 16))
    batch = images_of(16)
    every = [call for call in calls(runner)[0] if call.kind == "profile"]
    with pytest.raises(ArtifactError, match="gave logits of shape"):
        repeat_calls(runner, "a.engine", batch, sound(batch), sound(batch), iter(every))


def test_the_share_of_spoilt_calls_that_is_excluded() -> None:
    for count in (1, 10, 369, 5000):
        share = excluded_share(count) / 100
        assert (1 - share) ** count == pytest.approx(0.025)
    # One point is excluded from 368 calls on, as many as 380 images have.
    assert excluded_share(368) < 1.0 < excluded_share(366)
