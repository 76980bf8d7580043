"""The file names of graphs and engines in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clipdeploy.core.passport import Tower

__all__ = ["artifact_path"]


def artifact_path(
    folder: Path,
    model: str,
    precision: str,
    kind: Literal["onnx", "engine"],
    tower: Tower = "image",
) -> Path:
    """``fp16.onnx`` in ``folder``; ``text-fp16.onnx`` for the text tower.

    Earlier versions wrote ``MODEL.fp16.onnx``: a file of that name is used if it is the only one.
    """
    if tower == "text":
        return folder / f"text-{precision}.{kind}"
    short, long = folder / f"{precision}.{kind}", folder / f"{model}.{precision}.{kind}"
    return long if long.exists() and not short.exists() else short
