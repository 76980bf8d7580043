"""Runs all stages from weights to a package, and packages only what was judged.

    check -> export -> calibrate -> quantise -> build -> verify -> benchmark -> package -> summary

Each stage is that of its own command.  It reuses its result if that exists and was made from the
same inputs, so that an interrupted run continues and a second run does nothing.

A package is made only if the verdict passed, and contains only files that were themselves judged,
with the same bytes.  On a machine that cannot execute an engine the verdict is NOT PROVEN (see
:func:`clipdeploy.stages.verify.run.verify_model`) and no package is made, because the accuracy of
the graph in ONNX Runtime does not prove that of the engine.  With ``VerifyScope(graphs_only=True)``
only the graph is judged and packaged; the engine is listed among what was not proven.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from calibration.config import QuantizeConfig
from calibration.qdq import QuantizedGraph
from calibration.table import load_table
from clipdeploy.benchmark.cached import CachedBenchmark, cached_benchmark
from clipdeploy.core.device import gpus
from clipdeploy.core.passport import Precision
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.builder import EngineArtifact, build_engine
from clipdeploy.stages.calibrate import calibrate_model
from clipdeploy.stages.deploy.checks import check_deployment, check_labels
from clipdeploy.stages.deploy.config import DeployConfig, quantize_stage
from clipdeploy.stages.deploy.deployment import Deployment, Packages, open_points, serve_commands
from clipdeploy.stages.deploy.package import make_packages, no_packages
from clipdeploy.stages.deploy.page import write_pages
from clipdeploy.stages.export import export_model
from clipdeploy.stages.quantize import (
    chosen_config,
    convert_model,
    in_format,
    quantize_model,
    recipe_config,
)
from clipdeploy.stages.report import write_reports
from clipdeploy.stages.stage_log import UNWATCHED, StageLog, StageWatch
from clipdeploy.stages.verify.run import verify_model
from clipdeploy.stages.verify.setup import Judgement
from clipdeploy.stages.zero_shot import prepare_weights
from clipdeploy.workspace.folder import Workspace
from exporters.headers import GraphArtifact

__all__ = ["DeployConfig", "Deployment", "deploy_model"]


def deploy_model(
    workspace: Workspace,
    model: str | None,
    config: DeployConfig,
    *,
    force: bool = False,
    watch: StageWatch = UNWATCHED,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> Deployment:
    """Run all stages from weights to a package; the result is false unless the verdict passed.

    If ``model`` is None, it is inferred from the checkpoint of ``config.weights``.  ``watch`` is
    called for each stage, ``progress`` for the tasks in it, and ``note`` with remarks.
    The page of the deployment is written into the workspace whatever the verdict is.

    Raises:
        ClipdeployError: a stage failed, or a check before the first stage.
    """
    card, weights = prepare_weights(workspace, model, config.weights, note, progress)
    config = replace(config, weights=weights)
    log = StageLog(config.stages, watch)
    return _Run(workspace, card.name, config, force, note, progress, log).deployment()


class _Made(Protocol):
    @property
    def changed(self) -> bool: ...


def _is_new(made: _Made) -> bool:
    return made.changed


@dataclass
class _Run:
    workspace: Workspace
    model: str
    config: DeployConfig
    force: bool
    note: Callable[[str], object]
    progress: Progress
    log: StageLog
    graphs: list[GraphArtifact] = field(default_factory=list)
    engines: dict[Precision, EngineArtifact] = field(default_factory=dict)

    def deployment(self) -> Deployment:
        """Run all stages in order."""
        check = partial(check_deployment, self.workspace, self.model, self.config, self.progress)
        self.log.run("check", check)
        self._make_graphs()
        for precision in self.config.precisions:
            build = partial(self._build, precision)
            built = self.log.run(f"build {precision}", build, _is_new)
            self.engines[precision] = built
        judgement = self._verify()
        benchmark = self._benchmark() if self.config.benchmark else None
        packages = self._package(judgement) if self.config.package else Packages()
        return self._summary(judgement, benchmark, packages)

    def _make_graphs(self) -> None:
        source = self.log.run("export", self._export, _is_new)
        self.graphs.append(source)
        self.log.run("check labels", partial(check_labels, self.config, source.passport))
        at = (self.workspace, self.model)
        if "fp16" in self.config.precisions:
            convert = partial(convert_model, *at, force=self.force, progress=self.progress)
            half = self.log.run("convert to fp16", convert, _is_new)
            self.graphs.append(half)
        if self.config.quantised and (images := self.config.calibration) is not None:
            calibrate = partial(calibrate_model, *at, images, self.config.calibrate)
            calibrate = partial(calibrate, force=self.force, progress=self.progress)
            made = self.log.run("calibrate", calibrate, _is_new)
            self._warn(made.notes())
        for precision in self.config.quantised:
            quantize = partial(self._quantize, precision)
            name = quantize_stage(precision)
            graph = self.log.run(name, quantize, lambda made: made.artifact.changed)
            self._warn(graph.quality.warnings if graph.quality is not None else ())
            self.graphs.append(graph.artifact)

    def _warn(self, warnings: tuple[str, ...]) -> None:
        for warning in warnings:
            self.note(warning)

    def _note_skipped(self, names: tuple[str, ...]) -> None:
        for name in names:
            self.note(f"skipped, unreadable: {name}")

    def _export(self) -> GraphArtifact:
        return export_model(
            self.workspace,
            self.model,
            self.config.weights,
            self.config.recipe,
            force=self.force,
            note=self.note,
            progress=self.progress,
        )

    def _quantize(self, precision: Precision) -> QuantizedGraph:
        config = self._quantize_config(precision)
        at = (self.workspace, self.model)
        return quantize_model(
            *at,
            config,
            backend=self.config.build.backend,
            force=self.force,
            progress=self.progress,
        )

    def _quantize_config(self, precision: Precision) -> QuantizeConfig:
        at = (self.workspace, self.model)
        if (path := self.config.quantize_recipe) is not None:
            return replace(recipe_config(*at, path, precision), remainder="fp16")
        asked = in_format(self.config.quantize, precision)
        return chosen_config(*at, asked, force=self.force, note=self.note)

    def _build(self, precision: Precision) -> EngineArtifact:
        graph = self.workspace.graph(self.model, precision)
        engine = self.workspace.engine(self.model, precision)
        config = self.config.build
        return build_engine(graph, engine, config, force=self.force, progress=self.progress)

    def _verify(self) -> Judgement:
        engines = [engine.path for engine in self.engines.values()]
        judged = [] if self.config.scope.graphs_only else engines
        artifacts = (*(graph.path for graph in self.graphs), *judged)
        before = _state(self.workspace.verification(self.model))
        verify = partial(
            verify_model,
            self.workspace,
            self.model,
            self.config.val,
            self.config.verify,
            replace(self.config.scope, artifacts=artifacts),
            force=self.force,
            note=self.note,
            progress=self.progress,
        )
        made = self.log.run(
            "verify", verify, lambda made: made.results is None or before != _state(made.results)
        )
        assert made.verification is not None  # only a shard has none
        self._note_skipped(made.verification.skipped)
        return made

    def _benchmark(self) -> CachedBenchmark:
        assert self.config.benchmark is not None
        engines = [engine.path for engine in self.engines.values()]
        chosen = self.config.precision
        graphs = [
            self.workspace.graph(self.model, each) for each in dict.fromkeys(("fp32", chosen))
        ]
        # Without a GPU graphs are compared, and the engine is listed as not measured.
        compared = engines if gpus() else [*graphs, self.workspace.engine(self.model, chosen)]
        measure = partial(
            cached_benchmark,
            compared,
            self.workspace.benchmark(self.model),
            self.config.benchmark,
            force=self.force,
            progress=self.progress,
            note=self.note,
        )
        return self.log.run("benchmark", measure, _is_new)

    def _package(self, judgement: Judgement) -> Packages:
        if not judgement:
            none = no_packages(self.workspace, self.model, self.config, judgement)
            self.log.leave_out("package", none.why_not)
            return none
        engine = self.engines[self.config.precision]
        at = (self.workspace, self.model, self.config)
        package = partial(make_packages, *at, engine, judgement, force=self.force)
        return self.log.run("package", package, _any_changed)

    def _summary(
        self, judgement: Judgement, cached: CachedBenchmark | None, packages: Packages
    ) -> Deployment:
        verification = judgement.verification
        assert verification is not None  # only a shard has none
        engines, images = tuple(self.engines.values()), self._calibration_images()
        benchmark = cached.benchmark if cached else None
        result = Deployment(
            model=self.model,
            precision=self.config.precision,
            passed=bool(judgement),
            graphs=tuple(self.graphs),
            engines=engines,
            calibration_images=images,
            verification=verification,
            benchmark=benchmark,
            packages=packages,
            serve=serve_commands(packages),
            open_points=open_points(verification, engines, benchmark, packages),
            report=self.workspace.report(self.model),
            page=self.workspace.deployment(self.model),
            stages=tuple(self.log.runs),
        )
        self.log.run("summary", partial(self._write, result, judgement))
        return result

    def _write(self, result: Deployment, judgement: Judgement) -> None:
        bisection = self.workspace.bisection(self.model)
        write_reports(judgement, [result.report], bisection=bisection)
        assert judgement.evidence is not None
        write_pages(result, judgement.evidence.results, self._calibration())

    def _calibration(self) -> Path | None:
        return self.workspace.calibration(self.model) if self.config.calibrates else None

    def _calibration_images(self) -> int | None:
        path = self._calibration()
        return None if path is None else len(load_table(path).images)


def _any_changed(packages: Packages) -> bool:
    return any(made.changed for made in packages.made)


def _state(path: Path) -> tuple[int, int] | None:
    """The identity and the modification time of a file; None if it does not exist."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
