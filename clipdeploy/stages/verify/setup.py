"""What a verification starts from: the reference, the artifacts, the images, and what was asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError, DatasetError
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
    "refuse_unreadable",
    "set_up",
]


@dataclass(frozen=True)
class VerifyScope:
    """Which images and which artifacts.

    ``artifacts`` are files; without any, every graph of the model and, unless ``graphs_only``,
    every engine.  ``limit`` draws so many images, spread over the classes.  ``allow_leak`` counts
    calibration images instead of refusing them.  ``expected`` is what PyTorch is to reach.
    ``labelling`` is what the user says about the classes of the images.

    Raises:
        UsageError: a ``limit`` that cannot be.
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
    """A verification, and the files that hold its records: None where nothing was kept.

    A shard alone has no ``verification``, and so is not true: nothing is proven yet.  ``evidence``
    is what a report shows beside it.
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
    """A reference and what it is to judge."""

    model: LoadedModel
    passport: Passport
    targets: tuple[Target, ...]
    images: ImageFolder
    calibrated: Calibrated

    def run(
        self, config: VerifyConfig, scope: VerifyScope, keep: Path, progress: Progress, force: bool
    ) -> Results:
        """The records of all images, or of one shard."""
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
        """The verdicts, with the cause looked for if the baseline failed."""
        result = judge_results(results, limits, scope.expected)
        if result.baseline:
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
    """The images that ``scope`` asks for; ``note`` is told what is odd about them.

    Raises:
        DatasetError: images or labels that cannot be used, or images without labels where nobody
            said that there are none.
    """
    images = open_labelled(data, passport, scope.labelling, note)
    return images if scope.limit is None else select(images, scope.limit, seed=0)


def refuse_unreadable(
    images: ImageFolder,
    note: Callable[[str], object],
    progress: Progress,
    *,
    skip_unreadable: bool,
) -> None:
    """Look at every image's header: better now than in the middle of a long run.

    Raises:
        DatasetError: some cannot be read, unless ``skip_unreadable``.
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
    """Everything that a verification needs, loaded and checked.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    _, passport = workspace.source(model)
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
    # Nothing is judged on random weights, so that no image can flatter them.
    if unknown and passport.weights.kind != "random" and not scope.allow_leak:
        raise ArtifactError(
            f"{workspace.calibration(model)} is not the calibration that {unknown[0].name} was "
            "made with, so that it is unknown whether --data holds calibration images",
            hint="build them again with build-engine --int8, or pass --allow-leak",
        )
    if config.cache is not None and (problem := config.cache.problem(passport.preprocess)):
        note(problem)
    for problem in calibrated.problems:
        note(problem)
    return VerificationSetup(reference, passport, tuple(targets), images, calibrated)
