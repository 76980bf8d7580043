"""FP32 graph -> strongly typed FP16 graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from exporters.artifact import Passport
from exporters.checks import check_structure
from exporters.files import sha256_file
from exporters.graphs import GraphArtifact, load_graph, read_passport, save_graph
from exporters.passes.fp16 import ToFloat16

__all__ = ["Fp16Config", "convert_to_fp16", "half_precision"]


@dataclass(frozen=True)
class Fp16Config:
    """``keep`` names tensors that stay float32; ``half_io`` makes image and logits float16 too."""

    keep: tuple[str, ...] = ()
    half_io: bool = False


def half_precision(model: ir.Model, config: Fp16Config = Fp16Config()) -> None:
    """Convert ``model`` to float16 in place; see :mod:`exporters.passes.fp16`.

    Raises:
        GraphError: a weight lies beyond float16's range.
    """
    ToFloat16(config.keep, half_io=config.half_io)(model)


def io_passport(passport: Passport, config: Fp16Config) -> Passport:
    """``passport`` with the interface's types as ``config`` makes them."""
    dtype = "float16" if config.half_io else "float32"
    return replace(
        passport,
        input=replace(passport.input, dtype=dtype),
        output=replace(passport.output, dtype=dtype),
    )


def convert_to_fp16(source: Path, target: Path, config: Fp16Config = Fp16Config()) -> GraphArtifact:
    """Write the FP16 twin of an FP32 graph.

    Raises:
        GraphError: a weight lies beyond float16's range, or the result is no valid graph.
        FileError, ArtifactError: ``source`` cannot be read, or ``target`` written.
    """
    passport = read_passport(source)
    model = load_graph(source)
    half_precision(model, config)
    passport = replace(
        io_passport(passport, config),
        precision="fp16",
        parents={**passport.parents, "source_graph": sha256_file(source)},
        settings={**passport.settings, "keep_fp32": list(config.keep)},
    )
    check_structure(model, passport)
    return save_graph(model, target, passport)
