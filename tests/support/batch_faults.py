"""Faults that depend on the batch: its size, its images, or the position in it.

Each edits the demo's graph, of any precision, after the cut of :mod:`cut_graphs`, and lists the
batch sizes at which it has an effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from graph_edits import Edit, Steps, initializer
from onnx import ModelProto

__all__ = ["MIXING_FAULTS", "SIZE_FAULTS", "BatchFault"]

Condition = Callable[[Steps], str]
# The order of a batch's output rows: (steps, 0 to B - 1, B) -> row index at each position.
Order = Callable[[Steps, str, str], str]
Wrong = Callable[[Steps], str]


@dataclass(frozen=True)
class BatchFault:
    """``shows``: batch sizes at which answers change; ``hidden``: some at which they do not."""

    edit: Edit
    shows: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    precision: str = "fp32"


def _whole(steps: Steps, *values: int) -> str:
    return steps.const(values, np.int64)


def _size(steps: Steps) -> str:
    return steps.op("Shape", steps.value, start=0, end=1)


def exactly(number: int) -> Condition:
    """True if the batch has ``number`` images."""
    return lambda steps: steps.op("Equal", _size(steps), _whole(steps, number))


def above(number: int) -> Condition:
    """True if the batch has more than ``number`` images."""
    return lambda steps: steps.op("Greater", _size(steps), _whole(steps, number))


def below(number: int) -> Condition:
    """True if the batch has fewer than ``number`` images."""
    return lambda steps: steps.op("Less", _size(steps), _whole(steps, number))


def _rest(number: int, rest: int) -> Condition:
    def condition(steps: Steps) -> str:
        found = steps.op("Mod", _size(steps), _whole(steps, number))
        return steps.op("Equal", found, _whole(steps, rest))

    return condition


def _not(condition: Condition) -> Condition:
    return lambda steps: steps.op("Not", condition(steps))


def _bias_dropped(steps: Steps) -> str:
    bias = steps.op("Cast", initializer(steps.model, "head.bias").name, to=1)
    return steps.op("Sub", steps.value, bias)


def _classes_rolled(steps: Steps) -> str:
    return steps.op("Gather", steps.value, _whole(steps, *np.roll(range(10), 1)), axis=1)


def _noisy(steps: Steps) -> str:
    wave = steps.op("Sin", steps.op("Mul", steps.value, steps.const(1000.0)))
    return steps.op("Add", steps.value, steps.op("Mul", wave, steps.const(4.0)))


def _halved(steps: Steps) -> str:
    return steps.op("Mul", steps.value, steps.const(0.5))


def _not_written(steps: Steps) -> str:
    return steps.op("Mul", steps.value, steps.const(0.0))


def _sometimes(
    condition: Condition, wrong: Wrong, value: str = "logits", *, branches: bool = False
) -> Edit:
    def edit(model: ModelProto) -> None:
        steps = Steps(model, value)
        chosen = steps.choose(condition(steps), wrong(steps), steps.value, branches=branches)
        steps.finish(chosen)

    return edit


def _sometimes_read(condition: Condition, value: str, other: str) -> Edit:
    """Replace ``value`` by ``other``, an earlier tensor of the same shape, for its readers."""
    return _sometimes(condition, lambda _: other, value, branches=True)


def _block_skipped(condition: Condition) -> Edit:
    return _sometimes_read(condition, "blocks.5/Add_1", "blocks.5/Slice")


def _ordered(order: Order, value: str, condition: Condition | None = None) -> Edit:
    def edit(model: ModelProto) -> None:
        steps = Steps(model, value)
        size = _size(steps)
        zero, one = steps.const(0, np.int64), steps.const(1, np.int64)
        rows = steps.op("Range", zero, steps.op("Squeeze", size), one)
        mixed = steps.op("Gather", steps.value, order(steps, rows, size), axis=0)
        if condition is not None:
            mixed = steps.choose(condition(steps), mixed, steps.value, branches=True)
        steps.finish(mixed)

    return edit


def _two_exchanged(steps: Steps, rows: str, size: str) -> str:
    first = steps.op("Min", steps.op("Sub", size, _whole(steps, 1)), _whole(steps, 1))
    is_first = steps.op("Equal", rows, _whole(steps, 0))
    is_second = steps.op("Equal", rows, _whole(steps, 1))
    rest = steps.op("Where", is_second, _whole(steps, 0), rows)
    return steps.op("Where", is_first, first, rest)


def _last_repeats(steps: Steps, rows: str, size: str) -> str:
    last = steps.op("Max", steps.op("Sub", size, _whole(steps, 2)), _whole(steps, 0))
    return steps.op("Min", rows, last)


def _turned_by(number: int) -> Order:
    def order(steps: Steps, rows: str, size: str) -> str:
        return steps.op("Mod", steps.op("Add", rows, _whole(steps, number)), size)

    return order


def _halves_exchanged(steps: Steps, rows: str, size: str) -> str:
    half = steps.op("Div", size, _whole(steps, 2))
    return steps.op("Mod", steps.op("Add", rows, half), size)


def _reversed(steps: Steps, rows: str, size: str) -> str:
    return steps.op("Sub", steps.op("Sub", size, _whole(steps, 1)), rows)


def _first_for_all(steps: Steps, rows: str, size: str) -> str:
    return steps.op("Mul", rows, _whole(steps, 0))


def _even_rows_twice(steps: Steps, rows: str, size: str) -> str:
    return steps.op("Sub", rows, steps.op("Mod", rows, _whole(steps, 2)))


def _pairs_exchanged(steps: Steps, rows: str, size: str) -> str:
    odd = steps.op("Mod", rows, _whole(steps, 2))
    step = steps.op("Sub", _whole(steps, 1), steps.op("Mul", odd, _whole(steps, 2)))
    last = steps.op("Sub", size, _whole(steps, 1))
    return steps.op("Min", steps.op("Add", rows, step), last)


def _sorted(steps: Steps, rows: str, size: str) -> str:
    """Sort rows by their first number, largest first."""
    column = steps.op("Gather", steps.value, steps.const(0, np.int64), axis=1)
    _, places = steps.ops("TopK", 2, column, size, axis=0)
    return places


def _mixed_by(mix: Wrong, value: str = "logits") -> Edit:
    def edit(model: ModelProto) -> None:
        steps = Steps(model, value)
        steps.finish(mix(steps))

    return edit


def _neighbours_mean(steps: Steps) -> str:
    size = _size(steps)
    zero, one = steps.const(0, np.int64), steps.const(1, np.int64)
    rows = steps.op("Range", zero, steps.op("Squeeze", size), one)
    other = steps.op("Gather", steps.value, _turned_by(1)(steps, rows, size), axis=0)
    return steps.op("Mul", steps.op("Add", steps.value, other), steps.like(0.5, steps.value))


def _mean_subtracted(steps: Steps) -> str:
    mean = steps.op("ReduceMean", steps.value, _whole(steps, 0), keepdims=1)
    return steps.op("Sub", steps.value, mean)


def _softmax_over_batch(steps: Steps) -> str:
    return steps.op("Softmax", steps.value, axis=0)


def _over_largest_of_batch(steps: Steps) -> str:
    largest = steps.op("ReduceMax", steps.op("Abs", steps.value), keepdims=1)
    return steps.op("Div", steps.op("Mul", steps.value, steps.const(10.0)), largest)


def _attention_over_images(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.name == "blocks.5.attn/Softmax":
            node.attribute[0].i = 0


_ANY = (2, 8, 16)
_LOGITS_MIXED: dict[str, tuple[Order, tuple[int, ...]]] = {
    "rows 0 and 1 exchanged": (_two_exchanged, _ANY),
    "the last row repeats its neighbour": (_last_repeats, _ANY),
    "every image gets its neighbour's answer": (_turned_by(1), _ANY),
    "answers turned by 3 rows": (_turned_by(3), (2, 8, 16)),
    "halves of the batch exchanged": (_halves_exchanged, _ANY),
    "answers in reverse order": (_reversed, _ANY),
    "the first row's answer for all": (_first_for_all, _ANY),
    "every second row repeats the one before": (_even_rows_twice, _ANY),
    "pairs of rows exchanged": (_pairs_exchanged, _ANY),
    "answers sorted": (_sorted, (8, 16)),
}
MIXING_FAULTS: dict[str, BatchFault] = {
    **{
        name: BatchFault(_ordered(order, "logits"), shows, (1,))
        for name, (order, shows) in _LOGITS_MIXED.items()
    },
    "rows 0 and 1 exchanged in full batches": BatchFault(
        _ordered(_two_exchanged, "logits", exactly(16)), (16,), (2, 8, 15)
    ),
    "rows 0 and 1 exchanged above 8 images": BatchFault(
        _ordered(_two_exchanged, "logits", above(8)), (9, 16, 32), (2, 8)
    ),
    "answers in reverse order below 8 images": BatchFault(
        _ordered(_reversed, "logits", below(8)), (2, 7), (8, 16)
    ),
    "the last row repeats its neighbour at 7 images": BatchFault(
        _ordered(_last_repeats, "logits", exactly(7)), (7,), (6, 8, 16)
    ),
    "every image gets its neighbour's answer in batches of 32": BatchFault(
        _ordered(_turned_by(1), "logits", exactly(32)), (32,), (16, 31)
    ),
    "pairs of rows exchanged at odd sizes": BatchFault(
        _ordered(_pairs_exchanged, "logits", _rest(2, 1)), (3, 5, 15), (2, 8, 16)
    ),
    "the neighbour's class token": BatchFault(_ordered(_turned_by(1), "vit/Gather"), _ANY, (1,)),
    "the neighbour's tokens in the last block": BatchFault(
        _ordered(_turned_by(1), "blocks.5.norm1"), _ANY, (1,)
    ),
    "the neighbour's residual": BatchFault(_ordered(_reversed, "blocks.5/Add"), _ANY, (1,)),
    "each answer averaged with its neighbour's": BatchFault(
        _mixed_by(_neighbours_mean), _ANY, (1,)
    ),
    "class tokens averaged with the neighbour's": BatchFault(
        _mixed_by(_neighbours_mean, "vit/Gather"), _ANY, (1,)
    ),
    "softmax over the batch": BatchFault(_mixed_by(_softmax_over_batch), (1, 2, 8, 16)),
    "the batch's mean subtracted": BatchFault(_mixed_by(_mean_subtracted), (1, 2, 8, 16)),
    "class tokens without the batch's mean": BatchFault(
        _mixed_by(_mean_subtracted, "vit/Gather"), (1, 2, 8, 16)
    ),
    "logits over the batch's largest": BatchFault(_mixed_by(_over_largest_of_batch), (1, 2, 8, 16)),
    "attention over the images": BatchFault(_attention_over_images, (1, 2, 8, 16)),
    **{
        f"{precision}: {name}": BatchFault(_ordered(order, value), _ANY, (1,), precision)
        for precision in ("fp16", "int8")
        for name, order, value in (
            ("rows 0 and 1 exchanged", _two_exchanged, "logits"),
            ("every image gets its neighbour's answer", _turned_by(1), "logits"),
            ("the neighbour's class token", _turned_by(1), "vit/Gather"),
        )
    },
}

_AT: dict[str, tuple[Condition, tuple[int, ...], tuple[int, ...]]] = {
    "at batch 1": (exactly(1), (1,), (2, 16)),
    "at batch 2": (exactly(2), (2,), (1, 3, 16)),
    "at batch 3": (exactly(3), (3,), (1, 4, 16)),
    "at batch 5": (exactly(5), (5,), (1, 4, 16)),
    "at batch 8": (exactly(8), (8,), (1, 7, 16)),
    "at batch 16": (exactly(16), (16,), (1, 15)),
    "at batch 32": (exactly(32), (32,), (1, 16, 31)),
    "at batch 64": (exactly(64), (64,), (1, 16, 32)),
    "above 16 images": (above(16), (17, 32, 64), (1, 16)),
    "above 32 images": (above(32), (33, 64), (1, 16, 32)),
    "below 4 images": (below(4), (1, 3), (4, 16)),
    "at odd sizes": (_rest(2, 1), (1, 3, 7), (2, 16)),
    "at multiples of 4": (_rest(4, 0), (4, 8, 16), (1, 6)),
    "at multiples of 3": (_rest(3, 0), (3, 9, 15), (1, 16)),
    "at sizes that are no multiple of 8": (_not(_rest(8, 0)), (1, 4, 7), (8, 16)),
}


def _at(when: str, wrong: Wrong, *, branches: bool = False, precision: str = "fp32") -> BatchFault:
    condition, shows, hidden = _AT[when]
    return BatchFault(_sometimes(condition, wrong, branches=branches), shows, hidden, precision)


def _read_at(when: str, value: str, other: str, precision: str = "fp32") -> BatchFault:
    condition, shows, hidden = _AT[when]
    return BatchFault(_sometimes_read(condition, value, other), shows, hidden, precision)


def _skipped_at(when: str, precision: str = "fp32") -> BatchFault:
    return _read_at(when, "blocks.5/Add_1", "blocks.5/Slice", precision)


SIZE_FAULTS: dict[str, BatchFault] = {
    **{f"classes rolled {when}": _at(when, _classes_rolled, branches=True) for when in _AT},
    "the head's bias dropped at batch 1": _at("at batch 1", _bias_dropped),
    "the head's bias dropped at batch 8": _at("at batch 8", _bias_dropped),
    "the head's bias dropped above 32 images": _at("above 32 images", _bias_dropped),
    "noise at batch 2": _at("at batch 2", _noisy),
    "noise at batch 5": _at("at batch 5", _noisy),
    "noise at multiples of 4": _at("at multiples of 4", _noisy),
    "noise at batch 64": _at("at batch 64", _noisy),
    "logits halved at batch 3": _at("at batch 3", _halved),
    "logits halved at batch 32": _at("at batch 32", _halved),
    "logits halved at odd sizes": _at("at odd sizes", _halved),
    "nothing written at batch 1": _at("at batch 1", _not_written),
    "nothing written above 16 images": _at("above 16 images", _not_written),
    "a block skipped at batch 1": _skipped_at("at batch 1"),
    "a block skipped at batch 8": _skipped_at("at batch 8"),
    "a block skipped at multiples of 3": _skipped_at("at multiples of 3"),
    "a block skipped at sizes that are no multiple of 8": _skipped_at(
        "at sizes that are no multiple of 8"
    ),
    "an MLP skipped at batch 32": _read_at("at batch 32", "blocks.5/Add_1", "blocks.5/Add"),
    "GELU skipped at batch 2": _read_at("at batch 2", "blocks.5.mlp/Gelu", "blocks.5.mlp.fc1"),
    "the last LayerNorm skipped at batch 8": _read_at("at batch 8", "norm", "vit/Gather"),
    **{
        f"{precision}: {name}": fault
        for precision in ("fp16", "int8")
        for name, fault in (
            ("classes rolled at batch 1", _at("at batch 1", _classes_rolled, precision=precision)),
            ("classes rolled at batch 8", _at("at batch 8", _classes_rolled, precision=precision)),
            ("noise above 16 images", _at("above 16 images", _noisy, precision=precision)),
            ("a block skipped at batch 32", _skipped_at("at batch 32", precision)),
        )
    },
}
