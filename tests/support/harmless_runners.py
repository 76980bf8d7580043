"""Runners equivalent to a correct graph, with other types, memory, batches or rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from engine_faults import ProfileRunner, Profiles
from numpy.typing import NDArray

from clipdeploy.runners import Runner
from clipdeploy.runners.base import Closing, Images, Logits, in_parts

__all__ = ["HARMLESS_RUNNERS"]

Change = Callable[[Logits, int], NDArray[Any]]


class _Changed(Closing):
    """Changes the logits (B, K) of a correct runner, given the number of the call."""

    def __init__(self, sound: Runner, change: Change) -> None:
        self._sound, self._change, self._number = sound, change, 0
        self.name, self.input, self.batches = sound.name, sound.input, sound.batches

    def __call__(self, images: Images) -> Any:
        self._number += 1
        return self._change(self._sound(images), self._number)


class _OwnMemory(Closing):
    """Writes all logits to the same memory."""

    def __init__(self, sound: Runner) -> None:
        self._sound, self._memory = sound, np.zeros((512, 10), np.float32)
        self.name, self.input, self.batches = sound.name, sound.input, sound.batches

    def __call__(self, images: Images) -> Logits:
        self._memory[: len(images)] = self._sound(images)
        return self._memory[: len(images)]


class _Parts(Closing):
    """A runner with a minimum and a maximum batch size, without profiles."""

    def __init__(self, sound: Runner, smallest: int, largest: int) -> None:
        self._sound = sound
        self.name, self.input = sound.name, sound.input
        self.batches: tuple[int, int | None] = (smallest, largest)

    def __call__(self, images: Images) -> Logits:
        return in_parts(self._sound, images, [self.batches])


def _read_only(logits: Logits, number: int) -> Logits:
    logits.flags.writeable = False
    return logits


def _strided(logits: Logits, number: int) -> Logits:
    return np.repeat(logits, 2, axis=1)[:, ::2]


def _rounding(share: float, seed: Callable[[Logits, int], int]) -> Change:
    """Add noise of ``share`` times the logits' root mean square, seeded with ``seed``."""

    def change(logits: Logits, number: int) -> Logits:
        generator = np.random.default_rng(seed(logits, number))
        noise = generator.normal(0, share * np.sqrt((logits**2).mean()), logits.shape)
        return (logits + noise).astype(np.float32)

    return change


def _by_size(logits: Logits, number: int) -> int:
    return len(logits)


def _by_call(logits: Logits, number: int) -> int:
    return number


def _changed(change: Change) -> Callable[[Runner], Runner]:
    return lambda sound: _Changed(sound, change)


def _engine(*profiles: tuple[int, int, int]) -> Callable[[Runner], Runner]:
    return lambda sound: ProfileRunner(sound, sound.input, profiles)


def _rounding_engine(share: float, profiles: Profiles) -> Callable[[Runner], Runner]:
    """An engine whose profiles use different kernels with different rounding."""

    def mistake(logits: Logits, profile: int, batches: Any, kept: Any) -> Logits:
        generator = np.random.default_rng((profile, len(logits)))
        noise = generator.normal(0, share * np.sqrt((logits**2).mean()), logits.shape)
        return (logits + noise).astype(np.float32)

    return lambda sound: ProfileRunner(sound, sound.input, profiles, mistake)


_THREE: Profiles = ((1, 1, 4), (2, 8, 16), (16, 32, 64))

HARMLESS_RUNNERS: dict[str, tuple[str, Callable[[Runner], Runner]]] = {
    "logits in float64": ("fp32", _changed(lambda x, _: x.astype(np.float64))),
    "logits in float16": ("fp16", _changed(lambda x, _: x.astype(np.float16))),
    "logits in Fortran's order": ("fp32", _changed(lambda x, _: np.asfortranarray(x))),
    "logits with a stride": ("fp32", _changed(_strided)),
    "logits that are read only": ("fp32", _changed(_read_only)),
    "the same memory for every answer": ("fp32", _OwnMemory),
    # float32: 24 bits, sums of 100 terms in another order
    "float32 rounding by the batch size": ("fp32", _changed(_rounding(1e-6, _by_size))),
    "float32 rounding in every call": ("fp32", _changed(_rounding(1e-6, _by_call))),
    # float16: 11 bits; the correct graph has 60 dB against float32
    "float16 rounding by the batch size": ("fp16", _changed(_rounding(5e-4, _by_size))),
    "float16 rounding in every call": ("fp16", _changed(_rounding(5e-4, _by_call))),
    # int8: 41 dB against float32, and 61 dB between two batch sizes in ONNX Runtime
    "int8 rounding by the batch size": ("int8", _changed(_rounding(3e-3, _by_size))),
    "int8 rounding in every call": ("int8", _changed(_rounding(3e-3, _by_call))),
    "a largest batch of 8": ("fp32", lambda sound: _Parts(sound, 1, 8)),
    "a smallest batch of 4": ("fp32", lambda sound: _Parts(sound, 4, 24)),
    "batches of 16 only": ("fp32", lambda sound: _Parts(sound, 16, 16)),
    "one image at a time": ("fp32", lambda sound: _Parts(sound, 1, 1)),
    "an engine with one profile": ("fp32", _engine((1, 8, 64))),
    "an engine with a fixed batch": ("fp32", _engine((8, 8, 8))),
    "an engine with a smallest batch of 4": ("fp32", _engine((4, 8, 16))),
    "an engine with three profiles": ("fp32", _engine(*_THREE)),
    "an engine with two alike": ("fp32", _engine((1, 8, 16), (1, 8, 16))),
    "an engine with a gap": ("fp32", _engine((1, 1, 1), (8, 16, 32))),
    "an engine with a large profile": ("fp32", _engine((1, 16, 200))),
    # TF32: 11 bits, like float16
    "an fp32 engine that rounds by profile": ("fp32", _rounding_engine(3e-4, _THREE)),
    "an fp16 engine that rounds by profile": ("fp16", _rounding_engine(5e-4, _THREE)),
    "an int8 engine that rounds by profile": ("int8", _rounding_engine(3e-3, _THREE)),
}
