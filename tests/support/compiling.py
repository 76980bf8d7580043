"""Plans of the demo model, compiled for real and kept in memory."""

from __future__ import annotations

from pathlib import Path

from clipdeploy.core.passport import TensorSpec
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.plan_writer import Piece

# The demo model's input.
SPEC = TensorSpec("image", "float32", ("batch", 3, 32, 32))


def ignore(piece: Piece) -> None:
    """Take a piece of a plan that nobody needs."""


def compiled_plan(compiler: Compiler, graph: Path, config: BuildConfig = BuildConfig()) -> bytes:
    """The plan of ``graph``, whose input is ``SPEC``."""
    pieces: list[bytes] = []
    compiler.compile(graph, SPEC, config, None, lambda piece: pieces.append(bytes(piece)))
    return b"".join(pieces)
