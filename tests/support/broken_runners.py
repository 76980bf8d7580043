"""Runners that return wrong logits, one fault each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from clipdeploy.runners import Runner
from clipdeploy.runners.base import Closing

__all__ = ["RUN_FAULTS", "BrokenRunner", "Spoil"]

Logits = NDArray[np.float32]
# (logits of a call, number of the full batch, correct logits of the previous call) -> wrong logits.
Spoil = Callable[[Logits, int, Logits], Logits]


class BrokenRunner(Closing):
    """Changes the logits of a correct runner.

    Calls with ``full`` images that differ from the previous such call are numbered from 0, so a
    fault can affect a batch once but not its repetition.  All other calls have number -1.
    """

    def __init__(self, sound: Runner, spoil: Spoil, full: int = 50) -> None:
        self._sound, self._spoil, self._full = sound, spoil, full
        self._number, self._last = 0, np.zeros((0, 0), np.float32)
        self._batch = b""
        self.name, self.input, self.batches = sound.name, sound.input, sound.batches

    def __call__(self, images: NDArray[np.float32]) -> Logits:
        """See :class:`clipdeploy.runners.Runner`."""
        logits, number = self._sound(images), -1
        if len(images) == self._full and images.tobytes() != self._batch:
            number, self._batch = self._number, images.tobytes()
            self._number += 1
        spoilt = self._spoil(logits.copy(), number, self._last)
        self._last = logits
        return spoilt


def _first_for_all(logits: Logits, number: int, last: Logits) -> Logits:
    return np.repeat(logits[:1], len(logits), axis=0)


def _put(value: float) -> Spoil:
    def spoil(logits: Logits, number: int, last: Logits) -> Logits:
        if number == 1:
            logits[3, 2] = value
        return logits

    return spoil


def _stale_image(logits: Logits, number: int, last: Logits) -> Logits:
    if number == 1:
        logits[0] = last[0]
    return logits


def _stale_batch(logits: Logits, number: int, last: Logits) -> Logits:
    known = min(len(last), len(logits))
    return np.concatenate([last[:known], logits[known:]]) if known else logits


def _two_swapped(logits: Logits, number: int, last: Logits) -> Logits:
    if number == 1:
        other = int(np.flatnonzero(logits.argmax(axis=1) != logits[0].argmax())[0])
        logits[[0, other]] = logits[[other, 0]]
    return logits


def _cut_at_the_wrong_end(logits: Logits, number: int, last: Logits) -> Logits:
    """Pads a small last batch at the front, but takes its first rows."""
    missing = len(last) - len(logits)
    if missing <= 0:
        return logits
    return np.concatenate([np.repeat(logits[:1], missing, axis=0), logits])[: len(logits)]


def _softmax(logits: Logits, number: int, last: Logits) -> Logits:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _one_hot(logits: Logits, number: int, last: Logits) -> Logits:
    return np.eye(logits.shape[1], dtype=np.float32)[logits.argmax(axis=1)]


def _one_image_is_nan(logits: Logits, number: int, last: Logits) -> Logits:
    if number == 0:
        logits[-1] = np.nan
    return logits


def _one_image_not_written(logits: Logits, number: int, last: Logits) -> Logits:
    if number == 1:
        logits[5] = 0
    return logits


# Expected finding: NaN, a proven drop, answers that do not repeat, or else the minimum of the
# largest difference, which is 5e-6 for the correct graph.
RUN_FAULTS: dict[str, tuple[Spoil, str | float]] = {
    "NaN in one logit": (_put(np.nan), "NaN"),
    "infinity in one logit": (_put(-np.inf), "NaN"),
    "NaN for one image": (_one_image_is_nan, "NaN"),
    "one image's result stale": (_stale_image, 1.0),
    "two images' results exchanged": (_two_swapped, 1.0),
    "one image's result not written": (_one_image_not_written, 1.0),
    "a whole batch stale": (_stale_batch, "not repeatable"),
    "every image one late": (lambda logits, *_: np.roll(logits, 1, axis=0), "not repeatable"),
    "the first image's result for all": (
        lambda x, *_: np.repeat(x[:1], len(x), 0),
        "not repeatable",
    ),
    "padding cut at the wrong end": (_cut_at_the_wrong_end, "not repeatable"),
    "zeros": (lambda logits, *_: np.zeros_like(logits), "regressed"),
    "a constant": (lambda logits, *_: np.full_like(logits, 3.5), "regressed"),
    "the classes rolled": (lambda logits, *_: np.roll(logits, 1, axis=1), "regressed"),
    "the logits' sign": (lambda logits, *_: -logits, "regressed"),
    "probabilities for logits": (_softmax, 1.0),
    "only the winner kept": (_one_hot, 1.0),
}
