"""The configuration of a search, its result, and its table."""

from __future__ import annotations

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

__all__ = ["SearchConfig", "SearchResult", "search_table"]


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
    ``fixed_scheme``.  ``format``: of the Linears that are not FP16.  ``remainder``: see
    :class:`calibration.qdq.QuantizeConfig`.  ``labelling``: where the images' classes come from.

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
    format: FormatName = "int8"
    labelling: Labelling = field(default_factory=Labelling)

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
        if self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format!r}", hint=f"{' or '.join(FORMATS)}")
        if self.format == "fp8" and (self.remainder != "fp16" or self.cost == "cpu"):
            raise UsageError("FP8 is for TensorRT engines", hint="search INT8 for a CPU")
        if self.gpu and self.cost != "roofline":
            raise UsageError(
                f"the cost model {self.cost} does not depend on a GPU such as {self.gpu!r}",
                hint="choose roofline, or no GPU",
            )
        if self.gpu:
            find_gpu(self.gpu)


@dataclass(frozen=True)
class SearchResult(Shown):
    """The chosen combination and its verdicts; true if the fresh images confirm it.

    ``excluded``: Linears in FP16.  ``points``: all evaluated combinations; those on the front have
    recipes.  ``scheme``: the chosen scheme.  ``finished``: False if the budget ended the search
    early.  ``search`` and ``confirm``: verdicts on the two splits, for the graph that was written.
    """

    model: str
    data: str
    chosen: Candidate
    excluded: tuple[str, ...]
    points: tuple[Candidate, ...]
    costs: CostModel
    format: FormatName
    scheme: SchemeConfig
    finished: bool
    evaluations: int
    search: DropJudgement
    confirm: DropJudgement
    confirmed: bool
    recipe: Path
    artifact: GraphArtifact

    def __bool__(self) -> bool:
        return self.confirmed

    def __rich__(self) -> Renderable:
        return search_table(self)


def _label(result: SearchResult) -> str:
    return FORMATS[result.format].label


def _front(result: SearchResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("point", no_wrap=True)
    number_columns(table, (_label(result), "MACs", "cost", "drop", "dB", "within", "recipe"))
    for point in result.points:
        if not (point.front or point.label):
            continue
        table.add_row(
            point.label or "front",
            str(len(point.quantised)),
            f"{100 * point.quantised_macs:.0f} %",
            f"{point.cost:.3f}",
            f"{point.drop:+.2f}",
            decibels(point.evaluation.sqnr_db),
            "yes" if point.feasible else "no",
            point.recipe.rpartition("/")[2],
            style="bold" if point.quantised == result.chosen.quantised else "",
        )
    return table


def search_table(result: SearchResult) -> Group:
    """The verdict, then the front, then the Linears in FP16."""
    chosen, total = result.chosen, len(result.costs.linears)
    heading = (
        f"{result.model}: {len(chosen.quantised)} of {total} Linears in {_label(result)}, "
        f"{100 * chosen.quantised_macs:.0f} % of their MACs, cost {chosen.cost:.3f} of all FP16"
    )
    verdict = "CONFIRMED" if result.confirmed else "NOT CONFIRMED"
    lines = [
        f"searched on {result.search.n} images: {result.search.sentence}",
        f"fresh {result.confirm.n} images: {result.confirm.sentence}",
        f"cost: {result.costs.unit}, batch {result.costs.batch}; ranges by {result.scheme.label}; "
        f"{result.evaluations} combination{'s' * (result.evaluations > 1)} evaluated",
        f"written: {result.artifact.path}",
        f"recipe: {result.recipe}",
    ]
    if max(result.costs.gains().values(), default=1.0) <= 0:
        where = f"{result.costs.gpu or 'this CPU'} at batch {result.costs.batch}"
        lines.append(f"no Linear is faster in {_label(result)} on {where}, so all stay in FP16")
    if not result.finished:
        lines.append("the budget ended the search early; run it again to continue")
    fp16 = ", ".join(result.excluded)
    return Group(
        Text(heading),
        Text(verdict, style="bold green" if result.confirmed else "bold red"),
        *(Padding(Text(line), (0, 0, 0, 2)) for line in lines),
        Text(""),
        _front(result),
        Text(""),
        Text(f"in FP16: {fp16}" if fp16 else f"all Linears in {_label(result)}"),
    )
