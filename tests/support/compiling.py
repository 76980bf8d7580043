"""Compiles plans of the demo model in memory."""

from __future__ import annotations

from pathlib import Path

from clipdeploy.core.passport import TensorSpec
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.plan_writer import Piece

# The demo model's input.
SPEC = TensorSpec("image", "float32", ("batch", 3, 32, 32))


def ignore(piece: Piece) -> None:
    """Discard a piece of a plan."""


def compiled_plan(compiler: Compiler, graph: Path, config: BuildConfig = BuildConfig()) -> bytes:
    """Compile ``graph``, whose input is ``SPEC``, and return the plan."""
    pieces: list[bytes] = []
    compiler.compile(graph, SPEC, config, None, lambda piece: pieces.append(bytes(piece)))
    return b"".join(pieces)
