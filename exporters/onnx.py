"""``nn.Module`` -> lean ONNX graph with a symbolic batch, checked before it gets its name."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from exporters.artifact import PASSPORT_KEY, Passport, settings_of, to_json
from exporters.checks import PARITY_BATCHES, check_parity, check_structure
from exporters.errors import GraphError
from exporters.files import atomic_path, sha256_file
from exporters.graphs import GraphArtifact, write_model
from exporters.passes import run_lean_passes
from exporters.progress import SILENT, Progress

__all__ = ["ExportConfig", "export_graph", "trace"]

_BATCH_AXIS = "batch"


@dataclass(frozen=True)
class ExportConfig:
    """How a graph is written.

    ``opset`` is the ONNX operator set; 20 is the first with Gelu as one node.
    """

    opset: int = 20

    def __post_init__(self) -> None:
        if not 20 <= self.opset <= 23:
            raise GraphError(f"opset {self.opset} is not supported", hint="choose 20 to 23")


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch.onnx speaks of torchvision, of its own deprecations and of every step it takes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def trace(module: nn.Module, passport: Passport, config: ExportConfig) -> ir.Model:
    """Trace ``module`` to a graph with a symbolic batch and lean, named nodes.

    Raises:
        GraphError: torch.onnx could not trace the module.
    """
    shape = tuple(axis for axis in passport.input.shape[1:] if isinstance(axis, int))
    # Two images, not one: torch.export would take a batch of one for a constant.
    example = torch.zeros(2, *shape)
    batch = torch.export.Dim(_BATCH_AXIS, min=1)
    try:
        with _quiet_torch(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=config.opset,
                dynamic_shapes=({0: batch},),
                input_names=[passport.input.name],
                output_names=[passport.output.name],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"torch.onnx cannot trace {passport.model}: {reason}") from error
    assert program is not None
    model = program.model
    run_lean_passes(model)
    return model


def _reference(module: nn.Module, images: NDArray[np.float32]) -> dict[int, NDArray[np.float32]]:
    with torch.no_grad():
        return {count: module(torch.from_numpy(images[:count])).numpy() for count in PARITY_BATCHES}


def export_graph(
    module: nn.Module,
    path: Path,
    passport: Passport,
    images: NDArray[np.float32],
    config: ExportConfig = ExportConfig(),
    progress: Progress = SILENT,
) -> GraphArtifact:
    """Export ``module`` to ``path``, which appears only once every check has passed.

    Args:
        module: a float32 classifier in evaluation mode, (B, 3, S, S) -> (B, classes).
        passport: what the graph will say of itself; its input and output specs are checked.
        images: at least 7 normalised real images, float32 (N, 3, S, S), for the parity check.

    Raises:
        GraphError: the module cannot be traced, the graph breaks a promise, or its logits are not
            the module's.
        FileError: the file cannot be written.
    """
    if len(images) < max(PARITY_BATCHES):
        raise GraphError(
            f"{len(images)} images are too few for the parity check at batches {PARITY_BATCHES}"
        )
    passport = replace(passport, settings=settings_of(config))
    with progress.task(f"trace {passport.model}"):
        model = trace(module, passport, config)
        model.metadata_props[PASSPORT_KEY] = to_json(passport).decode()
    with progress.task("reference logits"):
        reference = _reference(module, images)
    with atomic_path(path) as temporary, progress.task("check the graph"):
        check_structure(model, passport)
        write_model(model, temporary)
        check_parity(temporary, images, reference)
    return GraphArtifact(
        path, sha256_file(path), passport, path.stat().st_size, len(list(model.graph)), True
    )
