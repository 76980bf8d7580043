"""The numbers that a user may give: a span for each kind, the same for commands and configurations.

The upper ends are far beyond what is of use, and below what would hang a machine, overflow a field
of a file format, or leave a library's own range.
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
    "DROP",
    "IMAGES",
    "INSTANCES",
    "MAX_BATCH",
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
    """The numbers from ``least`` to ``most``; ``said`` is how an error names one that is outside.

    ``above``: ``least`` itself is outside.  ``whole``: only whole numbers are inside.
    ``optional``: so is None.  ``per_core``: on a machine of few cores the end is so many for each.
    """

    least: float
    most: float
    said: str
    whole: bool = True
    above: bool = False
    optional: bool = False
    per_core: int | None = None

    @property
    def or_none(self) -> Span:
        """The same, and None as well."""
        return replace(self, optional=True)

    @property
    def words(self) -> str:
        """What is inside, for the end of an error: ``0 to 100``."""
        end = f"{'above ' if self.above else ''}{self.least:,} to {self._end:,}"
        return end if self._end == self.most else f"{end} on {os.cpu_count() or 1} cores"

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
        # Compared with NaN everything is false.
        inside = self.least < number if self.above else self.least <= number
        return bool(inside and number <= self._end)

    def check(self, value: object, name: str) -> None:
        """Refuse a value of the option or field ``name`` that is outside.

        Raises:
            UsageError: it is outside, of another type, NaN or infinite.
        """
        if value not in self:
            hint = f"{name} is {'a whole number, ' if self.whole else ''}{self.words}"
            raise UsageError(self.said.format(shown(value)), hint=hint)


def _is_whole(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def shown(value: object) -> str:
    """A value for an error, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        # Python itself refuses to write numbers of thousands of digits.
        return f"about {'-' if value < 0 else ''}10^{math.floor(math.log10(abs(value)))}"
    text = f"{value}" if isinstance(value, Real) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_numbers(config: object, **spans: Span) -> None:
    """Hold fields of a configuration against their spans.

    Raises:
        UsageError: it names the first field that is outside.
    """
    for name, span in spans.items():
        span.check(getattr(config, name), name)


def check_shard(shard: tuple[int, int] | None) -> None:
    """Hold a shard (i, n), the i-th of n from 1, against the span of shards.

    Raises:
        UsageError: there is no such shard.
    """
    if shard is None:
        return
    for number in shard:
        SHARDS.check(number, "--shard I/N")
    if shard[0] > shard[1]:
        raise UsageError(
            "there is no shard {}/{}".format(*shard), hint="--shard 1/4 to --shard 4/4"
        )


# Images on a disk, and images that run at once: 4096 of ViT-B at 224 px take 39 GB of activations.
IMAGES = Span(1, 100_000_000, "{} images")
BATCH = Span(1, 4096, "a batch of {} images")
MAX_BATCH = replace(BATCH, said="--max-batch {} is too small or too large")
SHARDS = Span(1, 1_000_000, "shard {}")
# Seeds of NumPy's and PyTorch's generators; 2 ** 32 is the least of their limits.
SEED = Span(0, 2**32 - 1, "a seed of {}")
# 0 leaves the choice to the library.  Threads that wait for each other in turn take minutes where
# they are many times as many as cores: 64 on two cores.
THREADS = Span(0, 512, "{} threads", per_core=8)
WORKERS = Span(0, 256, "{} decoding processes")
OPSET = Span(17, 23, "opset {} is not supported")
DROP = Span(0, 100, "a largest drop of {} points", whole=False)
SEARCHED_DROP = replace(DROP, above=True)
ACCURACY = Span(0, 100, "an accuracy of {} %", whole=False)
STRENGTH = Span(0, 1, "a smoothing strength of {}", whole=False)
# 0 dB is noise as strong as the signal; float32 itself ends at about 140 dB.
SQNR_DB = Span(-100, 200, "a minimum SQNR of {} dB", whole=False)
TOP = Span(1, 1_000_000, "the {} likeliest classes")
# Of one day.
SECONDS = Span(0, 86_400, "a measurement of {} seconds", whole=False, above=True)
WARMUP = Span(0, 86_400, "a warm-up of {} seconds", whole=False)
ROUNDS = Span(1, 100_000_000, "a measurement of {} rounds")
# Of one year.
BUDGET = Span(0, 527_040, "a budget of {} minutes", whole=False, above=True)
# A petabyte.
CACHE_GB = Span(0, 1_000_000, "a crop cache of {} GB", whole=False)
# 16 TiB.
MEMORY_MIB = Span(1, 1 << 24, "a memory pool of {} MiB")
OPTIMIZATION = Span(0, 5, "an optimization level of {}")
# A request that waits for a minute has no use; Triton's field is an uint64.
QUEUE_DELAY = Span(0, 60_000_000, "a queue delay of {} microseconds")
INSTANCES = Span(1, 1024, "{} instances")
