"""What a deployment is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from calibration.qdq import QuantizeConfig
from clipdeploy.benchmark import BenchmarkConfig
from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Precision, Recipe
from clipdeploy.core.paths import convert_paths
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.models.load import WeightsChoice
from clipdeploy.stages.calibrate import CalibrateConfig
from clipdeploy.stages.quantize import refuse_int8_only
from clipdeploy.stages.verify.setup import VerifyScope
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import PRECISIONS

__all__ = ["SHORT_BENCHMARK", "DeployConfig"]

# Which precision is the faster one shows in seconds.
SHORT_BENCHMARK = BenchmarkConfig(batches=(1, 8), seconds=2.0)

# What the benchmark holds a precision against: the one that it is chosen instead of.
_INSTEAD_OF: dict[Precision, tuple[Precision, ...]] = {
    "fp32": (),
    "fp16": ("fp32",),
    "int8": ("fp16",),
}


@dataclass(frozen=True)
class DeployConfig:
    """One precision of a model, from its weights to a package.

    ``val`` holds labelled images, ``calibration`` those that INT8 is calibrated on; None takes the
    calibration that lies in the workspace.  ``beside`` are precisions that are built and judged as
    well; None is what the benchmark compares with, and nothing without a ``benchmark``.
    ``quantize_recipe`` is a file of :mod:`calibration.recipe`, instead of ``quantize``.  Of
    ``scope`` the artifacts are chosen by the deployment.  ``triton`` and ``cpp`` are where packages
    go; with neither, a model repository in the model's folder; without ``package``, none is made.

    Raises:
        UsageError: choices that do not go together.
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
            raise UsageError(f"no engine is built in {unknown.pop()}", hint="fp32, fp16 or int8")
        if not self.calibrates:
            chosen = {"--calibration": self.calibration, "--recipe": self.quantize_recipe}
            other = {"quantize": self.quantize != QuantizeConfig()}
            refuse_int8_only({name: bool(path) for name, path in chosen.items()} | other)
        if self.quantize_recipe is not None and self.quantize != QuantizeConfig():
            raise UsageError("a recipe's file and another way to quantise", hint="choose one")
        if not self.package and (self.triton or self.cpp):
            raise UsageError("a folder for a package that is not to be made", hint="leave it out")
        if self.calibrate.shard or self.verify.shard:
            raise UsageError(
                "a shard alone has no verdict", hint="shards are for `calibrate` and `verify`"
            )

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Everything that is built, from the widest to the narrowest."""
        others = self.beside
        if others is None:
            others = _INSTEAD_OF.get(self.precision, ()) if self.benchmark else ()
        wanted = {self.precision, *others}
        return (*(p for p in PRECISIONS if p in wanted), *sorted(wanted - set(PRECISIONS)))

    @property
    def calibrates(self) -> bool:
        """Whether images are observed for INT8."""
        return "int8" in self.precisions

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that it takes, in their order."""
        int8 = ("calibrate", "quantize") if self.calibrates else ()
        return (
            "check",
            "export",
            "check labels",
            *(("convert to fp16",) if "fp16" in self.precisions else ()),
            *(int8 if self.calibration else int8[1:]),
            *(f"build {precision}" for precision in self.precisions),
            "verify",
            *(("benchmark",) if self.benchmark else ()),
            *(("package",) if self.package else ()),
            "summary",
        )
