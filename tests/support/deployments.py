"""Shared by tests of deployments: fast settings, copies of digits, hashes of a folder."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

from clipdeploy.benchmark import BenchmarkConfig
from clipdeploy.core.files import sha256_file
from clipdeploy.models import cards
from clipdeploy.pipeline import DeployConfig, VerifyConfig, VerifyScope

__all__ = ["CALIBRATION", "CONFIG", "QUICK", "TEST", "copied", "hashes"]

CALIBRATION = cards.demo_file("calibration.zip")
TEST = cards.demo_file("test.zip")
# With 24 images and no difference a drop below 13.9 points is proven.
CONFIG = DeployConfig(
    val=TEST,
    calibration=CALIBRATION,
    verify=VerifyConfig(max_drop=15, workers=0),
    scope=VerifyScope(limit=24, graphs_only=True),
    benchmark=BenchmarkConfig(batches=(1,), seconds=None, rounds=3, warmup=0),
)
QUICK = replace(CONFIG, benchmark=None)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def copied(data: Path, folder: Path, count: int) -> Path:
    """Copy the first ``count`` images of each class."""
    with zipfile.ZipFile(data) as archive:
        for digit in range(10):
            names = sorted(n for n in archive.namelist() if n.startswith(f"{digit}/"))
            archive.extractall(folder, names[:count])
    return folder
