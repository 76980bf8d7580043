"""Looks up what NVIDIA's data sheets say about a GPU.

Each row of ``data/gpus.csv`` is a GPU; to add one, add a row.  All rates are dense: data sheets of
Ampere and later GPUs lead with the rates of 2:4 sparsity, which are twice as high.  FP16 and FP8
rates are those with FP32 accumulation (``accumulate``); with FP16 accumulation GeForce GPUs are
twice as fast.  ``driver_names`` are the names that the CUDA driver reports, separated by ``|``;
Jetson modules have none, since several report the same name.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

from clipdeploy.core.data_rows import DataRow, read_rows
from clipdeploy.core.device import gpus
from clipdeploy.core.errors import UsageError

__all__ = [
    "DEFAULT_GPU",
    "Format",
    "GpuSpec",
    "all_gpus",
    "find_gpu",
    "gpu_or_default",
    "local_gpu",
]

Format = Literal["fp16", "int8", "fp8"]
# Used if the machine has no GPU of the table: the data centre GPU made for inference.
DEFAULT_GPU = "L4"
_COLUMNS = "see CONTRIBUTING.md for the columns"


@dataclass(frozen=True)
class GpuSpec:
    """The peak rates of a GPU.

    ``bandwidth_gb_s`` is in 1e9 bytes a second.  ``fp16_tflops``, ``int8_tops`` and ``fp8_tflops``
    are in 1e12 operations a second, dense, two for each multiply-accumulate; ``fp8_tflops`` is None
    for a GPU without FP8.  ``source`` names the data sheet.
    """

    name: str
    driver_names: tuple[str, ...]
    compute_capability: str
    bandwidth_gb_s: float
    fp16_tflops: float
    accumulate: Literal["fp16", "fp32"]
    int8_tops: float
    fp8_tflops: float | None
    source: str

    def rate(self, form: Format) -> float | None:
        """Operations a second for products of ``form``; None if the GPU does not have it."""
        tera = {"fp16": self.fp16_tflops, "int8": self.int8_tops, "fp8": self.fp8_tflops}[form]
        return None if tera is None else 1e12 * tera

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return 1e9 * self.bandwidth_gb_s


@cache
def all_gpus() -> tuple[GpuSpec, ...]:
    """All GPUs of the table, in its order.

    Raises:
        ArtifactError: a row of ``gpus.csv`` is invalid.
    """
    return tuple(_spec(row) for row in read_rows("gpus.csv", hint=_COLUMNS))


def _spec(row: DataRow) -> GpuSpec:
    value = row.value
    fp8 = value("fp8_tflops", _positive, math.nan)
    return GpuSpec(
        name=value("name", str),
        driver_names=tuple(filter(None, value("driver_names", str, "").split("|"))),
        compute_capability=value("compute_capability", _capability),
        bandwidth_gb_s=value("bandwidth_gb_s", _positive),
        fp16_tflops=value("fp16_tflops", _positive),
        accumulate=value("accumulate", _accumulate),
        int8_tops=value("int8_tops", _positive),
        fp8_tflops=None if math.isnan(fp8) else fp8,
        source=value("source", str),
    )


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(f"{text} is not a positive number")
    return number


def _capability(text: str) -> str:
    major, point, minor = text.partition(".")
    if not (point and major.isdigit() and minor.isdigit()):
        raise ValueError(f"{text!r} is not a version such as 8.9")
    return text


def _accumulate(text: str) -> Literal["fp16", "fp32"]:
    if text == "fp16":
        return "fp16"
    if text == "fp32":
        return "fp32"
    raise ValueError(f"{text!r} is neither fp16 nor fp32")


def _plain(name: str) -> str:
    """``NVIDIA GeForce RTX 4090`` -> ``rtx4090``, so that spelling does not matter."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return "".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))


def _by_name() -> dict[str, GpuSpec]:
    return {_plain(name): gpu for gpu in all_gpus() for name in (gpu.name, *gpu.driver_names)}


def find_gpu(name: str) -> GpuSpec:
    """Find a GPU by its name in the table or by the driver's name for it.

    Raises:
        UsageError: the table has no such GPU; the message lists those it has.
    """
    if (found := _by_name().get(_plain(name))) is not None:
        return found
    plain = {_plain(gpu.name): gpu.name for gpu in all_gpus()}
    near = [known for known in plain if known.startswith(_plain(name))]
    near = near or difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    guess = f"; near it: {', '.join(plain[each] for each in near)}" if near else ""
    raise UsageError(
        f"no data sheet of a GPU {name!r}{guess}", hint=f"known are {', '.join(plain.values())}"
    )


def local_gpu() -> GpuSpec | None:
    """The data sheet of this machine's first GPU; None without a GPU or its data sheet."""
    names = [gpu.name for gpu in gpus()[:1]]
    return _by_name().get(_plain(names[0])) if names else None


def gpu_or_default(name: str) -> GpuSpec:
    """The GPU called ``name``; if that is empty this machine's, or else ``DEFAULT_GPU``.

    Raises:
        UsageError: see :func:`find_gpu`.
    """
    return find_gpu(name) if name else local_gpu() or find_gpu(DEFAULT_GPU)
