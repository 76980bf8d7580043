"""Valid ranges of the numbers in options and configurations.

The upper ends are far above useful values, and low enough not to hang a machine, overflow a field
of a file format or exceed a library's limit.
"""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from clipdeploy.core.errors import UsageError

__all__ = [
    "ACCURACY",
    "BATCH",
    "BUDGET",
    "CACHE_GB",
    "CROP_PCT",
    "DROP",
    "EPS",
    "HEADS",
    "IMAGES",
    "IMAGE_SIZE",
    "INSTANCES",
    "MEAN",
    "MEMORY_MIB",
    "OPSET",
    "OPTIMIZATION",
    "QUEUE_DELAY",
    "ROUNDS",
    "SEARCHED_DROP",
    "SECONDS",
    "SEED",
    "SHARDS",
    "SQNR_DB",
    "STD",
    "STRENGTH",
    "THREADS",
    "TOP",
    "WARMUP",
    "WORKERS",
    "Span",
    "check_numbers",
    "check_shard",
    "shown",
]

_SHOWN = 40


@dataclass(frozen=True)
class Span:
    """The range from ``least`` to ``most``, both included.

    ``whole``: integers only.  ``above``: ``least`` is excluded.  ``optional``: None is allowed.
    ``per_core``: the upper end is also limited to this number for each CPU core.
    """

    least: float
    most: float
    whole: bool = True
    above: bool = False
    optional: bool = False
    per_core: int | None = None

    @property
    def or_none(self) -> Span:
        """The same range, with None allowed."""
        return replace(self, optional=True)

    @property
    def text(self) -> str:
        """The range as text: ``0 to 100``."""
        text = f"{self.least:,} to {self._end:,}"
        if self.above:
            text = f"above {self.least:,}, at most {self._end:,}"
        return text if self._end == self.most else f"{text} on {os.cpu_count() or 1} cores"

    @property
    def _end(self) -> float:
        if self.per_core is None:
            return self.most
        return min(self.most, self.per_core * (os.cpu_count() or 1))

    def __contains__(self, value: object) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        if self.whole and not _is_whole(value):
            return False
        number: Any = value
        # NaN fails every comparison.
        inside = self.least < number if self.above else self.least <= number
        return bool(inside and number <= self._end)

    def check(self, value: object, name: str) -> None:
        """Raise an error if ``value``, the value of option or field ``name``, is out of range.

        Raises:
            UsageError: the value is out of range, of another type, NaN or infinite.
        """
        if value not in self:
            number = "an integer" if self.whole else "a number"
            hint = f"use {number} {'' if self.above else 'from '}{self.text}"
            raise UsageError(f"invalid value {shown(value)} for {name}", hint=hint)


def _is_whole(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def shown(value: object) -> str:
    """Return a value as text for an error message, shortened if it is long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        # Python raises an error when it formats numbers of thousands of digits.
        return f"about {'-' if value < 0 else ''}10^{math.floor(math.log10(abs(value)))}"
    text = f"{value}" if isinstance(value, Real) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_numbers(config: object, **spans: Span) -> None:
    """Check fields of a configuration against their ranges.

    Raises:
        UsageError: a field is out of range; the message names the first one.
    """
    for name, span in spans.items():
        span.check(getattr(config, name), name)


def check_shard(shard: tuple[int, int] | None) -> None:
    """Check a shard (i, n), the i-th of n, counted from 1.

    Raises:
        UsageError: i or n is out of range, or i is greater than n.
    """
    if shard is None:
        return
    for number in shard:
        SHARDS.check(number, "--shard I/N")
    if shard[0] > shard[1]:
        raise UsageError(
            "there is no shard {}/{}".format(*shard),
            hint="use an index from 1 to the number of shards, such as --shard 1/4",
        )


# Images of a data set, and of a batch: 4096 of ViT-B at 224 px take 39 GB of activations.
IMAGES = Span(1, 100_000_000)
BATCH = Span(1, 4096)
EPS = Span(0, 0.1, whole=False, above=True)
HEADS = Span(1, 1024)
# As :data:`clipdeploy.core.values.MOST_EDGE`.
IMAGE_SIZE = Span(1, 8192)
# Of samples scaled to 0..1.
MEAN = Span(-1, 1, whole=False)
STD = Span(1e-4, 10, whole=False)
CROP_PCT = Span(0.1, 4, whole=False)
SHARDS = Span(1, 1_000_000)
# NumPy's legacy generators take seeds below 2 ** 32, PyTorch's larger ones too.
SEED = Span(0, 2**32 - 1)
# 0 is the library's default.  A run takes minutes if threads far outnumber the cores, such as 64 on
# two cores.
THREADS = Span(0, 512, per_core=8)
WORKERS = Span(0, 256)
OPSET = Span(17, 23)
DROP = Span(0, 100, whole=False)
SEARCHED_DROP = replace(DROP, above=True)
ACCURACY = Span(0, 100, whole=False)
STRENGTH = Span(0, 1, whole=False)
# At 0 dB noise equals the signal; float32 rounding gives about 140 dB.
SQNR_DB = Span(-100, 200, whole=False)
TOP = Span(1, 1_000_000)
# Up to one day.
SECONDS = Span(0, 86_400, whole=False, above=True)
WARMUP = Span(0, 86_400, whole=False)
ROUNDS = Span(1, 100_000_000)
# In minutes, up to one year.
BUDGET = Span(0, 527_040, whole=False, above=True)
# Up to one petabyte.
CACHE_GB = Span(0, 1_000_000, whole=False)
# Up to 16 TiB.
MEMORY_MIB = Span(1, 1 << 24)
OPTIMIZATION = Span(0, 5)
# In microseconds, up to one minute; Triton stores a uint64.
QUEUE_DELAY = Span(0, 60_000_000)
INSTANCES = Span(1, 1024)
