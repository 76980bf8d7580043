"""Measures cuBLAS in FP16 and INT8 at ViT-B's shapes, beside the roofline of the cost model.

    python scripts/bench/gemm.py [--batch 32] [--json]

:mod:`clipdeploy.engines.roofline` estimates an 8-bit Linear as two kernels, the product and a pass
that scales its sums, adds the bias, applies GELU and rounds to INT8, and an FP16 Linear as one.
For each Linear of a block, (T, K) x (K, N) with T = batch * tokens, the table shows

    FP16, INT8   microseconds of ``torch.matmul`` and ``torch._int_mm``, whose sums are int32
    gain         FP16 / INT8 of the products alone
    +pass        microseconds with bias and GELU in FP16; and of ``_int_mm`` followed by the pass
    gain         FP16 / INT8 of these
    of peak      the share of the data sheet's rate that each product reaches, which the cost model
                 assumes to be 0.7 (``PRODUCT_SHARE``)
    estimate     FP16 / INT8 of the second kind by that model: the larger of operations / (0.7 rate)
                 and bytes / bandwidth of each kernel, with a launch each

and, above it, the bandwidth of a copy beside that of the data sheet.  ``torch.compile`` fuses the
pass into one kernel if Triton is installed; else the pass is several kernels, and its title is
``+eager``.  ``_int_mm`` writes int32, an engine float16: half the bytes.  Times are medians between
two CUDA events, with the L2 cache overwritten before each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu

from clipdeploy.engines.gpus import Format, GpuSpec, local_gpu
from clipdeploy.engines.roofline import Kernel, engine_seconds

Work = Callable[[], object]
# ViT-B/32 and ViT-B/16 of 224 pixels.
TOKENS = (50, 197)
WIDTH, HIDDEN = 768, 3072
SHAPES = {
    "qkv": (WIDTH, 3 * WIDTH),
    "proj": (WIDTH, WIDTH),
    "fc1": (WIDTH, HIDDEN),
    "fc2": (HIDDEN, WIDTH),
}
ROUNDS, WARM_UP = 50, 5
# More than the L2 cache of any GPU of the table.
CACHE_BYTES = 256 << 20
COPY_BYTES = 1 << 29


@dataclass(frozen=True)
class Row:
    """Microseconds of one Linear; ``of_peak`` and ``estimate`` are None without a data sheet."""

    linear: str
    rows: int
    fp16: float
    int8: float
    fp16_pass: float
    int8_pass: float
    fp16_of_peak: float | None
    int8_of_peak: float | None
    estimate: float | None


def fp16_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x W + b), (T, K) -> (T, N), in float16."""
    return gelu(x @ weight + bias)


def int8_pass(sums: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """GELU(s sums + b) rounded to INT8, int32 (T, N) -> int8 (T, N)."""
    return torch.clamp(torch.round(20 * gelu(sums.float() * scale + bias)), -127, 127).to(
        torch.int8
    )


def quantised(values: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """INT8 numbers of ``values`` and their scale: one, or one for each index but of ``axis``."""
    scale = (values.abs().amax() if axis is None else values.abs().amax(axis)) / 127
    return torch.round(values / scale).to(torch.int8), scale


def microseconds(work: Work, rounds: int = ROUNDS) -> float:
    """The median time of ``work`` on the GPU, with a cold L2 cache."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(WARM_UP):
        work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for before, after in events:
        cache.zero_()
        before.record()
        work()
        after.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(before.elapsed_time(after) for before, after in events)


def works(rows: int, k: int, n: int, device: str, fuse: Callable[..., object]) -> dict[str, Work]:
    """What is measured of one shape; ``fuse`` compiles a function."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, k, device=device), torch.randn(k, n, device=device) / k**0.5
    half_x, half_w = x.half(), weight.half()
    bias = torch.zeros(n, device=device)
    (x8, x_scale), (w8, w_scale) = quantised(x, None), quantised(weight, 0)
    # cuBLAS takes INT8 weights with K contiguous.
    w8, scale, half_bias = w8.t().contiguous().t(), x_scale * w_scale, bias.half()
    linear, after = fuse(fp16_linear), fuse(int8_pass)
    return {
        "fp16": lambda: half_x @ half_w,
        "int8": lambda: torch._int_mm(x8, w8),
        "fp16_pass": lambda: linear(half_x, half_w, half_bias),  # type: ignore[operator]
        "int8_pass": lambda: after(torch._int_mm(x8, w8), scale, bias),  # type: ignore[operator]
    }


def estimate(rows: int, k: int, n: int, gpu: GpuSpec) -> float:
    """FP16 / INT8 with the pass, by the cost model; both write 2 bytes for each sum."""

    def product(form: Format, width: int) -> Kernel:
        return Kernel("", "", 2 * rows * k * n, width * (rows + n) * k + 2 * rows * n, form)

    # It reads float16 sums and writes INT8.
    after = Kernel("", "", 0, 3 * rows * n)
    plain = engine_seconds([product("fp16", 2)], gpu)
    return plain / engine_seconds([product("int8", 1), after], gpu)


def measured(batch: int, gpu: GpuSpec | None, fuse: Callable[..., object]) -> Iterator[Row]:
    """Measure each Linear of both models."""
    for tokens in TOKENS:
        for name, (k, n) in SHAPES.items():
            rows = batch * tokens
            times = {
                key: microseconds(work) for key, work in works(rows, k, n, "cuda", fuse).items()
            }
            yield Row(
                name,
                rows,
                **times,
                fp16_of_peak=share(rows, k, n, times["fp16"], gpu, "fp16"),
                int8_of_peak=share(rows, k, n, times["int8"], gpu, "int8"),
                estimate=None if gpu is None else estimate(rows, k, n, gpu),
            )


def share(
    rows: int, k: int, n: int, time: float, gpu: GpuSpec | None, form: Format
) -> float | None:
    """The share of the data sheet's rate that a product of ``time`` microseconds reaches."""
    rate = None if gpu is None else gpu.rate(form)
    return None if rate is None else 2e6 * rows * k * n / time / rate


def copy_bandwidth() -> float:
    """Bytes a second that a copy within the GPU's memory reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (1e-6 * microseconds(lambda: target.copy_(source), 10))


def fuser() -> tuple[Callable[..., object], str]:
    """What compiles a pass to one kernel, and the title of its column."""
    if importlib.util.find_spec("triton") is None:
        return lambda function: function, "+eager"

    def fuse(function: Callable[..., object]) -> Callable[..., object]:
        # Else PyTorch stops compiling a function after some shapes, and runs it unfused.
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return fuse, "+pass"


def table(rows: list[Row], title: str) -> list[str]:
    """The lines of the table."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.0f} %"

    lines = [
        f"{'':6}{'T':>6}{'FP16 us':>9}{'INT8 us':>9}{'gain':>6}{'FP16' + title:>12}"
        f"{'INT8' + title:>12}{'gain':>6}{'of peak':>9}{'':>7}{'estimate':>10}"
    ]
    for row in rows:
        guess = "" if row.estimate is None else f"{row.estimate:.2f}"
        lines.append(
            f"{row.linear:6}{row.rows:6}{row.fp16:9.1f}{row.int8:9.1f}{row.fp16 / row.int8:6.2f}"
            f"{row.fp16_pass:12.1f}{row.int8_pass:12.1f}{row.fp16_pass / row.int8_pass:6.2f}"
            f"{percent(row.fp16_of_peak):>9}{percent(row.int8_of_peak):>7}{guess:>10}"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} sees no GPU")
    gpu, (fuse, title) = local_gpu(), fuser()
    bandwidth, rows = copy_bandwidth(), list(measured(chosen.batch, gpu, fuse))
    if chosen.json:
        found = {
            "gpu": torch.cuda.get_device_name(),
            "data_sheet": None if gpu is None else asdict(gpu),
            "batch": chosen.batch,
            "fused": title == "+pass",
            "copy_gb_s": bandwidth / 1e9,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(found))
        return
    sheet = "no data sheet" if gpu is None else f"{gpu.bandwidth_gb_s:.0f} by the data sheet"
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s, {sheet}")
    print("\n".join(table(rows, title)))


if __name__ == "__main__":
    main()
