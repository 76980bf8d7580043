"""Exports a PyTorch module to an ONNX graph and checks it before the file is saved."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from clipdeploy.core.errors import GraphError, first_line
from clipdeploy.core.passport import BATCH_AXIS, Passport, settings_of
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.core.spans import BATCH, OPSET, check_numbers
from exporters.checks import PARITY_BATCHES, check_parity, check_structure
from exporters.graphs import save_graph
from exporters.headers import GraphArtifact
from exporters.initializers import drop_weights
from exporters.passes import run_lean_passes
from exporters.passes.opset import TRACED_OPSET, SetOpset
from exporters.preprocess_graph import add_preprocessing, preprocessed_passport
from exporters.repeated import UnrepeatableError, repeat_blocks, runs_of, shortened
from exporters.samples import GraphSamples

__all__ = ["ExportConfig", "export_graph", "trace", "trace_whole"]


@dataclass(frozen=True)
class ExportConfig:
    """Options of the ONNX export.

    ``opset`` is the ONNX operator set, 17 to 23; 20 is the first with Gelu as one node.  ``batch``
    is a fixed batch size, ``None`` keeps it symbolic.  With ``preprocess`` the graph takes uint8
    (B, S, S, 3) and normalises and transposes it itself.

    Raises:
        UsageError: ``opset`` or ``batch`` is out of range.
    """

    opset: int = 20
    batch: int | None = None
    preprocess: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, opset=OPSET, batch=BATCH.or_none)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Suppress torch.onnx's log lines, warnings and progress on stdout while the block runs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _fix_batch(model: ir.Model, batch: int) -> None:
    graph = model.graph
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        if value.shape is not None:
            axes = [batch if str(axis) == BATCH_AXIS else axis for axis in value.shape]
            value.shape = ir.Shape(axes)


def _traced(module: nn.Module, passport: Passport) -> ir.Model:
    """Trace ``module``, with the blocks repeated that are equal, if they can be."""
    runs = runs_of(module)
    if runs:
        with contextlib.suppress(UnrepeatableError, GraphError):
            short = shortened(module, runs)
            model = trace_whole(short, passport)
            repeat_blocks(model, short, module, runs)
            return model
    return trace_whole(module, passport)


def trace_whole(module: nn.Module, passport: Passport) -> ir.Model:
    """Trace every block of ``module``, to which ``passport`` belongs as in :func:`trace`.

    Raises:
        GraphError: torch.onnx could not trace the module.
    """
    shape = tuple(axis for axis in passport.input.shape[1:] if isinstance(axis, int))
    # Two samples: torch.export treats an axis of size 1 as a constant.
    example = torch.zeros(2, *shape, dtype=getattr(torch, passport.input.dtype))
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    try:
        with _quiet_torch(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=TRACED_OPSET,
                dynamic_shapes=({0: batch},),
                input_names=[passport.input.name],
                output_names=[passport.output.name],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise GraphError(
            f"torch.onnx cannot trace {passport.model}: {first_line(error)}"
        ) from error
    assert program is not None
    return program.model


def trace(module: nn.Module, passport: Passport, config: ExportConfig) -> ir.Model:
    """Trace ``module`` to an ONNX graph, run the graph passes and apply ``config``.

    Of equal blocks two are traced and the others copied (:mod:`exporters.repeated`).  ``passport``
    describes ``module``, so its input is float32 (B, 3, S, S), or int32 (B, 77), for every
    ``config``.

    Raises:
        GraphError: torch.onnx could not trace the module.
    """
    model = _traced(module, passport)
    run_lean_passes(model)
    SetOpset(config.opset)(model)
    if config.preprocess:
        add_preprocessing(model, passport.preprocess)
    if config.batch is not None:
        _fix_batch(model, config.batch)
    return model


def _drop_weights(model: ir.Model, module: nn.Module | None) -> None:
    # Deleting the model does not free the memory: onnxscript's global rewrite rules keep a
    # reference to the last graph, and so to the parameters.
    drop_weights(model.graph)
    for parameter in module.parameters() if module is not None else ():
        parameter.data = parameter.data.new_empty(0)
    gc.collect()


def _graph_passport(passport: Passport, config: ExportConfig) -> Passport:
    """Return the passport of the graph, from the passport of the module."""
    batch = BATCH_AXIS if config.batch is None else config.batch
    passport = replace(
        passport,
        settings=settings_of(config) | passport.settings,
        input=replace(passport.input, shape=(batch, *passport.input.shape[1:])),
        output=replace(passport.output, shape=(batch, *passport.output.shape[1:])),
    )
    return preprocessed_passport(passport) if config.preprocess else passport


def _reference(
    module: nn.Module, inputs: NDArray[Any], batches: tuple[int, ...]
) -> dict[int, NDArray[np.float32]]:
    with torch.no_grad():
        logits = module(torch.from_numpy(inputs)).numpy()
    return {count: logits[:count] for count in batches}


def export_graph(
    module: nn.Module,
    path: Path,
    passport: Passport,
    samples: GraphSamples,
    config: ExportConfig = ExportConfig(),
    progress: Progress = SILENT,
    *,
    release: bool = False,
) -> GraphArtifact:
    """Export ``module`` to ``path``; the file is created only if every check passes.

    Args:
        module: float32 classifier in evaluation mode, (B, 3, S, S) -> (B, classes), or a text
            tower, (B, 77) -> (B, D).
        passport: description of ``module``; the graph's input and output are checked against it.
        samples: real images or texts for the parity check, about 3.
        release: free the module's parameters before the parity check, to save memory; they are
            empty afterwards.

    Raises:
        GraphError: the module cannot be traced, the graph is invalid or differs from ``passport``,
            or its logits differ from the module's.
        FileError: the file cannot be written.
    """
    batches = PARITY_BATCHES if config.batch is None else (config.batch,)
    samples = samples.of(max(PARITY_BATCHES) if config.batch is None else config.batch)
    with progress.task(f"trace {passport.model}"):
        model = trace(module, passport, config)
    inputs = samples.as_input(passport.input)
    passport = _graph_passport(passport, config)
    with progress.task("reference logits"):
        reference = _reference(module, inputs, batches)

    def check(written: Path) -> None:
        # ONNX Runtime needs the memory that the module and its traced graph hold.
        _drop_weights(model, module if release else None)
        check_parity(written, samples.as_input(passport.input), reference)

    with progress.task("check the graph"):
        check_structure(model, passport)
        return save_graph(model, path, passport, check)
