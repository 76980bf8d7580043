"""``scripts/make_outlier_variants.py``, which is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file, save_file

from clipdeploy import zoo

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def channel_outliers(target: Path, seed: int) -> None:
    """The demo's weights with the channel outliers of real CLIP ViTs, the function kept."""
    path = SCRIPTS / "make_outlier_variants.py"
    spec = importlib.util.spec_from_file_location("make_outlier_variants", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass with postponed annotations looks its module up.
    sys.modules[spec.name] = module
    with mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]):
        spec.loader.exec_module(module)
    del sys.modules[spec.name]
    tensors = load_file(zoo.demo_file("weights.safetensors"))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(module.add_channel_outliers(tensors, seed), target)
