"""Repeats a part of every run in other calls, to detect answers that depend on the call.

The interval of a drop assumes that the errors of images are independent, and that results measured
at one batch size hold for all. Neither is true for a graph that mixes the rows of a batch, or is
wrong at one batch size, in one profile of an engine, at random, or for a whole batch at once.
These calls are repeated, within the same run:

    again       the same batch
    alone       images one by one
    mixed       images of the batch with other neighbours: in pairs, and at every batch size
    profile     the same in each profile of an engine, at its smallest, optimal and largest batch

The logits r of each call are compared with the first ones x of the same images, relative to the
reference's y:

    noise = sum (r - x)^2,   signal = sum y^2,   both over the call's images

They may differ by the noise of the artifact's precision, see
:mod:`clipdeploy.verification.repeatability`. A fault that affects a share p of all calls, depending
on their content, appears in at least one of C calls on different images with probability
1 - (1 - p)^C; :func:`excluded_share` solves that for p. Pairs are the cheapest such calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import ArtifactError
from clipdeploy.runners import Runner
from clipdeploy.runners.base import runs_at_once

__all__ = ["Call", "Repeat", "RepeatPlan", "batch_sizes", "excluded_share", "repeat_calls"]

Kind = Literal["again", "alone", "mixed", "profile"]
Logits = NDArray[np.float32]

_SEED = 0
# The number of images, from the first on, that are repeated alone and in pairs. With one batch and
# one call for each size that makes 374 different calls; 368 exclude 1 % of all calls, as much as
# the interval excludes with 380 images.
_ALONE, _TWOS = 100, 340
# The number of batches that are repeated unchanged, and of those that sizes and profiles are spread
# over; a sequential run stops later than that.
_AGAIN, _SPREAD = 2, 8
# Every batch size up to the first number and some larger ones, none above the number of images.
_EVERY_SIZE, _LARGE = 32, (48, 64, 96, 128)
# The probability of missing a fault, the same as that of one side of a 95 % interval.
_MISS = 0.025


class Repeat(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A repeated call: ``size`` images at once, in an engine's ``profile``.

    ``noise`` and ``signal`` as in the module; ``worst`` is the largest noise / signal of an image,
    ``changed`` counts different top-1 answers. ``noise`` and ``worst`` are None if a logit is NaN
    or infinite in only one of the two calls.
    """

    kind: Kind
    size: int
    profile: int | None
    signal: float
    noise: float | None
    worst: float | None
    changed: int


@dataclass(frozen=True)
class Call:
    """Images of a batch, by their index in it, that are run in one call."""

    kind: Kind
    images: NDArray[np.int64]
    profile: int | None = None


def batch_sizes(runner: Runner, images: int) -> tuple[int, ...]:
    """Return the batch sizes above 1 to try: all up to 32 and some larger ones, at most ``images``.

    A runner's largest size is always tried.
    """
    smallest, largest = runner.batches
    sizes = {size for size in (*range(2, _EVERY_SIZE + 1), *_LARGE) if size <= images}
    sizes.add(smallest)
    if largest is not None:
        sizes |= {largest, largest - 1}
    return tuple(sorted(size for size in sizes if size > 1 and runs_at_once(runner, size)))


def _fewest(runner: Runner) -> int:
    """Return the smallest call with neighbours: 2 images, which a fixed batch is padded from.

    An engine's profiles may not include a batch of 2.
    """
    smallest, _ = runner.batches
    if smallest > 1 or runs_at_once(runner, 2):
        return 2
    return min((low for low, _, _ in runner.profiles if low > 1), default=2)


@dataclass(frozen=True)
class RepeatPlan:
    """The calls to repeat for each batch, the same in every run of ``batches`` batches of ``size``.

    They depend only on the number of the batch, so that shards and resumed runs repeat the same
    calls.
    """

    batches: int
    size: int

    def calls(self, number: int, count: int, runner: Runner) -> Iterator[Call]:
        """Yield the calls for batch ``number``, of which ``count`` images could be read."""
        generator = np.random.default_rng((_SEED, number))
        everything = np.arange(count)
        if number < _AGAIN:
            yield Call("again", everything)
        for index in range(min(count, _ALONE - number * self.size)):
            yield Call("alone", everything[index : index + 1])
        few = _fewest(runner)
        # A call with all images of the batch would be the batch itself.
        for index in range(min(count, _TWOS - number * self.size) if count > few else 0):
            yield Call("mixed", np.take(everything, range(index, index + few), mode="wrap"))
        if number * self.size >= max(_ALONE, _TWOS):
            yield Call("alone", generator.integers(count, size=1))
        early = min(_SPREAD, self.batches)
        if number >= early:
            return
        for size in batch_sizes(runner, self.batches * self.size)[number::early]:
            yield Call("mixed", _drawn(generator, count, size))
        shapes = [
            (index, size)
            for index, profile in enumerate(runner.profiles)
            for size in sorted(set(profile))
        ]
        for index, size in shapes[number::early]:
            yield Call("profile", _drawn(generator, count, size), index)


def _drawn(generator: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """Draw ``size`` of ``count`` images in random order, each equally often but for one."""
    rounds = [generator.permutation(count) for _ in range(-(-size // count))]
    return np.concatenate(rounds)[:size]


def repeat_calls(
    runner: Runner,
    name: str,
    images: NDArray[Any],
    first: Logits,
    reference: Logits,
    calls: Iterator[Call],
) -> tuple[Repeat, ...]:
    """Make the ``calls`` and compare them with the ``first`` logits (B, K) of the batch.

    ``images`` (B, ...) are the batch as the runner takes it, ``reference`` (B, K) the reference's
    logits of it.

    Raises:
        ArtifactError: a call gives logits of another shape; ``name`` is the artifact's.
    """
    made, answers = list(calls), []
    for call in made:
        inputs = _of(call, images)
        logits = runner(inputs) if call.profile is None else runner.run_in(call.profile, inputs)
        wanted = (len(call.images), first.shape[1])
        if logits.shape != wanted:
            raise ArtifactError(
                f"{name} gave logits of shape {logits.shape} for {wanted[0]} images, not {wanted}",
                hint="export it with a symbolic batch: it only works at some batch sizes",
            )
        # A copy: a runner may use the same memory for its next answer.
        answers.append(np.array(logits))
    return tuple(_compare(made, answers, first, reference)) if made else ()


def _of(call: Call, images: NDArray[Any]) -> NDArray[Any]:
    """Return the call's images; consecutive ones without a copy."""
    start, count = int(call.images[0]), len(call.images)
    if np.array_equal(call.images, np.arange(start, start + count)):
        return images[start : start + count]
    return images[call.images]


def _compare(
    calls: Sequence[Call], answers: Sequence[Logits], first: Logits, reference: Logits
) -> Iterator[Repeat]:
    """Compare all rows of all calls at once, since most calls have one or two rows."""
    rows = np.concatenate([call.images for call in calls])
    starts = np.cumsum([0, *(len(call.images) for call in calls)])[:-1]
    ours = np.concatenate(answers).astype(np.float64)
    sound, sound_first = np.isfinite(ours).all(axis=1), np.isfinite(first[rows]).all(axis=1)
    signal = np.nan_to_num((reference.astype(np.float64) ** 2).sum(axis=1))[rows]
    noise = np.zeros(len(rows))
    both = sound & sound_first
    noise[both] = ((ours[both] - first[rows[both]]) ** 2).sum(axis=1)
    share = noise / np.maximum(signal, np.finfo(np.float64).tiny)
    broken = np.logical_or.reduceat(sound != sound_first, starts)
    signals, noises = np.add.reduceat(signal, starts), np.add.reduceat(noise, starts)
    worst = np.maximum.reduceat(share, starts)
    changed = np.add.reduceat((ours.argmax(1) != first.argmax(1)[rows]).astype(np.int64), starts)
    for index, call in enumerate(calls):
        yield Repeat(
            kind=call.kind,
            size=len(call.images),
            profile=call.profile,
            signal=float(signals[index]),
            noise=None if broken[index] else float(noises[index]),
            worst=None if broken[index] else float(worst[index]),
            changed=int(changed[index]),
        )


def excluded_share(calls: int) -> float:
    """Return the largest share of calls, in percent, that an undetected fault may affect.

    A fault of a larger share appears in at least one of ``calls`` calls on different images with
    probability 97.5 %: (1 - p)^calls = 0.025.
    """
    return 100.0 * (1.0 - float(_MISS ** (1.0 / max(calls, 1))))
