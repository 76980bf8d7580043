"""Defaults and choices read from source equal those of the classes themselves."""

from __future__ import annotations

import importlib
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

import pytest

from clipdeploy.cli.config_fields import choices_of, default_of, value_of

DEFAULTS = [
    ("clipdeploy.verification.verifier.VerifyConfig", "max_drop"),
    ("clipdeploy.verification.verifier.VerifyConfig", "batch"),
    ("clipdeploy.engines.build_config.BuildConfig", "profiles"),
    ("clipdeploy.engines.build_config.BuildConfig", "timing_cache"),
    ("clipdeploy.benchmark.result.BenchmarkConfig", "batches"),
    ("clipdeploy.benchmark.result.BenchmarkConfig", "seconds"),
    ("clipdeploy.packaging.triton_config.TritonConfig", "queue_delay"),
    ("clipdeploy.stages.calibrate.CalibrateConfig", "seed"),
    ("exporters.onnx.ExportConfig", "opset"),
    # A constant of another module.
    ("calibration.config.QuantizeConfig", "min_sqnr"),
]
CHOICES = [
    ("clipdeploy.engines.build_config.BuildConfig", "backend"),
    ("clipdeploy.engines.build_config.BuildConfig", "hardware_compatible"),
    ("clipdeploy.benchmark.result.BenchmarkConfig", "provider"),
    ("clipdeploy.core.passport.Recipe", "numerics"),
    ("clipdeploy.imaging.layouts.Labelling", "layout"),
    ("clipdeploy.imaging.layouts.Labelling", "first_class"),
    ("clipdeploy.tuning.search.SearchConfig", "cost"),
    ("calibration.scheme.SchemeConfig", "range_method"),
]


def class_called(config: str) -> Any:
    module, _, name = config.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("config", "field"), DEFAULTS)
def test_defaults_are_those_of_the_class(config: str, field: str) -> None:
    (found,) = (each for each in fields(class_called(config)) if each.name == field)
    assert found.default is not MISSING
    assert default_of(config, field) == found.default


@pytest.mark.parametrize(("config", "field"), CHOICES)
def test_choices_are_those_of_the_type(config: str, field: str) -> None:
    hint = get_type_hints(class_called(config))[field]
    if type(None) in get_args(hint):
        hint = get_args(hint)[0]
    assert choices_of(config, field) == get_args(hint)


def test_constants_are_those_of_the_module() -> None:
    stage = importlib.import_module("clipdeploy.stages.calibrate")
    assert value_of("clipdeploy.stages.calibrate.FEW_IMAGES") == stage.FEW_IMAGES


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: default_of("clipdeploy.nowhere.Config", "seed"),
        lambda: default_of("exporters.onnx.NoConfig", "opset"),
        lambda: default_of("exporters.onnx.ExportConfig", "opsets"),
        # No default, and one that is not a literal.
        lambda: default_of("clipdeploy.stages.deploy.config.DeployConfig", "val"),
        lambda: default_of("clipdeploy.stages.bisect.BisectConfig", "labelling"),
        lambda: choices_of("exporters.onnx.ExportConfig", "opset"),
        lambda: value_of("exporters.onnx.NOTHING"),
    ],
)
def test_what_cannot_be_read_is_an_error(wrong: Any) -> None:
    with pytest.raises(LookupError):
        wrong()
