"""Simulated TensorRT engines with batch profiles, one fault each.

The logits are those of a correct graph.  Faults concern the state of an execution context, which
differs between profiles, batch sizes and calls: shapes, buffers and recorded CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.passport import TensorSpec
from clipdeploy.runners.base import Closing, Images, Logits, batch_ranges, best_profile, in_parts

__all__ = ["ENGINE_FAULTS", "EngineFault", "ProfileRunner", "Profiles"]

Profiles = tuple[tuple[int, int, int], ...]
THREE: Profiles = ((1, 1, 4), (2, 8, 16), (16, 32, 64))
OVERLAPPING: Profiles = ((1, 8, 16), (1, 16, 16))
ONE: Profiles = ((1, 8, 16),)


@dataclass
class Context:
    """State that a simulated engine keeps between calls."""

    number: int = 0
    profile: int | None = None
    batch: int = 0
    buffer: NDArray[np.float32] = field(default_factory=lambda: np.zeros((256, 10), np.float32))
    recorded: dict[tuple[int, int], NDArray[np.float32]] = field(default_factory=dict)


# (correct logits (B, K), profile index and its batch sizes, state) -> logits (B, K).
Mistake = Callable[[Logits, int, tuple[int, int, int], Context], Logits]


class ProfileRunner(Closing):
    """Runs a batch in the profile with the nearest optimal size, like an engine's runner."""

    def __init__(
        self,
        sound: Callable[[Images], Logits],
        spec: TensorSpec,
        profiles: Profiles,
        mistake: Mistake = lambda logits, *_: logits,
    ) -> None:
        self._sound, self._mistake, self._context = sound, mistake, Context()
        self.profiles = profiles
        self.batches: tuple[int, int | None] = (
            min(low for low, _, _ in profiles),
            max(high for _, _, high in profiles),
        )
        self.name, self.input = "TensorRT stand-in", spec

    def __call__(self, images: Images) -> Logits:
        """See :class:`clipdeploy.runners.Runner`."""
        return in_parts(
            lambda part: self._run(best_profile(self.profiles, len(part)), part),
            images,
            batch_ranges(self),
        )

    def run_in(self, profile: int, images: Images) -> Logits:
        """See :class:`clipdeploy.runners.Runner`."""
        smallest, _, largest = self.profiles[profile]
        return in_parts(lambda part: self._run(profile, part), images, [(smallest, largest)])

    def _run(self, profile: int, images: Images) -> Logits:
        kept, logits = self._context, self._sound(images)
        given = self._mistake(logits.copy(), profile, self.profiles[profile], kept)
        kept.number, kept.profile, kept.batch = kept.number + 1, profile, len(images)
        kept.buffer[: len(logits)] = logits
        return given


@dataclass(frozen=True)
class EngineFault:
    """A fault that has an effect on ``batch`` images in the profile with index ``profile``.

    ``after``: (profile, batch) of the calls that must come before.
    """

    mistake: Mistake
    profiles: Profiles
    profile: int
    batch: int
    after: tuple[tuple[int, int], ...] = ()


def _rolled(logits: Logits) -> Logits:
    return np.roll(logits, 1, axis=1)


def _in_profile(number: int, change: Callable[[Logits], Logits] = _rolled) -> Mistake:
    return lambda logits, profile, batches, kept: change(logits) if profile == number else logits


def _at_batch(
    which: Callable[[int, tuple[int, int, int]], bool], number: int | None = None
) -> Mistake:
    def mistake(
        logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
    ) -> Logits:
        here = number is None or profile == number
        return _rolled(logits) if here and which(len(logits), batches) else logits

    return mistake


def _stale_buffer(
    logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
) -> Logits:
    """Does not copy the output of a batch smaller than the previous one."""
    return kept.buffer[: len(logits)].copy() if len(logits) < kept.batch else logits


def _old_shape(
    logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
) -> Logits:
    """Computes the previous number of rows after a switch of the profile."""
    if kept.profile is not None and profile != kept.profile:
        logits[kept.batch :] = kept.buffer[kept.batch : len(logits)]
    return logits


def _too_early(
    logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
) -> Logits:
    """Copies the output before the launch has ended, after a switch of the profile."""
    if kept.profile is not None and profile != kept.profile:
        return kept.buffer[: len(logits)].copy()
    return logits


def _replayed(logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context) -> Logits:
    """A recorded launch reads the input of the recording."""
    return kept.recorded.setdefault((profile, len(logits)), logits).copy()


def _filled_in_front(
    logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
) -> Logits:
    """Pads the batch to the optimal size at the front, but takes the first rows."""
    missing = max(batches[1] - len(logits), 0)
    return np.concatenate([np.repeat(logits[:1], missing, 0), logits])[: len(logits)]


def _padding_in_mean(
    logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
) -> Logits:
    """Mixes the rows of a batch with its padding if the size is not a multiple of 8."""
    missing = -len(logits) % 8
    return (logits * len(logits) + missing * logits.mean(axis=0)) / (len(logits) + missing)


def _remainder_not_written(
    logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
) -> Logits:
    logits[len(logits) // 8 * 8 :] = 0
    return logits


def _last_row_of_largest(
    logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
) -> Logits:
    if len(logits) == batches[2]:
        logits[-1] = kept.buffer[len(logits) - 1]
    return logits


def _every_other_call(
    logits: Logits, profile: int, batches: tuple[int, int, int], kept: Context
) -> Logits:
    """Copies the wrong one of two output buffers."""
    return kept.buffer[: len(logits)].copy() if kept.number % 2 else logits


def _coarse(logits: Logits) -> Logits:
    return np.round(logits * 2) / 2


def _infinite(logits: Logits) -> Logits:
    logits[:, 0] = np.inf
    return logits


ENGINE_FAULTS: dict[str, EngineFault] = {
    "the smallest profile is wrong": EngineFault(_in_profile(0), THREE, 0, 4),
    "the middle profile is wrong": EngineFault(_in_profile(1), THREE, 1, 8),
    "the largest profile is wrong": EngineFault(_in_profile(2), THREE, 2, 64),
    "a profile that is chosen last is wrong": EngineFault(_in_profile(1), OVERLAPPING, 1, 2),
    "another profile's sign": EngineFault(_in_profile(2, np.negative), THREE, 2, 32),
    "a profile rounds to halves": EngineFault(_in_profile(2, _coarse), THREE, 2, 32),
    "a profile overflows": EngineFault(_in_profile(2, _infinite), THREE, 2, 32),
    "wrong at the largest batch of each profile": EngineFault(
        _at_batch(lambda batch, profile: batch == profile[2]), THREE, 2, 64
    ),
    "wrong at the smallest batch of each profile": EngineFault(
        _at_batch(lambda batch, profile: batch == profile[0]), THREE, 2, 16
    ),
    "wrong at the best batch of the last profile": EngineFault(
        _at_batch(lambda batch, profile: batch == profile[1], 2), THREE, 2, 32
    ),
    "wrong at the largest batch of the middle profile": EngineFault(
        _at_batch(lambda batch, profile: batch == profile[2], 1), THREE, 1, 16
    ),
    "wrong at the smallest batch of the last profile": EngineFault(
        _at_batch(lambda batch, profile: batch == profile[0], 2), THREE, 2, 16
    ),
    "wrong between the smallest and the best batch": EngineFault(
        _at_batch(lambda batch, profile: profile[0] < batch < profile[1], 1), THREE, 1, 5
    ),
    "wrong above the best batch": EngineFault(
        _at_batch(lambda batch, profile: batch > profile[1]), ONE, 0, 12
    ),
    "a smaller batch gets the output of the larger one before": EngineFault(
        _stale_buffer, ONE, 0, 8, ((0, 16),)
    ),
    "a switch of the profile keeps the old shape": EngineFault(_old_shape, THREE, 2, 32, ((1, 8),)),
    "the output is copied too early after a switch": EngineFault(
        _too_early, THREE, 1, 8, ((2, 32),)
    ),
    "a recorded launch reads the input of its recording": EngineFault(
        _replayed, ONE, 0, 16, ((0, 16),)
    ),
    "short batches are filled up in front": EngineFault(_filled_in_front, ONE, 0, 4),
    "rows that fill a batch up leak into the others": EngineFault(_padding_in_mean, ONE, 0, 12),
    "rows after the last multiple of 8 are not written": EngineFault(
        _remainder_not_written, ONE, 0, 12
    ),
    "the last row of the largest batch is stale": EngineFault(
        _last_row_of_largest, THREE, 2, 64, ((2, 64),)
    ),
    "every second call gives the output before": EngineFault(
        _every_other_call, ONE, 0, 16, ((0, 16),)
    ),
}
