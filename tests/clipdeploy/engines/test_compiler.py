"""Tests the builder's flags in real plans and configurations, and a TensorRT that cannot start."""

from __future__ import annotations

from typing import Any

import pytest
from compiling import SPEC, compiled_plan
from tensorrt_bindings import NEWEST, OLDEST, bindings

from clipdeploy.engines import compiler as compiler_module
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import Compiler
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

ONE_GPU = BuildConfig(compute_capability=("8.9",))
_START = """
from clipdeploy.core.errors import BuildError
from clipdeploy.engines.backends import tensorrt_module
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import _PROBE_INPUT, Compiler, _probe_graph

compiler = Compiler("tensorrt", tensorrt_module("tensorrt"))
try:
    compiler.compile(_probe_graph(), _PROBE_INPUT, BuildConfig(), None, print)
except BuildError as error:
    print(error)
"""


def new_builder(compiler: Compiler) -> Any:
    """A builder with Polygraphy's logger: TensorRT keeps the first logger of a process."""
    from polygraphy.backend.trt import get_trt_logger

    return compiler.module.Builder(get_trt_logger())


def configured(compiler: Compiler, config: BuildConfig) -> Any:
    """TensorRT-RTX's own configuration object, made for a network with the demo's input."""
    builder = new_builder(compiler)
    network = builder.create_network()
    shape = tuple(-1 if isinstance(axis, str) else axis for axis in SPEC.shape)
    network.add_input(SPEC.name, compiler.module.float32, shape)
    return compiler._config(SPEC, config)(builder, network)


def test_a_plan_does_not_compute_in_tf32(
    compiler: Compiler, demo_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    plan = compiled_plan(compiler, graph, ONE_GPU)
    assert b"tf32=1" not in plan
    # The plan would say so: with TensorRT's default it does.
    monkeypatch.setattr(Compiler, "_config", Compiler._loader)
    assert compiled_plan(compiler, graph, ONE_GPU).count(b"tf32=1") > 0


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("config", "set_flags"),
    [
        (BuildConfig(), set()),
        (BuildConfig(refittable=True), {"REFIT"}),
        (BuildConfig(strip_weights=True), {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        (BuildConfig(strip_weights=True, refittable=True), {"STRIP_PLAN", "REFIT"}),
    ],
)
def test_the_flags_of_the_builder(
    config: BuildConfig,
    set_flags: set[str],
    backend: str,
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "tensorrt":
        # Polygraphy's other class, on the same object: both backends have these flags.
        monkeypatch.setattr(compiler_module, "targets_capabilities", lambda module: False)
    made = configured(compiler, config)
    flags = compiler.module.BuilderFlag.__members__
    asked = {"TF32", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"}
    assert {name for name in asked if made.get_flag(flags[name])} == set_flags


def test_tf32_is_the_default_of_tensorrt(compiler: Compiler) -> None:
    config = new_builder(compiler).create_builder_config()
    assert config.get_flag(compiler.module.BuilderFlag.TF32)


@pytest.mark.parametrize("requirement", [OLDEST, NEWEST])
def test_a_tensorrt_that_cannot_start_is_one_line(
    requirement: str, pytestconfig: pytest.Config
) -> None:
    """As with a driver that is too old: TensorRT creates no builder."""
    made = bindings(requirement, pytestconfig.cache.mkdir("tensorrt-bindings"))
    done = made.python("-c", _START)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"tensorrt {made.version} cannot start: no reason given "
        "(the driver may be too old, or GPU memory full: see clipdeploy doctor)\n"
    )
