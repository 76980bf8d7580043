"""Estimates speeds on GPUs from their data sheets, and compares them with published measurements.

    python scripts/bench/estimate.py

Nothing is run: see :mod:`clipdeploy.engines.roofline`.  Prints

1. for each model and GPU at batch 32: milliseconds of FP16, and how many times faster each other
   format is, with all Linears of the blocks in that format, then attention too, then the sums of
   qkv and fc1 too;
2. for each format, what makes an inner block fastest in it: Linears, and attention (``attn``),
   which ``search`` considers, with the sums of qkv and fc1 in 8 bits and in FP16;
3. published latencies of ViTs beside the estimates, whose ratio shows how far they are off;
4. how many times faster 8 bits are if products reach only a share of their peak rate, for the
   published measurements at batch 32 or more and for INT8 on the GPUs of the first table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from calibration.formats import FORMATS
from clipdeploy.engines.gpus import Format, GpuSpec, find_gpu
from clipdeploy.engines.roofline import (
    PRODUCT_SHARE,
    Formats,
    Geometry,
    block_products,
    engine_seconds,
    every_linear,
    kernels,
)
from clipdeploy.models import cards
from clipdeploy.tuning.engine_costs import estimated_costs

MODELS = {"p32": "clip-vit-base-p32", "p16": "clip-vit-base-p16"}
GPUS = ("L4", "L40S", "H100-SXM", "RTX-5090", "B300")
# Attention and outputs in 8 bits.
COLUMNS: dict[str, tuple[Format, bool, bool]] = {
    "INT8": ("int8", False, False),
    "+attention": ("int8", True, False),
    "+outputs": ("int8", True, True),
    "FP8": ("fp8", False, False),
    "+attention ": ("fp8", True, False),
    "+outputs ": ("fp8", True, True),
}
VIT_B16 = Geometry(224, 16, 768, 12, 12, 1000)
CLIP_L14 = Geometry(224, 14, 1024, 24, 16, 768)


@dataclass(frozen=True)
class Published:
    """A measurement: milliseconds of FP16, and of ``form`` with its attention, None if unknown."""

    what: str
    geometry: Geometry
    gpu: str
    batch: int
    fp16: float
    form: Format = "int8"
    quantised: float | None = None


# NVIDIA/FasterTransformer, docs/vit_guide.md: a memory clock of 1215 MHz is that of the A100 with
# 40 GB, and the INT8 products have INT8 outputs.
# facebookincubator/AITemplate, examples/04_vit/README.md.
# NVIDIA's developer blog, "Model Quantization: Turn FP8 Checkpoints into High-Performance Inference
# Engines with NVIDIA TensorRT".
PUBLISHED = (
    Published("FasterTransformer ViT-B/16", VIT_B16, "A100-40GB", 1, 1.53, "int8", 1.52),
    Published("FasterTransformer ViT-B/16", VIT_B16, "A100-40GB", 8, 3.03, "int8", 2.38),
    Published("FasterTransformer ViT-B/16", VIT_B16, "A100-40GB", 32, 10.04, "int8", 6.43),
    Published("FasterTransformer ViT-B/16", VIT_B16, "T4", 1, 3.43, "int8", 2.16),
    Published("FasterTransformer ViT-B/16", VIT_B16, "T4", 8, 14.46, "int8", 8.37),
    Published("FasterTransformer ViT-B/16", VIT_B16, "T4", 32, 57.22, "int8", 35.43),
    Published("AITemplate ViT-B/16", VIT_B16, "A100-40GB", 1, 1.02),
    Published("AITemplate ViT-B/16", VIT_B16, "A100-40GB", 32, 6.51),
    Published("TensorRT 10.16 CLIP ViT-L/14", CLIP_L14, "RTX-6000-Ada", 128, 166.2, "fp8", 119.8),
)


def milliseconds(geometry: Geometry, formats: Formats, batch: int, gpu: str) -> float:
    """The estimate for one batch."""
    return 1e3 * engine_seconds(kernels(geometry, formats, batch), find_gpu(gpu))


def speed_table(batch: int) -> list[str]:
    """The lines of the first table."""
    lines = [f"{'':14}{'FP16 ms':>9}" + "".join(f"{title.strip():>12}" for title in COLUMNS)]
    for short, name in MODELS.items():
        geometry = Geometry.of_card(cards.find(name))
        for gpu in GPUS:
            plain = milliseconds(geometry, {}, batch, gpu)
            row = f"{short + ' ' + gpu:14}{plain:9.2f}"
            for form, attention, outputs in COLUMNS.values():
                formats = every_linear(geometry.depth, form, attention=attention, outputs=outputs)
                row += f"{plain / milliseconds(geometry, formats, batch, gpu):12.2f}"
            lines.append(row)
    return lines


def gain_table(form: Format, batches: tuple[int, ...], *, outputs: bool) -> list[str]:
    """The lines of the second table."""
    title = f"{form.upper() + (' +outputs' if outputs else ''):14}"
    lines = [title + "".join(f"{f'batch {batch}':23}" for batch in batches).rstrip()]
    for short, name in MODELS.items():
        geometry = Geometry.of_card(cards.find(name))
        for gpu in GPUS:
            row = f"{short + ' ' + gpu:14}"
            for batch in batches:
                costs = estimated_costs(geometry, find_gpu(gpu), batch, form)
                fastest = costs.fastest(outputs=outputs)
                faster = [each for each in block_products(geometry, 3) if each in fastest]
                roles = " ".join(each.rpartition(".")[2] for each in faster)
                row += f"{roles or 'none':23}"
            lines.append(row.rstrip())
    return lines


def published_table() -> list[str]:
    """The lines of the third table."""
    title = f"{'':30}{'GPU':>14}{'batch':>6}{'FP16 ms':>9}{'estimate':>9}{'off':>6}"
    lines = [f"{title}{'faster':>13}{'estimate':>9}"]
    for each in PUBLISHED:
        plain = milliseconds(each.geometry, {}, each.batch, each.gpu)
        row = f"{each.what:30}{each.gpu:>14}{each.batch:6}{each.fp16:9.2f}{plain:9.2f}"
        row += f"{each.fp16 / plain:6.1f}"
        if each.quantised is not None:
            formats = every_linear(each.geometry.depth, each.form, attention=True)
            ours = milliseconds(each.geometry, formats, each.batch, each.gpu)
            faster = f"{each.form.upper()} {each.fp16 / each.quantised:.2f}"
            row += f"{faster:>13}{plain / ours:9.2f}"
        lines.append(row)
    return lines


def _slowed(gpu: str, share: float) -> GpuSpec:
    """A GPU whose products reach ``share`` of their peak rate."""
    found, share = find_gpu(gpu), share / PRODUCT_SHARE
    fp8 = None if found.fp8_tflops is None else share * found.fp8_tflops
    fp16, int8 = share * found.fp16_tflops, share * found.int8_tops
    return replace(found, fp16_tflops=fp16, int8_tops=int8, fp8_tflops=fp8)


def _speedup(geometry: Geometry, formats: Formats, batch: int, gpu: GpuSpec) -> float:
    plain = engine_seconds(kernels(geometry, {}, batch), gpu)
    return plain / engine_seconds(kernels(geometry, formats, batch), gpu)


def share_table(shares: tuple[float, ...]) -> list[str]:
    """The lines of the fourth table."""
    lines = [f"{'':46}{'published':>10}" + "".join(f"{100 * s:7.0f} %" for s in shares)]
    for each in PUBLISHED:
        if each.quantised is None or each.batch < 32:
            continue
        formats = every_linear(each.geometry.depth, each.form, attention=True)
        row = f"{f'{each.what}, {each.gpu}':46}{each.fp16 / each.quantised:10.2f}"
        for share in shares:
            row += f"{_speedup(each.geometry, formats, each.batch, _slowed(each.gpu, share)):9.2f}"
        lines.append(row)
    for gpu in GPUS[:-1]:
        row = f"{f'INT8 p16, {gpu}':46}{'':10}"
        for share in shares:
            formats = every_linear(12, "int8")
            row += f"{_speedup(VIT_B16, formats, 32, _slowed(gpu, share)):9.2f}"
        lines.append(row)
    return lines


def main() -> None:
    """Print the tables."""
    shares = share_table((1.0, PRODUCT_SHARE, 0.5))
    gains = [
        gain_table(form, (1, 8, 32), outputs=outputs)
        for outputs in (True, False)
        for form in FORMATS
    ]
    for lines in (speed_table(32), *gains, published_table(), shares):
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
