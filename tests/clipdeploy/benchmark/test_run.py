"""Latencies of real and of made-up runners, with a clock that the test sets.

Covers: clipdeploy/benchmark/environment.py, clipdeploy/benchmark/lineup.py,
    clipdeploy/benchmark/plot.py, clipdeploy/benchmark/result.py, clipdeploy/benchmark/rounds.py,
    clipdeploy/core/plots.py.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from rich.console import Console

from calibration.config import QuantizeConfig
from clipdeploy.benchmark import (
    Benchmark,
    BenchmarkConfig,
    benchmark_artifacts,
    benchmark_model,
)
from clipdeploy.benchmark.environment import Clocks, clock_note, read_clocks, read_environment
from clipdeploy.benchmark.lineup import NotRun, open_cases, short_labels
from clipdeploy.benchmark.plot import draw_benchmark
from clipdeploy.benchmark.result import (
    benchmark_table,
    footnotes,
    summary_rows,
    table_rows,
    table_titles,
)
from clipdeploy.benchmark.rounds import Case, measure, random_images
from clipdeploy.benchmark.run import warm_up
from clipdeploy.core.device import gpus
from clipdeploy.core.errors import (
    ArtifactError,
    ClipdeployError,
    EngineError,
    FileError,
    UsageError,
)
from clipdeploy.core.passport import TensorSpec, to_json
from clipdeploy.core.plots import save_plot
from clipdeploy.models import cards
from clipdeploy.pipeline import export_model, quantize_model
from clipdeploy.runners import Runner
from clipdeploy.runners.base import Closing
from clipdeploy.workspace.folder import Workspace
from exporters.onnx import ExportConfig
from exporters.providers import cuda_problem

QUICK = BenchmarkConfig(batches=(1, 3), seconds=None, rounds=2, warmup=0.0)
IMAGE = TensorSpec("image", "float32", ("batch", 2))


class Clockwork:
    """A clock that advances only when a worker runs, with a log of the runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now


class Worker(Closing):
    """A runner that advances the clockwork by a fixed time per image."""

    input = IMAGE

    def __init__(
        self,
        name: str,
        clock: Clockwork,
        pace: float | Callable[[float], float],
        *,
        batches: tuple[int, int | None] = (1, None),
        device: float | None = None,
    ) -> None:
        self.name, self.batches = name, batches
        self._clock, self._device = clock, device
        self._pace = pace if callable(pace) else lambda now: pace
        self.closed = 0

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        self._clock.log.append((self.name, len(images)))
        self._clock.now += self._pace(self._clock.now) * len(images)
        return np.zeros((len(images), 10), np.float32)

    def device_seconds(self, images: NDArray[Any]) -> float | None:
        return None if self._device is None else self._device * len(images)

    def close(self) -> None:
        self.closed += 1


def make_cases(workers: list[Worker], batches: tuple[int, ...]) -> list[Case]:
    return [
        Case(Path(worker.name), worker.name, worker, random_images(IMAGE, batch, 0))
        for worker in workers
        for batch in batches
    ]


@pytest.fixture
def clock() -> Clockwork:
    return Clockwork()


def test_a_round_runs_everything_once_and_each_in_its_own_order(clock: Clockwork) -> None:
    names = ["a", "b", "c"]
    cases = make_cases([Worker(name, clock, 0.01) for name in names], (1, 8))
    assert measure(cases, seconds=None, rounds=20, seed=0, clock=clock) == 20
    rounds = [clock.log[at : at + 6] for at in range(0, 120, 6)]
    everything = sorted((name, batch) for name in names for batch in (1, 8))
    assert [sorted(one) for one in rounds] == [everything] * 20
    # Of 720 possible orders, 20 draws do not give only one or two.
    assert len({tuple(one) for one in rounds}) > 10
    first = [one[0] for one in rounds]
    assert len(set(first)) == 6


def test_the_seed_determines_the_orders() -> None:
    def orders(seed: int) -> list[tuple[str, int]]:
        clock = Clockwork()
        cases = make_cases([Worker(name, clock, 0.01) for name in "abc"], (1,))
        measure(cases, seconds=None, rounds=10, seed=seed, clock=clock)
        return clock.log

    assert orders(0) == orders(0)
    assert orders(0) != orders(1)


def test_a_slower_runner_shows_as_slower(clock: Clockwork) -> None:
    cases = make_cases([Worker("slow", clock, 0.02), Worker("fast", clock, 0.005)], (1, 8))
    measure(cases, seconds=None, rounds=12, clock=clock)
    rows = summary_rows(cases)
    assert [(row.label, row.batch) for row in rows] == [
        ("slow", 1),
        ("slow", 8),
        ("fast", 1),
        ("fast", 8),
    ]
    # Equal except for rounding.
    assert [row.latency.p50.value for row in rows] == pytest.approx([20, 160, 5, 40])
    assert [row.images_per_second.value for row in rows] == pytest.approx([50, 50, 200, 200])
    assert [row.speedup and row.speedup.value for row in rows] == pytest.approx([1, 1, 4, 4])
    assert all(row.rounds == 12 and row.device is None for row in rows)


def test_a_machine_that_slows_down_does_not_change_the_ratio(clock: Clockwork) -> None:
    # Ten times slower at the end, like a machine that throttles or gets other load.
    def drift(pace: float) -> Callable[[float], float]:
        return lambda now: pace * (1 + 9 * min(now / 4, 1))

    cases = make_cases([Worker("slow", clock, drift(0.002)), Worker("fast", clock, 0.001)], (1,))
    cases[1] = replace(cases[1], runner=Worker("fast", clock, drift(0.001)))
    measure(cases, seconds=None, rounds=400, clock=clock)
    slow, fast = (np.asarray(each.seconds) for each in cases)
    assert slow.max() > 5 * slow.min()
    speedup = summary_rows(cases)[1].speedup
    assert speedup is not None
    # Within a round of 3 to 30 ms the drift is below 7 % in either direction.
    assert speedup.value == pytest.approx(2, rel=0.02)
    # Measuring one artifact after the other would give another ratio.
    assert np.median(slow[:200]) / np.median(fast[200:]) < 1.5


@pytest.mark.parametrize(
    ("seconds", "rounds", "expected"),
    [(None, 7, 7), (1.0, None, 8), (1.0, 3, 3), (0.3, 7, 3), (0.01, None, 1)],
)
def test_the_first_limit_ends_the_measurement(
    seconds: float | None, rounds: int | None, expected: int, clock: Clockwork
) -> None:
    # A round takes 1/8 s: the eighth ends exactly after one second.
    cases = make_cases([Worker("a", clock, 1 / 16), Worker("b", clock, 1 / 16)], (1,))
    assert measure(cases, seconds=seconds, rounds=rounds, clock=clock) == expected
    assert [len(each.seconds) for each in cases] == [expected] * 2


def test_warm_up_is_not_counted(clock: Clockwork) -> None:
    [case] = make_cases([Worker("a", clock, 0.125, device=0.1)], (2,))
    case.warm_up(1.0, clock)
    assert case.warmup == 4
    assert case.seconds == []
    assert case.device == []
    case.run(clock)
    assert (case.seconds, case.device) == ([0.25], [0.2])
    [cold] = make_cases([Worker("b", clock, 0.125)], (2,))
    cold.warm_up(0.0, clock)
    assert (cold.warmup, cold.device) == (1, None)


def test_gpu_time_is_reported_separately(clock: Clockwork) -> None:
    cases = make_cases([Worker("gpu", clock, 0.5, device=0.25), Worker("cpu", clock, 1.0)], (2,))
    for each in cases:
        each.warm_up(0.0, clock)
    measure(cases, seconds=None, rounds=6, clock=clock)
    gpu, cpu = summary_rows(cases)
    assert gpu.device is not None
    assert (gpu.latency.p50.value, gpu.device.p50.value) == (1000, 500)
    assert cpu.device is None


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_random_images_match_the_input(dtype: str) -> None:
    spec = TensorSpec("image", dtype, ("batch", 3, 32, 32))
    images = random_images(spec, 4, 0)
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), np.dtype(dtype))
    assert np.array_equal(images, random_images(spec, 4, 0))
    assert not np.array_equal(images, random_images(spec, 4, 1))
    if dtype == "uint8":
        assert (images.min(), images.max()) == (0, 255)


def test_a_dynamic_width_is_refused() -> None:
    with pytest.raises(ArtifactError, match="'width' of image is not fixed"):
        random_images(TensorSpec("image", "float32", ("batch", 3, 32, "width")), 1, 0)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((1, 4), "takes 1 to 4"), ((4, 4), "takes exactly 4"), ((2, None), "takes 2 or more")],
)
def test_a_batch_is_refused_and_never_changed(
    limits: tuple[int, int | None], expected: str, clock: Clockwork
) -> None:
    worker = Worker("a", clock, 0.01, batches=limits)
    with ExitStack() as stack:
        cases, not_run = open_cases(
            [Path("a.engine")], (1, 4, 8), lambda path: worker, stack, refused={}, seed=0
        )
        measure(cases, seconds=None, rounds=3, clock=clock)
    low, high = limits
    possible = {batch for batch in (1, 4, 8) if low <= batch and (high is None or batch <= high)}
    assert {batch for _, batch in clock.log} == possible
    assert {left.batch for left in not_run} == {1, 4, 8} - possible
    assert all(left.reason == f"not possible: the engine {expected}" for left in not_run)
    assert worker.closed == 1


def test_a_batch_between_two_profiles_is_not_measured_as_a_larger_one(clock: Clockwork) -> None:
    worker = Worker("a", clock, 0.01, batches=(1, 32))
    worker.profiles = ((1, 2, 4), (8, 16, 32))
    with ExitStack() as stack:
        cases, not_run = open_cases(
            [Path("a.engine")], (4, 5, 8), lambda path: worker, stack, refused={}, seed=0
        )
    assert [case.batch for case in cases] == [4, 8]
    assert [(left.batch, left.reason) for left in not_run] == [
        (5, "not possible: the engine takes 1 to 4 or 8 to 32")
    ]


def test_files_that_cannot_be_opened_are_listed(clock: Clockwork) -> None:
    def open_one(path: Path) -> Runner:
        if path.name == "bad.engine":
            raise EngineError("no GPU on this machine", hint="find one")
        return Worker(path.name, clock, 0.01)

    paths = [Path("bad.engine"), Path("stale.onnx"), Path("good.onnx")]
    with ExitStack() as stack:
        cases, not_run = open_cases(
            paths, (1,), open_one, stack, refused={paths[1]: "another parent"}, seed=0
        )
    assert [each.label for each in cases] == ["good.onnx"]
    assert not_run == [
        NotRun("bad.engine", "bad.engine", None, "no GPU on this machine"),
        NotRun("stale.onnx", "stale.onnx", None, "another parent"),
    ]


def test_labels_are_as_short_as_possible() -> None:
    def labels(*names: str) -> list[str]:
        return short_labels([Path(name) for name in names])

    assert labels("a/vit.fp32.onnx", "a/vit.int8.engine") == ["fp32.onnx", "int8.engine"]
    assert labels("a/b16.int8.onnx", "a/b32.int8.onnx") == ["b16.int8.onnx", "b32.int8.onnx"]
    assert labels("a/b.int8.onnx", "c/b.int8.onnx") == ["a/b.int8.onnx", "c/b.int8.onnx"]
    assert labels("a/b.int8.onnx", "a/b.int8.onnx") == ["int8.onnx #1", "int8.onnx #2"]
    assert labels("plain.onnx") == ["plain.onnx"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batches": ()}, r"batches of \[\]"),
        ({"batches": (8, 0)}, r"batches of \[8, 0\]"),
        ({"batches": (8, 8)}, "give each batch once"),
        ({"seconds": None}, "has no limit"),
        ({"seconds": 0.0}, "invalid value 0.0 for seconds"),
        ({"seconds": float("nan")}, "invalid value nan for seconds"),
        ({"rounds": 0}, "invalid value 0 for rounds"),
        ({"warmup": -1.0}, "invalid value -1.0 for warmup"),
        ({"seed": -1}, "invalid value -1 for seed"),
        ({"threads": -2}, "invalid value -2 for threads"),
    ],
)
def test_an_invalid_config_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        BenchmarkConfig(**settings)


def test_the_demo_graphs_are_measured(demo_workspace: Workspace) -> None:
    notes: list[str] = []
    config = replace(QUICK, provider="cpu")
    result = benchmark_model(demo_workspace, cards.DEMO, config, note=notes.append)
    assert result
    assert result.rounds == 2
    assert result.baseline == "fp32.onnx"
    expected = [(f"{p}.onnx", batch) for p in ("fp32", "fp16", "int8") for batch in (1, 3)]
    assert [(row.label, row.batch) for row in result.rows] == expected
    assert result.not_run == ()
    assert {row.runner for row in result.rows} == {"ONNX Runtime (CPU)"}
    assert all(row.warmup == 1 and row.rounds == 2 for row in result.rows)
    assert all(row.latency.p50.value > 0 and row.latency.p99 is None for row in result.rows)
    assert "affect the latencies" in notes[0]
    assert "2 rounds" in notes[1]
    read = json.loads(to_json(result))
    assert read["rows"][0]["latency"]["p50"].keys() == {"value", "low", "high"}
    assert read["config"]["seed"] == 0
    assert read["environment"]["versions"]["numpy"] == np.__version__
    assert read["environment"]["cpus"] >= 1


def test_a_graph_of_another_source_graph_is_listed(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    workspace = Workspace(tmp_path / "artifacts")
    export_model(workspace, cards.DEMO, config=ExportConfig(batch=4))
    workspace.graph(cards.DEMO, "int8").write_bytes(b"cut short")
    workspace.engine(cards.DEMO, "fp16").write_bytes(b"no passport beside it")
    result = benchmark_model(workspace, cards.DEMO, replace(QUICK, batches=(1, 4)))
    assert [(row.label, row.batch) for row in result.rows] == [("fp32.onnx", 4)]
    reasons = {(left.label, left.batch): left.reason for left in result.not_run}
    assert reasons["fp32.onnx", 1] == "not possible: the graph takes exactly 4"
    assert "was not made from the fp32.onnx" in reasons["fp16.onnx", None]
    assert "int8.onnx" in reasons["int8.onnx", None]
    assert "has no passport" in reasons["fp16.engine", None]
    assert len(reasons) == 4


def test_files_are_measured_without_regard_to_neighbours(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    uint8 = export_model(Workspace(tmp_path), cards.DEMO, config=ExportConfig(preprocess=True)).path
    result = benchmark_artifacts([graph, uint8], QUICK)
    assert result.model == cards.DEMO
    assert {row.artifact for row in result.rows} == {str(graph), str(uint8)}
    assert len(result.rows) == 4


def test_the_same_file_can_be_given_twice(demo_workspace: Workspace) -> None:
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    result = benchmark_artifacts([graph, graph], replace(QUICK, batches=(1,)))
    assert [row.label for row in result.rows] == ["fp32.onnx #1", "fp32.onnx #2"]
    assert all(row.speedup is not None for row in result.rows)


def test_paths_that_are_no_artifacts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        benchmark_artifacts([])
    with pytest.raises(UsageError, match=r"neither \.onnx nor \.engine"):
        benchmark_artifacts([tmp_path / "calibration.json"])
    with pytest.raises(FileError, match="there is no file"):
        benchmark_artifacts([tmp_path / "gone.onnx"])


def test_a_benchmark_without_rows_is_false(tmp_path: Path) -> None:
    broken = tmp_path / "x.onnx"
    broken.write_bytes(b"not a graph")
    result = benchmark_artifacts([broken], QUICK)
    assert not result
    assert (result.rows, result.baseline, result.rounds) == ((), "", 0)
    assert result.not_run[0].batch is None
    assert "x.onnx: " in shown(result)


def test_a_failure_during_warm_up_is_listed(clock: Clockwork) -> None:
    class Refusing(Worker):
        def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
            raise EngineError("out of memory")

    [case] = make_cases([Refusing("a", clock, 0.1)], (1,))
    with pytest.raises(ClipdeployError, match="out of memory"):
        case.warm_up(0.0, clock)
    not_run: list[NotRun] = []
    good = make_cases([Worker("b", clock, 0.1)], (1,))
    assert warm_up([case, *good], not_run, 0.0, clock=clock) == good
    assert not_run == [NotRun("a", "a", 1, "out of memory")]


def sample(batches: tuple[int, ...] = (1, 8, 32), rounds: int = 40) -> Benchmark:
    """A made-up result of two engines on a GPU and a graph on the CPU."""
    clock = Clockwork()
    generator = np.random.default_rng(0)

    def noisy(pace: float) -> Callable[[float], float]:
        return lambda now: pace * (1 + float(generator.gamma(1.0, 0.05)))

    workers = [
        Worker("fp32.engine", clock, noisy(4e-4), device=3e-4),
        Worker("int8.engine", clock, noisy(1e-4), device=8e-5),
        Worker("int8-cpu.onnx", clock, noisy(9e-3)),
    ]
    cases = make_cases(workers, batches)
    for each in cases:
        each.warm_up(0.0, clock)
        name = "ONNX Runtime (CPU)" if "onnx" in each.label else "tensorrt 10.13 on NVIDIA H200"
        each.runner.name = name
    measure(cases, seconds=None, rounds=rounds, clock=clock)
    warm = Clocks(1980, 1980, 3201, 3201, 310.0, 700.0)
    environment = read_environment(warm, replace(warm, sm_mhz=1755), on_gpu=True, load=0.5)
    return Benchmark(
        model="clip-vit-base-p16_laion2b-in12k-pre_3rdparty_in1k-384px",
        baseline="fp32.engine",
        config=BenchmarkConfig(),
        rounds=rounds,
        rows=summary_rows(cases),
        not_run=(NotRun("e", "int8.engine", 64, "not possible: the engine takes 1 to 32"),),
        environment=replace(environment, gpu="NVIDIA H200"),
    )


def shown(result: Benchmark, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(benchmark_table(result))
    return capture.get()


def test_the_table_fits_a_terminal() -> None:
    text = shown(sample())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    [heading] = [words for words in lines if words[:1] == ["artifact"]]
    assert heading[1:4] == ["batch", "p50", "ms"]
    assert "GPU p50" in text
    [first] = [words for words in lines if words[:2] == ["fp32.engine", "1"]]
    # p50, its interval, p90, no p99 of 40 rounds, GPU time, images/s, the speedup of 1.
    assert first[5:7] == ["-", "0.3000"]
    assert first[-1] == "1"
    assert "int8.engine, batch 64: not possible: the engine takes 1 to 32" in text
    assert "SM clock 1980 MHz before the first round, 1755 MHz after the last" in text
    assert "GPU p50" not in shown(replace(sample(), rows=sample().rows[-3:]))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1 / 0.004722, "0.00472"),
        (1 / 0.4722, "0.472"),
        (1 / 4.722, "4.72"),
        (0.1, "10.0"),
        (1 / 47.22, "47.2"),
        # Rounding to three digits adds a digit before the point.
        (1 / 99.96, "100"),
        (1 / 472.2, "472"),
        (1 / 999.7, "1000"),
        (1 / 47222, "47222"),
    ],
)
def test_throughput_has_three_digits(seconds: float, expected: str) -> None:
    clock = Clockwork()
    cases = make_cases([Worker("a.onnx", clock, seconds)], (1,))
    measure(cases, seconds=None, rounds=6, clock=clock)
    result = replace(sample(), rows=summary_rows(cases))
    rate = table_titles(result).index("img/s")
    assert [row[rate] for row in table_rows(result)] == [expected]


def test_an_int8_graph_for_tensorrt_is_explained_on_a_cpu(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    workspace = Workspace(tmp_path / "artifacts")
    quantize_model(workspace, cards.DEMO, QuantizeConfig(remainder="fp32"))
    config = replace(QUICK, provider="cpu")
    result = benchmark_model(workspace, cards.DEMO, config)
    assert {row.label for row in result.rows} >= {"fp16.onnx", "int8.onnx", "int8-cpu.onnx"}
    [note] = result.notes
    assert note.startswith("int8.onnx: INT8 or FP8 with FP16 tensors is made for TensorRT")
    assert "`clipdeploy quantize --cpu`" in note
    assert json.loads(to_json(result))["notes"] == [note]
    assert note in footnotes(result)
    assert "INT8 or FP8 with FP16 tensors" in shown(result)
    # The reason: no Linear of that graph runs in int8, and all 24 of the other graph do.
    kernels = {
        precision: optimised_kernels(workspace.graph(cards.DEMO, precision), tmp_path)
        for precision in ("int8", "int8-cpu")
    }
    assert kernels["int8"]["MatMulIntegerToFloat"] == 0
    assert kernels["int8"]["Cast"] > 0
    assert kernels["int8-cpu"]["MatMulIntegerToFloat"] == 24
    others = [workspace.graph(cards.DEMO, precision) for precision in ("fp32", "fp16", "int8-cpu")]
    assert benchmark_artifacts(others, config).notes == ()


def optimised_kernels(graph: Path, folder: Path) -> Counter[str]:
    """Count the operators that ONNX Runtime's CPU provider runs after fusion."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    # ONNX Runtime warns that the optimised file only fits this machine.
    options.log_severity_level = 3
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return Counter(node.op_type for node in nodes)


def test_brackets_in_a_name_are_not_markup() -> None:
    result = sample()
    named = replace(result, rows=tuple(replace(row, label="b[v2].onnx") for row in result.rows))
    assert "b[v2].onnx" in shown(named).split()


def test_the_note_about_clocks() -> None:
    warm = Clocks(1980, None, 3201, 3201, None, None)
    assert "1980 MHz before the first round" in clock_note(warm, warm, gpu=True)
    assert "unknown MHz maximum" in clock_note(warm, warm, gpu=True)
    assert "clocks are unknown" in clock_note(warm, None, gpu=True)
    assert "clocks are unknown" in clock_note(replace(warm, sm_mhz=None), warm, gpu=True)
    assert "other programs on this machine" in clock_note(None, None, gpu=False)


@pytest.mark.gpu
def test_a_gpu_is_measured_with_its_clocks(demo_workspace: Workspace) -> None:
    if problem := cuda_problem():
        pytest.skip(problem)
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    result = benchmark_artifacts(graph, replace(QUICK, provider="cuda"))
    assert {row.runner for row in result.rows} == {"ONNX Runtime (CUDA)"}
    here = result.environment
    assert (here.gpu, here.sm) == (gpus()[0].name, gpus()[0].sm)
    for clocks in (here.clocks_before, here.clocks_after):
        assert clocks is not None
        assert clocks.sm_mhz is not None
        assert clocks.sm_max_mhz is not None
        assert 0 < clocks.sm_mhz <= clocks.sm_max_mhz
    assert here.note.startswith("SM clock ")


def test_this_machine_is_described() -> None:
    here = read_environment(read_clocks(), None, on_gpu=False, load=None)
    assert here.cpu
    assert here.timestamp.endswith("+00:00")
    assert (here.gpu is None) == (not gpus())
    if not gpus():
        assert (here.sm, here.clocks_before) == (None, None)


def test_the_plot_shows_the_results() -> None:
    result = sample()
    figure = draw_benchmark(result)
    latency, throughput = figure.axes
    assert latency.get_ylabel() == "milliseconds per batch"
    assert throughput.get_ylabel() == "images per second"
    assert latency.get_xlabel() == throughput.get_xlabel() == "batch (images)"
    assert [tick.get_text() for tick in latency.get_xticklabels()] == ["1", "8", "32"]
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["fp32.engine", "int8.engine", "int8-cpu.onnx"]
    title = figure.get_suptitle()
    assert result.model in title
    assert "NVIDIA H200" in title
    for index, container in enumerate(latency.containers):
        rows = result.rows[3 * index : 3 * index + 3]
        line, _, (whiskers,) = container
        assert list(line.get_ydata()) == [row.latency.p50.value for row in rows]
        for segment, row in zip(whiskers.get_segments(), rows, strict=True):
            assert row.latency.p90 is not None
            ends = [row.latency.p50.value, row.latency.p90.value]
            # p90 is drawn as median plus difference.
            assert segment[:, 1].tolist() == pytest.approx(ends)
    # Latencies from 0.1 to 290 ms need the log scale; those of one batch and precision do not.
    assert latency.get_yscale() == "log"
    alone = draw_benchmark(replace(result, rows=result.rows[:1]))
    assert alone.axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG\r\n"), ("b.PNG", b"\x89PNG\r\n"), ("c.svg", b"<?xml")]
)
def test_the_suffix_determines_the_format(name: str, start: bytes, tmp_path: Path) -> None:
    # Five rounds: no p90 and no interval to draw.
    save_plot(draw_benchmark(sample((8,), rounds=5)), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_another_suffix_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for name in ("plot.pdf", "plot", "plot.png.txt"):
        with pytest.raises(UsageError, match=r"cannot save a plot as plot"):
            save_plot(draw_benchmark(sample((8,), rounds=5)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
