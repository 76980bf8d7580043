"""Workspaces of the demo model, made once and copied by who changes them."""

from __future__ import annotations

import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

from shared_traces import shared_traces

from clipdeploy.core.passport import Precision
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    build_model,
    calibrate_model,
    convert_model,
    export_model,
    quantize_model,
    verify_model,
)
from clipdeploy.stages.calibrate import CalibrateConfig
from clipdeploy.stages.text_tower import export_towers
from clipdeploy.stages.verify.setup import VerifyScope
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import Workspace

__all__ = [
    "CLIP",
    "EMBEDDER",
    "MADE",
    "TENSORRT",
    "complete_workspace",
    "few_digits",
    "graph_workspace",
    "tower_workspace",
]

# The demo's CLIP, and the embedding model of it.
CLIP = cards.demo_file("clip")
EMBEDDER = "vit-p4-32px-w96-d6-h6-e32-normalised"

# The precisions of the graphs that graph_workspace makes.
MADE: tuple[Precision, ...] = ("fp32", "fp16", "int8")
TENSORRT = find_spec("tensorrt_rtx") is not None


def graph_workspace(root: Path) -> Workspace:
    """The demo card exported, calibrated, converted to FP16 and quantised."""
    workspace = Workspace(root)
    with shared_traces():
        export_model(workspace, cards.DEMO)
    convert_model(workspace, cards.DEMO)
    calibrate_model(workspace, cards.DEMO, cards.demo_file("calibration.zip"))
    quantize_model(workspace, cards.DEMO)
    return workspace


def tower_workspace(root: Path) -> Workspace:
    """Both towers of the demo's CLIP as embedding models, in FP32 and FP16."""
    workspace = Workspace(root)
    with shared_traces():
        export_towers(workspace, None, WeightsChoice(CLIP, embedding="normalised"))
    convert_model(workspace, EMBEDDER)
    convert_model(workspace, EMBEDDER, tower="text")
    return workspace


def complete_workspace(graphs: Workspace, root: Path) -> Workspace:
    """A copy of :func:`graph_workspace` with shards to merge, both towers of the demo's CLIP, and
    an engine where there is TensorRT-RTX.
    """
    workspace = Workspace(root)
    shutil.copytree(graphs.root, workspace.root)
    calibration, test = cards.demo_file("calibration.zip"), cards.demo_file("test.zip")
    for part in (1, 2):
        verify = VerifyConfig(max_drop=20, shard=(part, 2), workers=0)
        scope = VerifyScope(graphs_only=True, limit=24)
        calibrate_model(workspace, cards.DEMO, calibration, CalibrateConfig(24, shard=(part, 2)))
        verify_model(workspace, cards.DEMO, test, verify, scope)
    with shared_traces():
        export_towers(workspace, None, WeightsChoice(CLIP, embedding="normalised"))
    workspace.remember(cards.DEMO)
    if TENSORRT:
        build_model(workspace, cards.DEMO, "fp16", BuildConfig(backend="tensorrt-rtx"))
    return workspace


def few_digits(path: Path, each: int, source: str = "test.zip") -> Path:
    """Write the first ``each`` digits of each class as a zip at ``path``, always the same bytes."""
    with (
        zipfile.ZipFile(cards.demo_file(source)) as archive,
        zipfile.ZipFile(path, "w") as few,
    ):
        for digit in range(10):
            names = sorted(name for name in archive.namelist() if name.startswith(f"{digit}/"))
            for name in names[:each]:
                few.writestr(zipfile.ZipInfo(name), archive.read(name))
    return path
