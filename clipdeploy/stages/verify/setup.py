"""Loads and checks the inputs of a verification: reference, artifacts, images and their labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError, DatasetError, UsageError
from clipdeploy.core.passport import Passport
from clipdeploy.core.paths import as_paths
from clipdeploy.core.progress import Progress
from clipdeploy.core.spans import IMAGES, check_numbers
from clipdeploy.imaging import ImageFolder, Labelling, scan_images, select
from clipdeploy.imaging.labelled import open_labelled
from clipdeploy.imaging.survey import Few
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel, reload_model
from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.clipping import with_clipping
from clipdeploy.verification.diagnosis import diagnose
from clipdeploy.verification.leaks import Calibrated, calibration_of, read_calibrated
from clipdeploy.verification.reports import Evidence
from clipdeploy.verification.result import Verification
from clipdeploy.verification.results import Results
from clipdeploy.verification.targets import Target, named_targets, workspace_targets
from clipdeploy.verification.verdicts import Limits, judge_results
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from clipdeploy.workspace.folder import Workspace

__all__ = [
    "Judgement",
    "VerificationSetup",
    "VerifyScope",
    "labelled_images",
    "refuse_for_embeddings",
    "refuse_unreadable",
    "set_up",
]


@dataclass(frozen=True)
class VerifyScope:
    """Which images and which artifacts to verify.

    ``artifacts`` are files; if empty, every graph of the model and, unless ``graphs_only``, every
    engine. ``limit`` selects that many images, spread over the classes. ``allow_leak`` counts
    calibration images instead of refusing them. ``expected`` is the accuracy that PyTorch should
    reach. ``labelling`` overrides how the labels are read.

    Raises:
        UsageError: ``limit`` is out of range.
    """

    artifacts: tuple[Path, ...] = ()
    graphs_only: bool = False
    limit: int | None = None
    labelling: Labelling = field(default_factory=Labelling)
    allow_leak: bool = False
    expected: Expected = field(default_factory=Expected)

    def __post_init__(self) -> None:
        check_numbers(self, limit=IMAGES.or_none)
        object.__setattr__(self, "artifacts", as_paths(self.artifacts))


@dataclass(frozen=True)
class Judgement(Shown):
    """A verification, and the files of its records: None if nothing was saved.

    A single shard has no ``verification`` and is therefore False: nothing is proven yet.
    ``evidence`` is what a report shows in addition.
    """

    verification: Verification | None
    results: Path | None
    disagreements: Path | None = None
    evidence: Evidence | None = None

    def __bool__(self) -> bool:
        return self.verification is not None and bool(self.verification)

    def __rich__(self) -> Renderable:
        return self.verification or facts([("records of a shard", str(self.results))])


@dataclass(frozen=True)
class VerificationSetup:
    """The reference, the artifacts and the images of a verification."""

    model: LoadedModel
    passport: Passport
    targets: tuple[Target, ...]
    images: ImageFolder
    calibrated: Calibrated
    calibration: Path

    def run(
        self, config: VerifyConfig, scope: VerifyScope, keep: Path, progress: Progress, force: bool
    ) -> Results:
        """Return the records of all images, or of one shard."""
        return run_verification(
            self.model,
            self.passport,
            self.targets,
            self.images,
            config,
            calibrated=self.calibrated,
            allow_leak=scope.allow_leak,
            keep=keep,
            force=force,
            progress=progress,
        )

    def judge(
        self, results: Results, limits: Limits, scope: VerifyScope, progress: Progress
    ) -> Verification:
        """Return the verdicts; if the baseline failed, with possible causes."""
        result = judge_results(results, limits, scope.expected)
        result = with_clipping(result, results.run_key, self.images, self.calibration, progress)
        if result.baseline or result.task == "embedding":
            return result
        explained = diagnose(
            result.baseline,
            self.model,
            self.passport.preprocess,
            self.images,
            results.records,
            results.run_key.class_names,
            progress,
        )
        return replace(result, baseline=explained)


def labelled_images(
    data: Path, passport: Passport, scope: VerifyScope, note: Callable[[str], object]
) -> ImageFolder:
    """Open the images selected by ``scope``; ``note`` receives problems with them.

    Raises:
        DatasetError: images or labels cannot be used, or labels are missing and not declared
            absent.
    """
    labelling = scope.labelling
    if passport.embeds:
        labelling = Labelling(layout="none")
    images = open_labelled(data, passport, labelling, note)
    return images if scope.limit is None else select(images, scope.limit, seed=0)


def refuse_for_embeddings(limits: Limits, scope: VerifyScope, *, sequential: bool = False) -> None:
    """Refuse what is for classifiers and would have no effect on embeddings.

    Raises:
        UsageError: labels, an accuracy to expect, a limit of top-5, or ``sequential``.
    """
    if sequential or limits.top5 is not None:
        raise UsageError(
            "an embedding model is judged by the recall@10 among all images",
            hint="leave out --sequential and --max-top5-drop",
        )
    if scope.labelling not in (Labelling(), Labelling(layout="none")):
        raise UsageError(
            "an embedding model has no classes: labels would have no effect",
            hint="leave out the label options",
        )
    if scope.expected.source == "user":
        raise UsageError(
            "an embedding model has no accuracy to expect", hint="leave out --baseline"
        )


def refuse_unreadable(
    images: ImageFolder,
    note: Callable[[str], object],
    progress: Progress,
    *,
    skip_unreadable: bool,
) -> None:
    """Read every image's header, to fail before a long run and not during it.

    Raises:
        DatasetError: images cannot be read, unless ``skip_unreadable``.
    """
    reading = scan_images(images, progress)
    for problem in reading.problems():
        note(problem)
    if reading.unreadable and not skip_unreadable:
        raise DatasetError(
            f"{len(reading.unreadable)} images of {images.root} cannot be read: "
            f"{Few.of(reading.unreadable)}",
            hint="repair or remove them, or pass --skip-unreadable",
        )


def set_up(
    workspace: Workspace,
    model: str,
    data: Path,
    config: VerifyConfig,
    scope: VerifyScope,
    note: Callable[[str], object],
    progress: Progress,
) -> VerificationSetup:
    """Load and check everything that a verification needs.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    _, passport = workspace.source(model)
    if passport.embeds:
        refuse_for_embeddings(config.limits, scope, sequential=config.sequential)
    if scope.artifacts:
        targets = named_targets(scope.artifacts, passport, trust=config.trust)
    else:
        targets = workspace_targets(workspace, model, graphs_only=scope.graphs_only)
    images = labelled_images(data, passport, scope, note)
    refuse_unreadable(images, note, progress, skip_unreadable=config.skip_unreadable)
    with progress.task(f"load {model} in PyTorch"):
        reference = reload_model(cards.find(model), passport.weights, passport.recipe)
    calibrated = read_calibrated(workspace.calibration(model))
    unknown = [
        target.path
        for target in targets
        if target.vouched and calibration_of(target, calibrated) is None
    ]
    # Random weights are not judged, so that leaks do not matter.
    if unknown and passport.weights.kind != "random" and not scope.allow_leak:
        raise ArtifactError(
            f"{unknown[0].name} was not made with {workspace.calibration(model)}, so it is unknown "
            "whether --data contains calibration images",
            hint="build them again with build-engine --int8, or pass --allow-leak",
        )
    if config.cache is not None and (problem := config.cache.problem(passport.preprocess)):
        note(problem)
    for problem in calibrated.problems:
        note(problem)
    calibration = workspace.calibration(model)
    return VerificationSetup(reference, passport, tuple(targets), images, calibrated, calibration)
