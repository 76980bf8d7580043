"""``import clipdeploy``: the public names, and nothing but them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

import clipdeploy
from clipdeploy import pipeline


def _fresh(code: str) -> str:
    """What ``code`` prints in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    return done.stdout


def test_the_package_offers_every_verb_of_the_pipeline() -> None:
    for name in pipeline.__all__:
        assert getattr(clipdeploy, name) is getattr(pipeline, name)
    assert set(pipeline.__all__) < set(dir(clipdeploy))


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'verify_modell'"):
        _ = clipdeploy.verify_modell  # type: ignore[attr-defined]
    # Imported by the pipeline, but not public.
    assert not hasattr(clipdeploy, "annotations")


def test_the_import_loads_no_stage_and_changes_nothing() -> None:
    code = """
import os, sys, warnings
environment, filters = dict(os.environ), list(warnings.filters)
import clipdeploy
print([environment == dict(os.environ), filters == list(warnings.filters)])
print([name for name in sys.modules if name.split(".")[0] in
       ("torch", "numpy", "onnx", "rich", "PIL", "exporters", "calibration")])
"""
    unchanged, loaded = map(ast.literal_eval, _fresh(code).splitlines())
    assert unchanged == [True, True]
    assert loaded == []


def test_the_stages_change_no_setting_of_the_process_either() -> None:
    code = """
import PIL.Image, torch, onnx, onnxruntime, matplotlib, numpy, onnxscript, polygraphy
import os, warnings
environment, filters = dict(os.environ), list(warnings.filters)
import clipdeploy
clipdeploy.export_model
print([environment == dict(os.environ), filters == list(warnings.filters)])
"""
    assert ast.literal_eval(_fresh(code)) == [True, True]
