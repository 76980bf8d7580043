"""Runs a network segment by segment, with each part from the reference or from a candidate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from clipdeploy.core.errors import GraphError
from clipdeploy.tuning.coordinates import find_bridges, find_segments
from clipdeploy.tuning.segments import GraphSource, Part, Segment, switch_input, switchable
from clipdeploy.tuning.taps import find_tap
from exporters.graphs import read_proto
from exporters.session import OnnxSession

__all__ = ["Chain", "Tensor"]

Tensor = NDArray[Any]


class Chain:
    """ONNX Runtime sessions of all segments, whose parts switch between two graphs.

    The first segment takes images (B, ...) in the graphs' input format, segments exchange tokens
    (B, N, C), and the last returns logits (B, classes).

    Raises:
        GraphError: the graphs do not have the same tensor names.
        FileError: a graph or a file of its weights cannot be read.
    """

    def __init__(
        self, reference: Path, candidate: Path, *, optimise: bool = True, threads: int = 0
    ) -> None:
        self.reference, self.candidate = (
            GraphSource(read_proto(path), str(path)) for path in (reference, candidate)
        )
        model = ir.from_proto(self.reference.model)
        segments = find_segments(model, attention=self.candidate.attention)
        self.bridges = find_bridges(self.reference, self.candidate, segments)
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.everything = frozenset(s for segment in segments for s in segment.switches)
        self.linears = tuple(
            s
            for segment in segments
            for s in segment.switches
            if s != segment.name and not s.endswith((".rest", ".attn"))
        )
        self._sessions = [
            OnnxSession(
                switchable(segment, self.reference, self.candidate, self.bridges),
                name=f"{segment.name} of {candidate}",
                exact_int8=self.candidate.unsigned,
                fp8=self.candidate.fp8,
                optimise=optimise,
                threads=threads,
            )
            for segment in segments
        ]

    def step(self, index: int, x: Tensor, on: Collection[str]) -> Tensor:
        """Output of segment ``index`` for ``x``, with the switches ``on`` set to the candidate."""
        return self.parts(index, x, on, [self.segments[index].output])[0]

    def parts(
        self, index: int, x: Tensor, on: Collection[str], outputs: Sequence[str]
    ) -> list[Tensor]:
        """As :meth:`step`, but return the segment's tensors named in ``outputs``."""
        switches = {switch_input(s): np.asarray(s in on) for s in self.segments[index].switches}
        return self._sessions[index].run(x, switches, outputs)

    def run(self, x: Tensor, on: Collection[str], first: int = 0) -> list[Tensor]:
        """Outputs of all segments from ``first`` on, whose input is ``x``."""
        outputs = []
        for index in range(first, len(self.segments)):
            x = self.step(index, x, on)
            outputs.append(x)
        return outputs

    def rest(self, x: Tensor, on: Collection[str], index: int) -> Tensor:
        """The logits (B, classes), computed from the output ``x`` of segment ``index``."""
        return self.run(x, on, index + 1)[-1] if index + 1 < len(self.segments) else x

    def weight_shape(self, name: str) -> tuple[int, int]:
        """(Cin, Cout) of a Linear.

        Raises:
            GraphError: its weight is not a constant.
        """
        weight = self.reference.constant(self.reference.product(name)[0].input[1])
        if weight is None:
            raise GraphError(
                f"{name} of {self.reference.name} has no constant weight",
                hint="use a graph that `clipdeploy export` wrote",
            )
        return int(weight.shape[0]), int(weight.shape[1])

    def single(self, name: str) -> tuple[OnnxSession, str]:
        """A session that runs only the Linear ``name``, and the name of its switch input.

        Raises:
            GraphError: the Linear reads different tensors in the two graphs.
        """
        tensor = find_tap(self.reference, name).tensor
        segment = Segment(name, tensor, (Part(name, name),))
        source = find_tap(self.candidate, name).tensor
        if source != tensor:
            raise GraphError(f"{name} reads {source} in {self.candidate.name}, not {tensor}")
        model = switchable(segment, self.reference, self.candidate)
        session = OnnxSession(
            model, name=name, exact_int8=self.candidate.unsigned, fp8=self.candidate.fp8
        )
        return session, switch_input(name)
