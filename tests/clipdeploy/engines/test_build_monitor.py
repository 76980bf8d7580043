from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from logging.handlers import BufferingHandler

import pytest
from compiling import SPEC, compiled_plan, ignore

from clipdeploy.engines import backends
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.build_monitor import PERCENT, Phases, build_monitor
from clipdeploy.engines.compiler import Compiler
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


def test_a_phase_divides_the_step_of_its_parent() -> None:
    phases = Phases()
    phases.start("build", None, 4)
    assert phases.step("build", 0) == 0.25
    phases.start("optimise", "build", 2)
    assert phases.step("optimise", 0) == 0.375
    phases.start("time", "optimise", 10)
    assert phases.step("time", 4) == pytest.approx(0.4375)
    assert phases.finish("optimise") == 0.5
    # A repeated or late report does not move the share back.
    assert phases.step("build", 0) == 0.5
    assert phases.finish("build") == 1.0


def test_a_phase_that_was_not_started_changes_nothing() -> None:
    phases = Phases()
    phases.start("build", None, 2)
    assert phases.step("elsewhere", 5) == phases.finish("nowhere") == 0.0


def test_a_phase_of_0_steps_is_done_when_it_ends() -> None:
    phases = Phases()
    phases.start("build", None, 0)
    phases.start("inner", "build", 0)
    phases.step("inner", 0)
    assert phases.finish("build") == 1.0


@pytest.mark.parametrize("steps", [0, -1])
def test_a_phase_inside_a_phase_of_0_steps(steps: int) -> None:
    """C++ code calls the callback, so no exception may pass."""
    phases = Phases()
    for name, parent in (
        ("build", None),
        ("outer", "build"),
        ("inner", "outer"),
        ("last", "inner"),
    ):
        phases.start(name, parent, steps)
    assert 0 <= phases.step("inner", 0) <= 1
    for name in ("last", "inner", "outer", "build"):
        phases.finish(name)
    assert phases.share == 1.0


def test_no_exception_leaves_the_monitor() -> None:
    class Module:
        class IProgressMonitor:
            pass

    stop: list[BaseException] = []
    monitor = build_monitor(Module, ignore, stop)  # type: ignore[arg-type]
    monitor.phase_start("build", None, None)  # type: ignore[arg-type]
    assert [type(error) for error in stop] == [TypeError]
    assert monitor.step_complete("build", 0) is False


class Watch:
    """Counts percents and can raise KeyboardInterrupt."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.shown: list[int] = []
        self.stop_at = stop_at

    def __call__(self, count: int) -> None:
        self.shown.append(count)
        if self.stop_at is not None and sum(self.shown) >= self.stop_at:
            raise KeyboardInterrupt


def test_a_real_build_reports_its_percents(compiler: Compiler, demo_workspace: Workspace) -> None:
    watch = Watch()
    graph = demo_workspace.graph(cards.DEMO, "fp16")
    assert compiler.compile(graph, SPEC, BuildConfig(), None, ignore, watch)
    assert len(watch.shown) > 5
    assert all(count > 0 for count in watch.shown)
    assert 90 <= sum(watch.shown) <= PERCENT


def test_ctrl_c_cancels_a_real_build(compiler: Compiler, demo_workspace: Workspace) -> None:
    watch = Watch(stop_at=10)
    graph = demo_workspace.graph(cards.DEMO, "fp16")
    with pytest.raises(KeyboardInterrupt):
        compiler.compile(graph, SPEC, BuildConfig(), None, ignore, watch)
    # The build stops at the next step instead of running to the end.
    assert sum(watch.shown) < 50


def test_optimization_levels_do_not_change_engines_of_rtx(
    compiler: Compiler, demo_workspace: Workspace
) -> None:
    """The reason why RTX refuses --optimization-level; another batch changes the engine."""
    graph = demo_workspace.graph(cards.DEMO, "int8")
    configs = [BuildConfig(optimization_level=level) for level in (0, 5)]
    low, high = (compiled_plan(compiler, graph, config) for config in configs)
    other = BuildConfig(profiles=((1, 8, 16),))
    assert low == high
    assert low != compiled_plan(compiler, graph, other)


def test_an_exception_never_leaves_the_monitor(compiler: Compiler) -> None:
    stop: list[BaseException] = []

    def fail(count: int) -> None:
        raise OSError("the terminal is gone")

    monitor = build_monitor(compiler.module, fail, stop)
    monitor.phase_start("build", None, 2)  # type: ignore[arg-type]
    assert monitor.step_complete("build", 0) is False
    assert isinstance(stop[0], OSError)


class _CtrlC(set[str]):
    """Severities that raise KeyboardInterrupt when they are first read."""

    pressed = False

    def __contains__(self, name: object) -> bool:
        if not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return super().__contains__(name)


@pytest.mark.usefixtures("python_hears_ctrl_c")
def test_ctrl_c_inside_the_logger_is_not_swallowed(
    compiler: Compiler, demo_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    severities = _CtrlC(backends._BELOW_WARNING)
    monkeypatch.setattr(backends, "_BELOW_WARNING", severities)
    watch = Watch()
    graph = demo_workspace.graph(cards.DEMO, "fp16")
    with pytest.raises(KeyboardInterrupt):
        compiler.compile(graph, SPEC, BuildConfig(), None, ignore, watch)
    assert severities.pressed
    # Ctrl-C cancels the build, instead of being raised after a complete build.
    assert sum(watch.shown) < 50
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def python_log() -> Iterator[BufferingHandler]:
    """Collects the records of Python's Polygraphy logger."""
    handler, logger = BufferingHandler(100), logging.getLogger("Polygraphy")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_info_is_captured_directly_and_errors_through_the_loggers(
    compiler: Compiler, python_log: BufferingHandler
) -> None:
    from polygraphy.backend.trt import get_trt_logger

    logger, severities = get_trt_logger(), compiler.module.ILogger.Severity
    with backends.capture_log() as captured:
        logger.log(severities.VERBOSE, "a layer")
        logger.log(severities.ERROR, "a refusal")
    assert captured.messages == ["a layer", "a refusal"]
    assert captured.errors == ["a refusal"]
    assert [record.getMessage() for record in python_log.buffer] == ["a refusal"]
    # The original log function is restored.
    logger.log(severities.VERBOSE, "a layer of another build")
    assert len(captured.messages) == 2
