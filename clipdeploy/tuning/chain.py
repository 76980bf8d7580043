"""The network as a chain of sessions, each part of it the reference's or a candidate's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from clipdeploy.core.errors import GraphError
from clipdeploy.tuning.coordinates import find_bridges, find_segments
from clipdeploy.tuning.segments import Part, Segment, read_sources, switch_input, switchable
from clipdeploy.tuning.taps import find_tap
from exporters.graphs import read_whole
from exporters.session import OnnxSession

__all__ = ["Chain", "Tensor"]

Tensor = NDArray[Any]


class Chain:
    """Reference and candidate, switchable a part at a time; a session for each segment.

    Images (B, ...) enter the first segment as the graphs take them, tokens (B, N, C) go from one to
    the next, and logits (B, classes) leave the last.

    Raises:
        GraphError: the two do not have the same names.
        FileError: one cannot be read, or a file of its weights.
    """

    def __init__(
        self, reference: Path, candidate: Path, *, optimise: bool = True, threads: int = 0
    ) -> None:
        files = [(str(path), read_whole(path)) for path in (reference, candidate)]
        self.reference, self.candidate = read_sources(files)
        segments = find_segments(ir.from_proto(self.reference.model))
        self.bridges = find_bridges(self.reference, self.candidate, segments)
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.everything = frozenset(s for segment in segments for s in segment.switches)
        self.linears = tuple(
            s
            for segment in segments
            for s in segment.switches
            if s != segment.name and s != f"{segment.name}.rest"
        )
        self._sessions = [
            OnnxSession(
                switchable(segment, self.reference, self.candidate, self.bridges),
                name=f"{segment.name} of {candidate}",
                exact_int8=self.candidate.unsigned,
                optimise=optimise,
                threads=threads,
            )
            for segment in segments
        ]

    def step(self, index: int, x: Tensor, on: Collection[str]) -> Tensor:
        """Segment ``index`` on ``x``, the switches of ``on`` at the candidate."""
        return self.parts(index, x, on, [self.segments[index].output])[0]

    def parts(
        self, index: int, x: Tensor, on: Collection[str], outputs: Sequence[str]
    ) -> list[Tensor]:
        """:meth:`step`, and the tensors inside the segment that ``outputs`` names."""
        switches = {switch_input(s): np.asarray(s in on) for s in self.segments[index].switches}
        return self._sessions[index].run(x, switches, outputs)

    def run(self, x: Tensor, on: Collection[str], first: int = 0) -> list[Tensor]:
        """What leaves each segment from ``first`` on; ``x`` enters it."""
        outputs = []
        for index in range(first, len(self.segments)):
            x = self.step(index, x, on)
            outputs.append(x)
        return outputs

    def rest(self, x: Tensor, on: Collection[str], index: int) -> Tensor:
        """The logits, from what left segment ``index``."""
        return self.run(x, on, index + 1)[-1] if index + 1 < len(self.segments) else x

    def weight_shape(self, name: str) -> tuple[int, int]:
        """(Cin, Cout) of a Linear.

        Raises:
            GraphError: its weight is no constant.
        """
        weight = self.reference.constant(self.reference.product(name)[0].input[1])
        if weight is None:
            raise GraphError(f"{name} of {self.reference.name} has no constant weight")
        return int(weight.shape[0]), int(weight.shape[1])

    def single(self, name: str) -> tuple[OnnxSession, str]:
        """A session of the Linear ``name`` alone, from its own input, and its switch's name.

        Raises:
            GraphError: the two graphs do not feed it the same tensor.
        """
        tensor = find_tap(self.reference, name).tensor
        segment = Segment(name, tensor, (Part(name, name),))
        source = find_tap(self.candidate, name).tensor
        if source != tensor:
            raise GraphError(f"{name} reads {source} in {self.candidate.name}, not {tensor}")
        model = switchable(segment, self.reference, self.candidate)
        session = OnnxSession(model, name=name, exact_int8=self.candidate.unsigned)
        return session, switch_input(name)
