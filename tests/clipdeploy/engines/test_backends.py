"""Tests the rules on versions, and what is said where TensorRT creates nothing."""

from __future__ import annotations

import configparser
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from clipdeploy.core.device import Gpu
from clipdeploy.core.errors import BuildError
from clipdeploy.engines.backends import (
    OLDEST,
    check_versions,
    created,
    machine_name,
    release_of,
)
from clipdeploy.engines.build_config import BuildConfig, check_options

SETUP = Path(__file__).parents[3] / "setup.cfg"


def tensorrt(version: str) -> ModuleType:
    module = ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    return module


def test_the_oldest_versions_are_those_that_pip_requires() -> None:
    parser = configparser.ConfigParser()
    parser.read(SETUP)
    lines = parser["options"]["install_requires"] + parser["options.extras_require"]["tensorrt"]
    required = {r.name: str(r.specifier) for r in map(Requirement, filter(None, lines.split("\n")))}
    assert {name: required[name] for name in OLDEST} == {n: f">={v}" for n, v in OLDEST.items()}


@pytest.mark.parametrize("version", ["10.12.0.36", "10.13.3.9.post1", "11.4.0.106"])
def test_a_supported_version_is_accepted(version: str) -> None:
    check_versions("tensorrt", tensorrt(version))


def test_an_old_tensorrt_is_refused_before_the_build() -> None:
    with pytest.raises(BuildError) as caught:
        check_options("tensorrt-rtx", tensorrt("1.4.0.76"), BuildConfig())
    assert str(caught.value) == (
        "tensorrt-rtx 1.4.0.76 is too old: clipdeploy needs 1.5 or newer "
        '(pip install "tensorrt-rtx>=1.5")'
    )


def test_an_old_polygraphy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polygraphy.__version__", "0.49.26")
    with pytest.raises(BuildError, match=r"polygraphy 0\.49\.26 is too old"):
        check_versions("tensorrt", tensorrt("10.12.0.36"))


@pytest.mark.parametrize(
    ("version", "refused"),
    [("10.12.0.36", False), ("11.2.1.2", False), ("11.3.0.99", True), ("11.4.0.106", True)],
)
def test_a_refittable_engine_that_may_lack_biases_is_refused(version: str, refused: bool) -> None:
    config = BuildConfig(refittable=True)
    if refused:
        with pytest.raises(BuildError, match=rf"with tensorrt {version}.* without its bias"):
            check_options("tensorrt", tensorrt(version), config)
    else:
        check_options("tensorrt", tensorrt(version), config)
    # The weights of a stripped engine are its own: REFIT_IDENTICAL is enough.
    check_options("tensorrt", tensorrt(version), BuildConfig(strip_weights=True))


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("10.13.3.9", "10.13.3.9"),
        ("10.13.3.9.post1", "10.13.3.9"),
        ("10.14.1.48.post12", "10.14.1.48"),
        ("10.13.post1.3", "10.13.post1.3"),
        ("odd", "odd"),
    ],
)
def test_a_post_release_is_the_same_release(version: str, release: str) -> None:
    assert release_of(version) == release


def test_what_tensorrt_does_not_create_is_none() -> None:
    def constructor() -> str:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    def wrong_call() -> str:
        raise TypeError("__init__(): incompatible constructor arguments")

    assert created(lambda: "made") == "made"
    assert created(lambda: None) is None
    assert created(constructor) is None
    with pytest.raises(TypeError, match="incompatible"):
        created(wrong_call)


def test_the_name_of_a_machine_is_a_file_name() -> None:
    gpu = Gpu("NVIDIA RTX 6000/8000 (Ada)", (8, 9))
    name = machine_name("tensorrt-rtx", "1.7.1.116", gpu)
    assert name == "tensorrt-rtx-1.7.1.116-sm8.9-NVIDIA-RTX-6000-8000-Ada-"
    assert name != machine_name("tensorrt-rtx", "1.7.1.116", Gpu(gpu.name, (12, 0)))
