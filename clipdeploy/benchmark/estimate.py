"""Estimates the latency of a model's engines on a GPU, from its data sheet; nothing is run.

See :mod:`clipdeploy.engines.roofline` for the model and its limits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipdeploy.benchmark.lineup import GRAPH, NotRun, short_labels, workspace_files
from clipdeploy.core.display import Renderable, Shown
from clipdeploy.core.errors import ArtifactError, ClipdeployError, EngineError, UsageError
from clipdeploy.core.paths import StrPath, as_paths
from clipdeploy.engines.gpus import Format, GpuSpec, all_gpus, find_gpu
from clipdeploy.engines.roofline import (
    LAUNCH_SECONDS,
    PRODUCT_SHARE,
    Formats,
    Geometry,
    attention_name,
    block_linears,
    check_formats,
    engine_seconds,
    geometry_of,
    kernels,
    linear_outputs,
)
from clipdeploy.models.cards import takes_any_name
from clipdeploy.workspace.folder import Workspace
from clipdeploy.workspace.passports import checked_passport
from exporters.headers import read_skeleton
from exporters.products import find_products

__all__ = [
    "EstimateRow",
    "GpuTable",
    "SpeedEstimate",
    "estimate_artifacts",
    "estimate_model",
    "known_gpus",
]

# Label of the row without a graph.
_BASELINE = "all FP16"
_EIGHT_BITS: tuple[Format, ...] = ("int8", "fp8")


@dataclass(frozen=True)
class EstimateRow:
    """One graph at one batch; ``artifact`` is empty for an FP16 engine without a graph.

    ``formats`` counts the Linears of the blocks in each format, ``attention`` the blocks whose
    attention is.  ``kernels`` is the number of kernels, ``milliseconds`` the time of a batch,
    ``images_per_second`` the batch divided by it, ``speedup`` the time of all FP16 divided by it.
    """

    artifact: str
    label: str
    formats: dict[Format, int]
    attention: dict[Format, int]
    batch: int
    kernels: int
    milliseconds: float
    images_per_second: float
    speedup: float


@dataclass(frozen=True)
class SpeedEstimate(Shown):
    """What to expect of a model's graphs on ``gpu``; ``not_estimated`` are graphs left out.

    ``launch_microseconds`` is the assumed time between two kernels.
    """

    model: str
    gpu: GpuSpec
    launch_microseconds: float
    rows: tuple[EstimateRow, ...]
    not_estimated: tuple[NotRun, ...]

    def __rich__(self) -> Renderable:
        return _table_of(self)


@dataclass(frozen=True)
class GpuTable(Shown):
    """The GPUs that times can be estimated for."""

    gpus: tuple[GpuSpec, ...]

    def __rich__(self) -> Renderable:
        return _gpu_table(self)


@dataclass(frozen=True)
class _Graph:
    path: Path | None
    label: str
    model: str
    geometry: Geometry
    formats: Formats


def known_gpus() -> GpuTable:
    """The GPUs of the table."""
    return GpuTable(all_gpus())


def estimate_artifacts(
    paths: StrPath | Iterable[StrPath], gpu: str, batches: Sequence[int] = (1, 8, 32)
) -> SpeedEstimate:
    """Estimate the time of FP16, INT8 and FP8 graphs with a passport on ``gpu``.

    Graphs that cannot be estimated are listed with the reason.

    Raises:
        UsageError: no path is given, or one is not a graph; there is no data sheet of that GPU.
        EngineError: no graph could be estimated; the hint has the first one's reason.
    """
    files = as_paths(paths)
    if not files:
        raise UsageError("nothing to estimate", hint="give .onnx files")
    for path in files:
        if path.suffix != GRAPH:
            raise UsageError(f"{path} is no graph", hint="give .onnx files: engines are not read")
    return _estimate(files, {}, find_gpu(gpu), batches)


@takes_any_name
def estimate_model(
    workspace: Workspace, model: str, gpu: str, batches: Sequence[int] = (1, 8, 32)
) -> SpeedEstimate:
    """Estimate the time of all FP16, INT8 and FP8 graphs of ``model`` on ``gpu``.

    FP16 is estimated from the exported graph's geometry if there is no FP16 graph.

    Raises:
        UsageError: the model has not been exported; there is no data sheet of that GPU.
    """
    found = find_gpu(gpu)
    files, refused = workspace_files(workspace, model, trust=True)
    source, passport = workspace.source(model)
    plain = _Graph(None, _BASELINE, passport.model, geometry_of(passport), {})
    graphs = [path for path in files if path.suffix == GRAPH and path != source]
    return _estimate(graphs, refused, found, batches, plain)


def _estimate(
    paths: Sequence[Path],
    refused: Mapping[Path, str],
    gpu: GpuSpec,
    batches: Sequence[int],
    plain: _Graph | None = None,
) -> SpeedEstimate:
    graphs: list[_Graph] = []
    left_out: list[NotRun] = []
    for path, label in zip(paths, short_labels(paths), strict=True):
        try:
            if path in refused:
                raise ArtifactError(refused[path])
            graph = _read(path, label)
            check_formats(gpu, graph.formats)
        except ClipdeployError as error:
            left_out.append(NotRun(str(path), label, None, error.message))
            continue
        graphs.append(graph)
    if plain is not None and all(graph.formats for graph in graphs):
        graphs.insert(0, plain)
    if not graphs:
        first = left_out[0]
        raise EngineError("nothing could be estimated", hint=f"{first.label}: {first.reason}")
    rows = (_row(graph, gpu, batch) for graph in graphs for batch in batches)
    models = ", ".join(dict.fromkeys(graph.model for graph in graphs))
    return SpeedEstimate(models, gpu, 1e6 * LAUNCH_SECONDS, tuple(rows), tuple(left_out))


def _read(path: Path, label: str) -> _Graph:
    """Read a graph and its passport.

    Raises:
        ClipdeployError: it cannot be read, has no passport, or has products in FP32.
    """
    passport = checked_passport(path, neighbours=False).graph
    if passport.precision in ("fp32", "int8-cpu"):
        raise ArtifactError(f"the data sheets have no rate for its {passport.precision} products")
    geometry = geometry_of(passport)
    formats = _formats(path, geometry.depth)
    if passport.settings.get("scope", {}).get("outputs"):
        formats |= {name: formats[name.removesuffix(".output")] for name in linear_outputs(formats)}
    return _Graph(path, label, passport.model, geometry, formats)


def _formats(graph: Path, depth: int) -> dict[str, Format]:
    """The formats of a graph's 8-bit Linears, head and attention.

    Attention has 8 bits only if both of its products have.

    Raises:
        FileError, GraphError: the graph cannot be read.
    """
    known = {name for block in range(depth) for name in block_linears(block)} | {"head"}
    found: dict[str, set[str]] = {}
    for product in find_products(read_skeleton(graph)):
        name = product.name.rpartition("/")[0]
        if product.attention or name in known:
            found.setdefault(name, set()).add(product.precision)
    return {name: form for name, kinds in found.items() for form in _EIGHT_BITS if kinds == {form}}


def _row(graph: _Graph, gpu: GpuSpec, batch: int) -> EstimateRow:
    geometry = graph.geometry
    made = kernels(geometry, graph.formats, batch)
    seconds = engine_seconds(made, gpu)
    blocks = range(geometry.depth)
    linears = (graph.formats.get(n, "fp16") for block in blocks for n in block_linears(block))
    attention = (graph.formats.get(attention_name(block), "fp16") for block in blocks)
    return EstimateRow(
        artifact="" if graph.path is None else str(graph.path),
        label=graph.label,
        formats=dict(Counter(linears)),
        attention=dict(Counter(attention)),
        batch=batch,
        kernels=len(made),
        milliseconds=1e3 * seconds,
        images_per_second=batch / seconds,
        speedup=engine_seconds(kernels(geometry, {}, batch), gpu) / seconds,
    )


def _rates(gpu: GpuSpec) -> str:
    fp8 = "no FP8" if gpu.fp8_tflops is None else f"{gpu.fp8_tflops:g} TFLOPS FP8"
    return (
        f"{gpu.fp16_tflops:g} TFLOPS FP16 with {gpu.accumulate.upper()} sums, "
        f"{gpu.int8_tops:g} TOPS INT8, {fp8}, {gpu.bandwidth_gb_s:g} GB/s"
    )


def _counted(formats: Mapping[Format, int]) -> str:
    return ", ".join(f"{count} {form.upper()}" for form, count in formats.items())


def _footnotes(result: SpeedEstimate) -> Iterator[str]:
    yield f"an estimate from {result.gpu.source}: nothing was run"
    yield f"{_rates(result.gpu)}; {result.launch_microseconds:g} µs between kernels"
    yield (
        f"products are assumed to reach {100 * PRODUCT_SHARE:.0f} % of these peak rates: expect "
        "longer times, and compare the ratios to FP16"
    )
    yield "kernels as TensorRT-RTX 1.7 compiles them; TensorRT may fuse more"
    for row in {row.label: row for row in result.rows}.values():
        yield f"{row.label}: Linears {_counted(row.formats)}; attention {_counted(row.attention)}"


def _table_of(result: SpeedEstimate) -> Group:
    """The table, then the assumptions, then the graphs left out."""
    table = Table(box=None, pad_edge=False)
    table.add_column("graph", overflow="fold")
    for title in ("batch", "kernels", "ms", "img/s", "speedup"):
        table.add_column(title, justify="right", no_wrap=True)
    previous = ""
    for row in result.rows:
        times = (f"{row.milliseconds:.3f}", f"{row.images_per_second:.0f}", f"{row.speedup:.2f}")
        # As Text, since brackets in a file name would be read as markup.
        label = Text("" if row.label == previous else row.label)
        table.add_row(label, str(row.batch), str(row.kernels), *times)
        previous = row.label
    parts: list[RenderableType] = [
        Text(f"{result.model} on {result.gpu.name}, estimated"),
        *(Text(""), table, Text("")),
        *(Padding(Text(line), (0, 0, 0, 2)) for line in _footnotes(result)),
    ]
    for skipped in result.not_estimated:
        line = Text(f"{skipped.label}: ").append(skipped.reason, style="yellow")
        parts.append(Padding(line, (0, 0, 0, 2)))
    return Group(*parts)


def _gpu_table(result: GpuTable) -> Group:
    table = Table(box=None, pad_edge=False)
    table.add_column("GPU", no_wrap=True)
    for title in ("SM", "FP16", "INT8", "FP8", "GB/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for gpu in result.gpus:
        fp8 = "-" if gpu.fp8_tflops is None else f"{gpu.fp8_tflops:g}"
        rates = (f"{gpu.fp16_tflops:g}", f"{gpu.int8_tops:g}", fp8, f"{gpu.bandwidth_gb_s:g}")
        table.add_row(gpu.name, gpu.compute_capability, *rates)
    note = "dense TFLOPS or TOPS of the tensor cores, FP16 and FP8 with FP32 sums"
    return Group(table, Text(""), Text(note))
