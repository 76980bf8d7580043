"""The file names of graphs and engines in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

__all__ = ["artifact_path"]


def artifact_path(
    folder: Path, model: str, precision: str, kind: Literal["onnx", "engine"]
) -> Path:
    """``fp16.onnx`` in ``folder``.

    Earlier versions wrote ``MODEL.fp16.onnx``: a file of that name is used if it is the only one.
    """
    short, long = folder / f"{precision}.{kind}", folder / f"{model}.{precision}.{kind}"
    return long if long.exists() and not short.exists() else short
