"""Random faults: noise, active dropout, and occasionally wrong batches.

Random operators in a graph have seeds: ONNX Runtime draws the same numbers in each new session, and
different ones in each call.  "By its images" means that a checksum of the batch's pixels decides:
the same batch is wrong every time, and another batch with the same image is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from batch_faults import BatchFault
from broken_runners import Logits, Spoil
from graph_edits import Edit, Steps
from onnx import ModelProto

__all__ = ["CALL_FAULTS", "RANDOM_FAULTS", "SPOILT_BATCHES"]

Change = Callable[[Steps], str]


def _on(value: str, change: Change) -> Edit:
    def edit(model: ModelProto) -> None:
        steps = Steps(model, value)
        steps.finish(change(steps))

    return edit


def _noise(scale: float) -> Change:
    def change(steps: Steps) -> str:
        noise = steps.op("RandomNormalLike", steps.value, scale=scale, seed=1.0)
        return steps.op("Add", steps.value, noise)

    return change


def _dropout(share: float) -> Change:
    """Set elements to zero at this rate and scale the others up accordingly."""

    def change(steps: Steps) -> str:
        drawn = steps.op("RandomUniformLike", steps.value, seed=2.0)
        dropped = steps.op("Less", drawn, steps.like(share, steps.value))
        kept = steps.op("Mul", steps.value, steps.like(1 / (1 - share), steps.value))
        return steps.op("Where", dropped, steps.like(0.0, steps.value), kept)

    return change


def _bernoulli(steps: Steps) -> str:
    rates = steps.op("Add", steps.op("Mul", steps.value, steps.const(0.0)), steps.const(0.8))
    return steps.op("Mul", steps.value, steps.op("Bernoulli", rates, seed=3.0))


def _some_images(share: float) -> Change:
    """Rotate the logits of images by one class at this rate."""

    def change(steps: Steps) -> str:
        column = steps.op("Slice", steps.value, *(steps.const([n], np.int64) for n in (0, 1, 1)))
        drawn = steps.op("RandomUniformLike", column, seed=4.0)
        return steps.op(
            "Where", steps.op("Less", drawn, steps.const(share)), _rolled(steps), steps.value
        )

    return change


def _whole_batches(share: float) -> Change:
    def change(steps: Steps) -> str:
        drawn = steps.op("RandomUniform", shape=[1], seed=5.0, dtype=1)
        return steps.op(
            "Where", steps.op("Less", drawn, steps.const(share)), _rolled(steps), steps.value
        )

    return change


def _by_images(share: float, wrong: Change, least: int = 1, factor: float = 137.0) -> Change:
    """Spoil batches of at least ``least`` images at this rate, by a checksum of the pixels."""

    def change(steps: Steps) -> str:
        total = steps.op("ReduceSum", steps.op("Cast", "image", to=11), keepdims=0)
        scaled = steps.op("Mul", steps.op("Abs", total), steps.const(factor, np.float64))
        part = steps.op("Sub", scaled, steps.op("Floor", scaled))
        spoilt = steps.op("Less", part, steps.const(share, np.float64))
        size = steps.op("Shape", steps.value, start=0, end=1)
        large = steps.op("GreaterOrEqual", size, steps.const([least], np.int64))
        both = steps.op("And", spoilt, large)
        return steps.op("Where", both, wrong(steps), steps.value)

    return change


def _rolled(steps: Steps) -> str:
    return steps.op("Gather", steps.value, steps.const(np.roll(range(10), 1), np.int64), axis=1)


def _negative(steps: Steps) -> str:
    return steps.op("Neg", steps.value)


_ANY = (1, 8, 16)
RANDOM_FAULTS: dict[str, BatchFault] = {
    "noise on the logits": BatchFault(_on("logits", _noise(3.0)), _ANY),
    "a little noise on the logits": BatchFault(_on("logits", _noise(0.3)), _ANY),
    "noise on the class token": BatchFault(_on("vit/Gather", _noise(0.5)), _ANY),
    "noise on a residual": BatchFault(_on("blocks.5/Add", _noise(0.5)), _ANY),
    "dropout before the head": BatchFault(_on("norm", _dropout(0.5)), _ANY),
    "dropout in an MLP": BatchFault(_on("blocks.5.mlp/Gelu", _dropout(0.5)), _ANY),
    "dropout on the attention": BatchFault(_on("blocks.5.attn/Softmax", _dropout(0.3)), _ANY),
    "dropout on the tokens": BatchFault(_on("blocks.5.norm1", _dropout(0.2)), _ANY),
    "a Bernoulli mask on the logits": BatchFault(_on("logits", _bernoulli), _ANY),
    "one image in ten by chance": BatchFault(_on("logits", _some_images(0.1)), (16,)),
    "one image in twenty by chance": BatchFault(_on("logits", _some_images(0.05)), (16,)),
    "one batch in ten by chance": BatchFault(_on("logits", _whole_batches(0.1)), (16,)),
    **{
        f"{precision}: {name}": BatchFault(edit, _ANY, precision=precision)
        for precision in ("fp16", "int8")
        for name, edit in (
            ("noise on the logits", _on("logits", _noise(3.0))),
            ("dropout before the head", _on("norm", _dropout(0.5))),
            ("noise on a residual", _on("blocks.5/Add", _noise(0.5))),
        )
    },
}
# A single run may contain no wrong batch; the rate holds over many.
SPOILT_BATCHES: dict[str, tuple[BatchFault, float]] = {
    f"{percent} % of batches {what}, by their images": (
        BatchFault(_on("logits", _by_images(percent / 100, wrong)), (16,)),
        percent / 100,
    )
    for percent, what, wrong in (
        (1, "with classes rolled", _rolled),
        (2, "with classes rolled", _rolled),
        (4, "with classes rolled", _rolled),
        (6, "with classes rolled", _rolled),
        (10, "with classes rolled", _rolled),
        (5, "with another sign", _negative),
        (8, "with another sign", _negative),
    )
}


SPOILT_BATCHES |= {
    f"{percent} % of batches of {least} and more, by their images ({factor:.0f})": (
        BatchFault(_on("logits", _by_images(percent / 100, _rolled, least, factor)), (16,)),
        percent / 100,
    )
    for percent in (4, 6, 10)
    for least in (2, 16)
    for factor in (137.0, 77.7)
}


def _now_and_then(share: float, wrong: Callable[[Logits, Logits], Logits], seed: int) -> Spoil:
    generator = np.random.default_rng(seed)

    def spoil(logits: Logits, number: int, last: Logits) -> Logits:
        return wrong(logits, last) if generator.random() < share else logits

    return spoil


def _stale(logits: Logits, last: Logits) -> Logits:
    known = min(len(logits), len(last))
    return np.concatenate([last[:known], logits[known:]]) if known else logits


def _one_wrong(logits: Logits, last: Logits) -> Logits:
    logits[0] = -logits[0]
    return logits


# A function, so that every runner has a new generator.
CALL_FAULTS: dict[str, tuple[Callable[[], Spoil], float]] = {
    name: (lambda share=share, wrong=wrong, seed=seed: _now_and_then(share, wrong, seed), share)
    for seed, (name, share, wrong) in enumerate(
        (
            ("2 % of calls with classes rolled", 0.02, lambda x, _: np.roll(x, 1, axis=1)),
            ("5 % of calls with classes rolled", 0.05, lambda x, _: np.roll(x, 1, axis=1)),
            ("10 % of calls with another sign", 0.10, lambda x, _: -x),
            ("5 % of calls give zeros", 0.05, lambda x, _: np.zeros_like(x)),
            ("5 % of calls give the last call's answers", 0.05, _stale),
            ("10 % of calls with the first image wrong", 0.10, _one_wrong),
            ("5 % of calls in reverse order", 0.05, lambda x, _: x[::-1].copy()),
            ("3 % of calls too large by half", 0.03, lambda x, _: x * 1.5),
        )
    )
}
