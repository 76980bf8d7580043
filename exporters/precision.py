"""Converts an FP32 graph to a strongly typed FP16 graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from clipdeploy.core.errors import GraphError
from clipdeploy.core.passport import Passport
from exporters.checks import check_structure
from exporters.functions import inlined
from exporters.graphs import load_graph, save_graph
from exporters.headers import GraphArtifact, graph_sha256, read_passport
from exporters.overflow import check_storage, largest_values, near_limit
from exporters.passes.fp16 import ToFloat16
from exporters.preprocess_graph import PREPROCESS_TENSORS
from exporters.samples import GraphSamples

__all__ = ["Fp16Config", "convert_to_fp16", "half_precision", "io_passport"]

_FLOAT_INPUTS = ("float32", "float16")


# float16 has 11 significant bits, and correct graphs have 50 dB or more.  At 20 dB the error is a
# tenth of the logits, which happens when weights underflow to zero.
_LEAST_DB = 20.0


@dataclass(frozen=True)
class Fp16Config:
    """Options of the FP16 conversion.

    ``keep`` names tensors that stay float32; ``half_io`` makes image and logits float16 too.
    """

    keep: tuple[str, ...] = ()
    half_io: bool = False


def half_precision(model: ir.Model, config: Fp16Config = Fp16Config()) -> None:
    """Convert ``model`` to float16 in place; see :mod:`exporters.passes.fp16`.

    Raises:
        GraphError: a weight is outside float16's range, ``keep`` names an unknown tensor, or the
            graph contains other graphs or local functions.
    """
    known = {value.name for node in model.graph for value in (*node.inputs, *node.outputs) if value}
    if unknown := [name for name in config.keep if name not in known]:
        raise GraphError(
            f"the graph has no tensor {unknown[0]!r}",
            hint="look up the tensor names in a graph viewer such as Netron",
        )
    ToFloat16((*config.keep, *PREPROCESS_TENSORS), half_io=config.half_io)(model)


def io_passport(passport: Passport, config: Fp16Config) -> Passport:
    """Return ``passport`` with float16 or float32 input and output types; uint8 stays uint8."""
    dtype = "float16" if config.half_io else "float32"
    image = dtype if passport.input.dtype in _FLOAT_INPUTS else passport.input.dtype
    return replace(
        passport,
        input=replace(passport.input, dtype=image),
        output=replace(passport.output, dtype=dtype),
    )


def convert_to_fp16(
    source: Path,
    target: Path,
    samples: GraphSamples,
    config: Fp16Config = Fp16Config(),
) -> GraphArtifact:
    """Convert the FP32 graph ``source`` to FP16 and save it as ``target``.

    Tensors whose values on ``samples``, a few real images or texts, exceed half of float16's
    maximum stay float32.  The passport lists all float32 tensors under ``keep_fp32``, and those
    that ``config`` does not name under ``near_limit``.

    Raises:
        GraphError: a weight or a tensor overflows float16, the logits have an SQNR below 20 dB, or
            the result is not a valid graph.
        FileError, ArtifactError: ``source`` cannot be read, or ``target`` written.
    """
    passport = read_passport(source)
    images = samples.as_input(passport.input)
    reference, peaks = largest_values(source, images)
    near = [name for name in near_limit(peaks) if name not in config.keep]
    config = replace(config, keep=tuple(dict.fromkeys((*config.keep, *near))))
    model = load_graph(source, inlined)
    half_precision(model, config)
    passport = replace(
        io_passport(passport, config),
        precision="fp16",
        parents={**passport.parents, "source_graph": graph_sha256(source)},
        settings={
            **passport.settings,
            "keep_fp32": list(config.keep),
            "half_io": config.half_io,
            **({"near_limit": near} if near else {}),
        },
    )
    check_structure(model, passport)

    def check(written: Path) -> None:
        db = check_storage(written, images, reference)
        if db is not None and db < _LEAST_DB:
            raise GraphError(
                f"stored as float16, the logits have an SQNR of {db:.1f} dB, below {_LEAST_DB:g}: "
                "weights or activations are too small for float16",
                hint="build with --fp32",
            )

    return save_graph(model, target, passport, check)
