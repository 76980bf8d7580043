"""The configuration of a deployment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from calibration.config import QuantizeConfig
from clipdeploy.benchmark import BenchmarkConfig
from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import QUANTISED, Precision, Recipe
from clipdeploy.core.paths import convert_paths
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.models.load import WeightsChoice
from clipdeploy.stages.calibrate import CalibrateConfig
from clipdeploy.stages.quantize import in_format, refuse_quantised_only, refuse_unbuildable
from clipdeploy.stages.verify.setup import VerifyScope
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import PRECISIONS

__all__ = ["SHORT_BENCHMARK", "DeployConfig", "quantize_stage"]

# Two seconds are enough to see which precision is faster.
SHORT_BENCHMARK = BenchmarkConfig(batches=(1, 8), seconds=2.0)

# The precisions that the benchmark compares each precision with.
_INSTEAD_OF: dict[Precision, tuple[Precision, ...]] = {
    "fp32": (),
    "fp16": ("fp32",),
    "int8": ("fp16",),
    "fp8": ("fp16",),
}


def quantize_stage(precision: Precision) -> str:
    """The name of the stage that makes the graph of a quantised ``precision``."""
    return "quantize" if precision == "int8" else f"quantize to {precision}"


@dataclass(frozen=True)
class DeployConfig:
    """How one precision of a model is deployed, from its weights to a package.

    ``val`` are labelled images to judge on.  ``calibration`` are the calibration images of INT8 and
    FP8; None uses the calibration in the workspace.  ``beside`` are further precisions to build and
    judge; None are those that the ``benchmark`` compares with.  ``quantize_recipe`` is a file of
    :mod:`calibration.recipe`, used instead of ``quantize``.  The artifacts in ``scope`` are
    ignored.  ``triton`` and ``cpp`` are the folders of packages; with neither, a model repository
    is written into the model's folder.  With ``package`` False, no package is made.

    Raises:
        UsageError: values that exclude each other.
    """

    val: Path
    precision: Precision = "int8"
    calibration: Path | None = None
    beside: tuple[Precision, ...] | None = None
    weights: WeightsChoice = field(default_factory=WeightsChoice)
    recipe: Recipe = field(default_factory=Recipe)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    quantize_recipe: Path | None = None
    build: BuildConfig = field(default_factory=BuildConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    scope: VerifyScope = field(default_factory=VerifyScope)
    benchmark: BenchmarkConfig | None = SHORT_BENCHMARK
    package: bool = True
    triton: Path | None = None
    cpp: Path | None = None

    def __post_init__(self) -> None:
        convert_paths(self, "val", "calibration", "quantize_recipe", "triton", "cpp")
        unknown = set(self.precisions) - set(PRECISIONS)
        if unknown:
            raise UsageError(
                f"engines cannot be built in {unknown.pop()}", hint="fp32, fp16, int8 or fp8"
            )
        if not self.calibrates:
            chosen = {"--calibration-data": self.calibration, "--recipe": self.quantize_recipe}
            other = {"quantize": self.quantize != QuantizeConfig()}
            refuse_quantised_only({name: bool(path) for name, path in chosen.items()} | other)
        for precision in self.quantised:
            in_format(self.quantize, precision)
        refuse_unbuildable(self.quantize, self.build.backend)
        if self.quantize_recipe is not None and self.quantize != QuantizeConfig():
            raise UsageError(
                "a recipe file excludes other quantisation options", hint="pass one of them"
            )
        if not self.package and (self.triton or self.cpp):
            raise UsageError(
                "no package is made, but a folder for it was given", hint="leave it out"
            )
        if self.package and self.build.strip_weights:
            raise UsageError(
                "an engine without weights cannot be packaged",
                hint="build it without --strip-weights",
            )
        if self.calibrate.shard or self.verify.shard:
            raise UsageError(
                "a single shard has no verdict", hint="use shards with `calibrate` and `verify`"
            )

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """All precisions that are built, from FP32 to FP8."""
        others = self.beside
        if others is None:
            others = _INSTEAD_OF.get(self.precision, ()) if self.benchmark else ()
        wanted = {self.precision, *others}
        return (*(p for p in PRECISIONS if p in wanted), *sorted(wanted - set(PRECISIONS)))

    @property
    def calibrates(self) -> bool:
        """Whether INT8 or FP8 is among the precisions."""
        return bool(self.quantised)

    @property
    def quantised(self) -> tuple[Precision, ...]:
        """The precisions that are built from quantised graphs."""
        return tuple(precision for precision in self.precisions if precision in QUANTISED)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, in order."""
        calibrate = ("calibrate",) if self.calibrates and self.calibration else ()
        return (
            "check",
            "export",
            "check labels",
            *(("convert to fp16",) if "fp16" in self.precisions else ()),
            *calibrate,
            *map(quantize_stage, self.quantised),
            *(f"build {precision}" for precision in self.precisions),
            "verify",
            *(("benchmark",) if self.benchmark else ()),
            *(("package",) if self.package else ()),
            "summary",
        )
