"""Checks before the first long stage of a deployment, for problems that would appear at its end."""

from __future__ import annotations

from pathlib import Path

from clipdeploy.core.errors import DatasetError, UsageError
from clipdeploy.core.files import check_writable
from clipdeploy.core.passport import Passport
from clipdeploy.core.progress import Progress
from clipdeploy.engines.backends import Backend, choose_backend, tensorrt_module
from clipdeploy.engines.build_config import check_options
from clipdeploy.imaging import ImageFolder, open_images
from clipdeploy.imaging.overlap import shared_images
from clipdeploy.imaging.survey import Few
from clipdeploy.packaging.cpp import check_replaceable
from clipdeploy.stages.calibrate import choose_images
from clipdeploy.stages.deploy.config import DeployConfig
from clipdeploy.stages.quantize import read_recipe
from clipdeploy.stages.verify.setup import (
    labelled_images,
    refuse_for_embeddings,
    refuse_unreadable,
)
from clipdeploy.workspace.folder import Workspace

__all__ = ["check_deployment", "check_labels"]


def check_deployment(
    workspace: Workspace, model: str, config: DeployConfig, progress: Progress
) -> None:
    """Check the images, the compiler, the recipe and the folders of a deployment.

    Raises:
        UsageError: INT8 or FP8 without calibration images, FP8 that cannot be packaged, or a recipe
            for another precision.
        DatasetError: images are missing or unreadable, or calibration images are also judged on.
        ArtifactError, FileError, BuildError: the recipe, a folder or TensorRT cannot be used.
    """
    if config.quantize_recipe is not None:
        for precision in config.quantised:
            read_recipe(config.quantize_recipe, precision)
    backend = choose_backend(config.build.backend).backend
    check_options(backend, tensorrt_module(backend), config.build)
    _check_packable(config, backend)
    _check_exists(config.val, "--val-data")
    judging = open_images(config.val)
    if config.calibration is not None:
        _check_exists(config.calibration, "--calibration-data")
        observed = choose_images(config.calibration, config.calibrate)
        _readable(observed, progress, skip=config.calibrate.skip_unreadable)
        _refuse_shared(observed, judging, config)
    elif config.calibrates and not workspace.calibration(model).exists():
        raise UsageError(
            f"{config.quantised[0].upper()} without calibration images",
            hint="pass --calibration-data CALIBRATION_IMAGES",
        )
    _readable(judging, progress, skip=config.verify.skip_unreadable)
    _writable(workspace, model, config)


def _check_packable(config: DeployConfig, backend: Backend) -> None:
    """Refuse a deployment in FP8 that would package its graph: only engines run FP8 in production.

    Raises:
        UsageError: the graph would be packaged, because the engine cannot be run or served.
    """
    if config.precision != "fp8" or not config.package:
        return
    if config.scope.graphs_only:
        raise UsageError(
            "a graph in FP8 cannot be packaged, only an engine",
            hint="leave out --graphs-only, or deploy --int8 or --fp16",
        )
    if backend == "tensorrt-rtx" and (config.triton or not config.cpp):
        raise UsageError(
            "Triton loads neither engines of TensorRT-RTX nor graphs in FP8",
            hint="pass --cpp DIR, or --backend tensorrt on a machine with a GPU",
        )


def check_labels(config: DeployConfig, passport: Passport) -> None:
    """Check the labels of the images to judge on, once the classes are known.

    An embedding model needs none.

    Raises:
        DatasetError: folders are not classes, or labels are unreadable or missing.
        UsageError: an option for classifiers, with an embedding model.
    """
    if passport.embeds:
        refuse_for_embeddings(config.verify.limits, config.scope)
    images = labelled_images(config.val, passport, config.scope, lambda text: None)
    needed = passport.weights.kind != "random" and not passport.embeds
    if needed and not images.labelled:
        raise DatasetError(
            f"not all images of {config.val} have a label, which a verdict needs",
            hint="use class folders, or pass a list of names and classes with --labels FILE",
        )


def _check_exists(path: Path, option: str) -> None:
    if not path.exists():
        raise DatasetError(f"{path} does not exist", hint=f"check the path given to {option}")


def _readable(images: ImageFolder, progress: Progress, *, skip: bool) -> None:
    refuse_unreadable(images, lambda text: None, progress, skip_unreadable=skip)


def _refuse_shared(observed: ImageFolder, judging: ImageFolder, config: DeployConfig) -> None:
    # The accuracy of random weights is not judged.
    if config.weights.random_seed is not None:
        return
    if shared := shared_images(observed, judging):
        raise DatasetError(
            f"{judging.root} holds images of {observed.root} that the engine would be "
            f"calibrated on: {Few.of(shared)}",
            hint="remove them from --calibration-data or --val-data",
        )


def _writable(workspace: Workspace, model: str, config: DeployConfig) -> None:
    check_writable(workspace.deployment(model))
    if config.triton is not None:
        check_writable(config.triton / "probe")
    if config.cpp is not None:
        check_writable(config.cpp)
        check_replaceable(config.cpp, force=True)
