"""The configuration of a search, its result, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from calibration.formats import FORMATS, FormatName
from calibration.scheme import SchemeConfig
from clipdeploy.core.display import Renderable, Shown
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import BATCH, BUDGET, IMAGES, SEARCHED_DROP, SEED, THREADS, check_numbers
from clipdeploy.engines.gpus import find_gpu
from clipdeploy.imaging import Labelling
from clipdeploy.tuning.cost import CostKind, CostModel
from clipdeploy.tuning.pareto import Candidate
from clipdeploy.tuning.tables import decibels, number_columns
from clipdeploy.verification.paired import DropJudgement
from exporters.headers import GraphArtifact

__all__ = ["SearchConfig", "SearchResult", "is_attention", "search_table"]


@dataclass(frozen=True)
class SearchConfig:
    """How to search.

    ``max_drop``: points of top-1 that may be lost.  ``budget``: minutes, None for no limit.
    ``search_images``: number of images to search on, None for half of them, at most 1024; the
    others confirm the result.  ``seed``: chooses the split.  ``cost``: see
    :mod:`clipdeploy.tuning.cost`.  ``gpu``: the GPU of a ``roofline``, empty for this machine's or,
    without one in the table, ``DEFAULT_GPU``.  ``batch``: batch size that costs apply to.
    ``threads``: ONNX Runtime's, 0 for its default.  ``scheme``: how Linears are quantised; if it
    loses too much accuracy, other ranges and smoothing strengths are tried, unless
    ``fixed_scheme``.  ``format``: of the products that are not FP16; None for the fastest of those
    that the GPU has, or INT8 if the cost is not that of an engine.  ``remainder``: see
    :class:`calibration.config.QuantizeConfig`.  ``labelling``: where the images' classes come from.
    ``outputs``: whether the sums of qkv and fc1 may be in 8 bits too, in a graph for TensorRT and
    if the cost is that of an engine.

    Raises:
        UsageError: a number out of range, an unknown format, cost model or GPU, a GPU without a
            roofline, or FP8 on a CPU.
    """

    max_drop: float = 1.0
    budget: float | None = None
    seed: int = 0
    search_images: int | None = None
    cost: CostKind = "roofline"
    gpu: str = ""
    batch: int = 8
    threads: int = 0
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    fixed_scheme: bool = False
    remainder: Literal["fp16", "fp32"] = "fp16"
    format: FormatName | None = None
    labelling: Labelling = field(default_factory=Labelling)
    outputs: bool = True

    def __post_init__(self) -> None:
        check_numbers(
            self,
            max_drop=SEARCHED_DROP,
            budget=BUDGET.or_none,
            seed=SEED,
            search_images=IMAGES.or_none,
            batch=BATCH,
            threads=THREADS,
        )
        if self.cost not in get_args(CostKind):
            known = ", ".join(get_args(CostKind))
            raise UsageError(f"unknown cost model {self.cost!r}", hint=f"choose one of {known}")
        if self.format not in (None, *FORMATS):
            raise UsageError(f"unknown format {self.format!r}", hint=f"{' or '.join(FORMATS)}")
        if self.format == "fp8" and (self.remainder != "fp16" or self.cost == "cpu"):
            raise UsageError("FP8 is for TensorRT engines", hint="search INT8 for a CPU")
        if self.gpu and self.cost != "roofline":
            raise UsageError(
                f"the cost model {self.cost} does not depend on a GPU such as {self.gpu!r}"
                if self.cost != "gpu"
                else f"the cost model gpu measures on this machine's GPU, not on {self.gpu!r}",
                hint="choose roofline, or no GPU",
            )
        if self.cost == "gpu" and self.remainder != "fp16":
            raise UsageError(
                "the cost model gpu times TensorRT engines, remainder fp32 is for ONNX Runtime",
                hint="leave one of the two out",
            )
        if self.gpu:
            find_gpu(self.gpu)

    @property
    def tries_outputs(self) -> bool:
        """Whether 8-bit sums of qkv and fc1 are allowed, and possible with this ``remainder``."""
        return self.outputs and self.remainder == "fp16"

    def formats(self, possible: Iterable[FormatName] = ("int8",)) -> tuple[FormatName, ...]:
        """The formats to search, of those that are ``possible`` on a GPU."""
        if self.format is not None:
            return (self.format,)
        return tuple(possible) if self.remainder == "fp16" else ("int8",)


@dataclass(frozen=True)
class SearchResult(Shown):
    """The chosen combination and its verdicts; true if the fresh images confirm it.

    ``excluded``: products in FP16.  ``points``: all evaluated combinations, of all formats; those
    on the front have recipes.  ``costs``, ``format`` and ``scheme``: those of the choice.
    ``fastest``: by format, the lowest possible cost relative to FP16, whatever the accuracy, with
    8-bit sums if they are allowed; a format that cannot be faster than the choice of another is not
    searched.  ``finished``: False if the budget ended the search early.  ``search`` and
    ``confirm``: verdicts on the two splits, for the graph that was written.  ``outputs``: whether
    the sums of its qkv and fc1 are in 8 bits too.
    """

    model: str
    data: str
    chosen: Candidate
    excluded: tuple[str, ...]
    points: tuple[Candidate, ...]
    costs: CostModel
    format: FormatName
    scheme: SchemeConfig
    fastest: dict[FormatName, float]
    finished: bool
    evaluations: int
    search: DropJudgement
    confirm: DropJudgement
    confirmed: bool
    recipe: Path
    artifact: GraphArtifact
    outputs: bool = False

    def __bool__(self) -> bool:
        return self.confirmed

    def __rich__(self) -> Renderable:
        return search_table(self)


def is_attention(name: str) -> bool:
    """Whether a product is the attention of a block instead of a Linear."""
    return name.endswith(".attn")


def _counts(names: Iterable[str]) -> tuple[int, int]:
    """How many of the products are Linears, and how many are attention."""
    attention = [is_attention(name) for name in names]
    return attention.count(False), attention.count(True)


def _front(result: SearchResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("point", no_wrap=True)
    number_columns(table, ("8 bits", "MACs", "cost", "drop", "dB", "fits", "recipe"))
    for point in result.points:
        if not (point.front or point.label):
            continue
        table.add_row(
            _title(point),
            _eight_bits(point),
            f"{100 * point.quantised_macs:.0f} %",
            f"{point.cost:.3f}",
            f"{point.drop:+.2f}",
            decibels(point.evaluation.sqnr_db),
            "yes" if point.feasible else "no",
            point.recipe.rpartition("/")[2],
            style="bold" if point == result.chosen else "",
        )
    return table


def _eight_bits(point: Candidate) -> str:
    """``24+5+out``: the Linears in 8 bits, the attention of blocks, and whether the sums are."""
    linears, attention = _counts(point.quantised)
    return f"{linears}{f'+{attention}' * (attention > 0)}{'+out' * point.outputs}"


def _title(point: Candidate) -> str:
    """The label of a point, with its format."""
    title, form = point.label or "front", FORMATS[point.format].label
    return title if form in title or not point.quantised else f"{title}, {form}"


def _heading(result: SearchResult) -> str:
    chosen = result.chosen
    linears, attention = _counts(chosen.quantised)
    every, blocks = _counts(result.costs.order)
    products = f"{linears} of {every} Linears"
    if blocks:
        products += f" and the attention of {attention} of {blocks} blocks"
    sums = " with 8-bit sums of qkv and fc1" if result.outputs else ""
    return (
        f"{result.model}: {products} in {FORMATS[result.format].label}{sums}, "
        f"{100 * chosen.quantised_macs:.0f} % of their MACs, cost {chosen.cost:.3f} of all FP16"
    )


def _lossy_outputs(result: SearchResult) -> Iterator[str]:
    """A sentence if a graph with the chosen products and 8-bit sums was written, and refused."""
    chosen = set(result.chosen.quantised)
    refused = (
        point
        for point in result.points
        if point.outputs and not point.feasible and point.format == result.format
    )
    point = next((each for each in refused if chosen.issubset(each.quantised)), None)
    if point is not None and not result.outputs:
        yield (
            f"8-bit sums of qkv and fc1 would lower the cost to {point.cost:.3f} and lose too "
            f"much: drop {point.drop:+.2f}"
        )


def _fastest(result: SearchResult) -> Iterator[str]:
    """Sentences about formats that save nothing, and about those that were not searched."""
    where = f"{result.costs.gpu or 'this CPU'} at batch {result.costs.batch}"
    slow = [FORMATS[name].label for name, cost in result.fastest.items() if cost >= 1]
    if slow:
        names = " or ".join(slow)
        yield f"nothing is faster in {names} than in FP16 on {where}"
    searched = {point.format for point in result.points}
    for name, cost in result.fastest.items():
        if name not in searched and cost < 1:
            yield f"{FORMATS[name].label} was not searched: its cost is at least {cost:.3f}"


def search_table(result: SearchResult) -> Group:
    """The verdict, then the front, then the products in FP16."""
    verdict = "CONFIRMED" if result.confirmed else "NOT CONFIRMED"
    lines = [
        f"searched on {result.search.n} images: {result.search.sentence}",
        f"fresh {result.confirm.n} images: {result.confirm.sentence}",
        f"cost: {result.costs.unit}, batch {result.costs.batch}; ranges by {result.scheme.label}; "
        f"{result.evaluations} combination{'s' * (result.evaluations > 1)} evaluated",
        f"written: {result.artifact.path}",
        f"recipe: {result.recipe}",
        *_lossy_outputs(result),
        *_fastest(result),
    ]
    if not result.finished:
        lines.append("the budget ended the search early; run it again to continue")
    fp16 = ", ".join(result.excluded)
    return Group(
        Text(_heading(result)),
        Text(verdict, style="bold green" if result.confirmed else "bold red"),
        *(Padding(Text(line), (0, 0, 0, 2)) for line in lines),
        Text(""),
        _front(result),
        Text(
            "8 bits: Linears + attention of blocks + sums of qkv and fc1 (out); "
            "fits: within the limit",
            style="dim",
        ),
        Text(""),
        Text(f"in FP16: {fp16}" if fp16 else f"everything in {FORMATS[result.format].label}"),
    )
