"""Mixed precision under an accuracy budget, on real graphs.

Covers: clipdeploy/stages/search.py, clipdeploy/stages/search_formats.py,
    clipdeploy/tuning/evaluate.py, clipdeploy/tuning/images.py,
    clipdeploy/tuning/pareto.py, clipdeploy/tuning/state.py.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain as joined
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner
from demo_workspaces import few_digits
from outlier_script import channel_outliers
from rich.console import Console

from calibration.config import QuantizeConfig
from calibration.policy import Scope
from calibration.qdq import quantize
from calibration.recipe import load_recipe
from calibration.scheme import SchemeConfig
from clipdeploy.cli.main import main
from clipdeploy.core.errors import ArtifactError, DatasetError, UsageError
from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice, load_model
from clipdeploy.models.vit import VisionTransformer, ViTConfig
from clipdeploy.pipeline import (
    SearchConfig,
    SearchResult,
    VerifyScope,
    Workspace,
    calibrate_model,
    export_model,
    quantize_model,
    sample_images,
    search_model,
    verify_model,
)
from clipdeploy.stages import search_graphs
from clipdeploy.stages.search_formats import Best, Search
from clipdeploy.tuning.chain import Chain
from clipdeploy.tuning.cost import counted_costs, linear_shapes
from clipdeploy.tuning.evaluate import Counter, Evaluator, is_feasible
from clipdeploy.tuning.images import labelled_batches, make_splits
from clipdeploy.tuning.pareto import Evaluation
from clipdeploy.verification.paired import judge_drop
from exporters.headers import graph_sha256, read_passport
from exporters.onnx import export_graph

TEST, CALIBRATION = cards.demo_file("test.zip"), cards.demo_file("calibration.zip")
# The scheme that outliers ruin: no smoothing, ranges up to the largest value.
NAIVE = SchemeConfig("minmax", smooth=False)
# With 250 images a drop of 4 points is significant; all INT8 loses 5 on all images.
LIMIT = 6.0
FEW = {"search_images": 120, "max_drop": 10.0}


def outlier_workspace(folder: Path, seed: int, depth: int = 6) -> Workspace:
    """A variant of the demo model with channel outliers, cut to its first blocks, calibrated."""
    workspace = Workspace(folder)
    weights = folder / "outliers.safetensors"
    channel_outliers(weights, seed)
    export_model(workspace, cards.DEMO, WeightsChoice(weights))
    if depth < 6:
        card = cards.find(cards.DEMO)
        module = load_model(card, WeightsChoice(weights), Recipe()).module
        config = ViTConfig(4, 32, 10, card.width, depth, card.heads)
        cut = VisionTransformer(config).eval()
        cut.load_state_dict({k: module.state_dict()[k] for k in cut.state_dict()})
        path = workspace.graph(cards.DEMO, "fp32")
        passport = read_passport(path)
        path.unlink()
        export_graph(cut, path, passport, sample_images(passport.preprocess))
    calibrate_model(workspace, cards.DEMO, CALIBRATION)
    return workspace


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return outlier_workspace(tmp_path_factory.mktemp("outliers"), 20261)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two blocks, eight Linears."""
    return outlier_workspace(tmp_path_factory.mktemp("cut"), 20261, depth=2)


def digits(workspace: Workspace) -> Path:
    """320 digits, beside the model's graphs: 120 to search on, and 200 to confirm on."""
    path = workspace.folder(cards.DEMO) / "digits.zip"
    return path if path.exists() else few_digits(path, 32)


def searched(workspace: Workspace, **settings: Any) -> SearchResult:
    defaults: dict[str, Any] = {
        "threads": 1,
        "batch": 120,
        "scheme": NAIVE,
        "fixed_scheme": True,
        "max_drop": LIMIT,
        # The demo is too small to be faster in INT8 on any GPU.
        "cost": "macs",
    }
    data = digits(workspace) if settings.keys() & FEW.keys() == FEW.keys() else TEST
    return search_model(workspace, cards.DEMO, data, SearchConfig(**(defaults | settings)))


@pytest.fixture(scope="module")
def small(cut: Workspace) -> SearchResult:
    """The search of the cut model on few images."""
    return searched(cut, **FEW)


def powers(workspace: Workspace) -> dict[str, Any]:
    """The error power of each product alone that searches measured, by scheme."""
    state = json.loads((workspace.search(cards.DEMO) / "state.json").read_bytes())
    return cast("dict[str, Any]", state["power"])


def check_outlier_search(workspace: Workspace) -> None:
    found = searched(workspace)
    twin = next(point for point in found.points if "all INT8" in point.label)
    assert not twin.feasible
    assert found.confirm.verdict == "equivalent"
    assert found.confirmed
    assert found.finished
    assert 0.8 <= found.chosen.quantised_macs < 1.0
    assert found.chosen.cost < 0.8


def test_outliers_without_smoothing_leave_a_mixed_graph(outliers: Workspace) -> None:
    check_outlier_search(outliers)
    passport = read_passport(outliers.graph(cards.DEMO, "int8"))
    assert passport.settings["int8_nodes"] == 24 - len(passport.settings["exclude"])
    (measured,) = powers(outliers).values()
    assert len(measured) == 24
    verified = verify_model(
        outliers, cards.DEMO, TEST, scope=VerifyScope(graphs_only=True, limit=20)
    ).verification
    assert verified is not None
    assert [row.precision for row in verified.rows] == ["fp32", "int8"]


@pytest.mark.slow
def test_other_outliers_too(tmp_path: Path) -> None:
    check_outlier_search(outlier_workspace(tmp_path, 7))


def test_recipes_of_the_front_rebuild_their_points(cut: Workspace, small: SearchResult) -> None:
    written = [point for point in small.points if point.recipe]
    labels = {label for point in written for label in point.label.split(", ")} - {""}
    assert labels == {"all FP16", "all INT8", "chosen"}
    for point in written:
        recipe = load_recipe(Path(point.recipe))
        assert len(recipe.config.exclude) == 8 - len(point.quantised)
        assert recipe.config.scheme == NAIVE
    chosen = load_recipe(small.recipe)
    assert set(chosen.config.exclude) == set(small.excluded)
    assert not quantize_model(cut, cards.DEMO, chosen.config).artifact.changed


def test_within_five_percent_of_every_combination(
    cut: Workspace, small: SearchResult, tmp_path: Path
) -> None:
    source, passport = cut.source(cards.DEMO)
    search, fresh = make_splits(digits(cut), None, passport, SearchConfig(search_images=120))
    ((samples, labels),) = labelled_batches(search, passport.preprocess, 120)
    target = tmp_path / "int8.onnx"
    few = sample_images(passport.preprocess, 3)
    config = QuantizeConfig(scheme=NAIVE, remainder="fp32", min_sqnr=None)
    quantize(source, cut.calibration(cards.DEMO), target, few, config)
    chain = Chain(source, target, threads=1)
    costs = counted_costs(linear_shapes(chain, samples.pixels[:1]), 120)
    assert len(chain.linears) == 8
    best = costs.total(frozenset())
    feasible = 0
    stem = chain.step(0, samples.pixels, ())
    reference = chain.rest(stem, (), 0)
    for first in subsets(chain.linears[:4]):
        middle = chain.step(1, stem, first)
        for second in subsets(chain.linears[4:]):
            counter = Counter()
            counter.add(chain.rest(middle, second, 1), reference, labels)
            if is_feasible(counter.result(), len(fresh.hashes), FEW["max_drop"]):
                best = min(best, costs.total(first | second))
                feasible += 1
    assert 10 < feasible < 250
    assert costs.total(frozenset(small.chosen.quantised)) <= 1.05 * best


def subsets(names: tuple[str, ...]) -> list[frozenset[str]]:
    sizes = (combinations(names, size) for size in range(len(names) + 1))
    return [frozenset(chosen) for chosen in joined.from_iterable(sizes)]


def test_out_of_budget_or_killed_and_resumed_ends_at_the_same_recipe(
    cut: Workspace, small: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cut.root, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / cards.DEMO / "search")
    workspace = Workspace(tmp_path / "copy")
    runs = 0
    real = Evaluator._run

    def dying(self: Evaluator, int8: frozenset[str]) -> Any:
        nonlocal runs
        runs += 1
        if runs % 8 == 0:
            raise KeyboardInterrupt
        return real(self, int8)

    monkeypatch.setattr(Evaluator, "_run", dying)
    with pytest.raises(UsageError, match="budget"):
        searched(workspace, budget=1e-9, **FEW)
    assert runs == 0
    killed = 0
    while True:
        try:
            resumed = searched(workspace, **FEW)
            break
        except KeyboardInterrupt:
            killed += 1
    assert killed >= 1
    assert resumed.finished
    assert resumed.recipe.read_bytes() == small.recipe.read_bytes()
    assert resumed.points == tuple(
        replace(point, recipe=point.recipe.replace(str(cut.root), str(workspace.root)))
        for point in small.points
    )
    # Nothing was evaluated twice.
    assert runs == small.evaluations + killed


def test_a_healthy_model_stays_all_int8(demo_workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(demo_workspace.root, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    found = searched(workspace, max_drop=2.0, scheme=SchemeConfig())
    assert found.confirmed
    assert found.excluded == ()
    assert found.chosen.label == "chosen, all INT8"
    assert found.evaluations == 1
    # Without a cheaper combination, no product is measured alone.
    assert powers(workspace) == {}


def test_only_what_is_faster_on_the_gpu_becomes_int8(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(demo_workspace.root, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    notes: list[str] = []

    def search(**settings: Any) -> SearchResult:
        config = SearchConfig(threads=1, batch=120, fixed_scheme=True, **FEW, **settings)
        return search_model(workspace, cards.DEMO, digits(workspace), config, note=notes.append)

    # In so small a model the number of kernels decides, which only MLPs and the last proj raise.
    hopper = search(gpu="h100 sxm", format="int8")
    assert hopper.confirmed
    inner = [f"blocks.{n}.{role}" for n in range(5) for role in ("attn.qkv", "attn", "attn.proj")]
    assert hopper.chosen.quantised == (*inner, "blocks.5.attn.qkv")
    assert hopper.costs.gpu == "H100-SXM"
    twin = next(point for point in hopper.points if point.label == "all INT8")
    assert 1.05 < twin.cost < 1.3
    settings = hopper.artifact.passport.settings
    # Two products in each attention.
    assert settings["int8_nodes"] == 11 + 2 * 5
    assert "blocks.5.attn.proj" in settings["exclude"]
    assert not any("scores" in name for name in settings["exclude"])
    # Its INT8 rate is a fifteenth of its FP16 rate.
    ultra = search(gpu="B300", format="int8")
    assert ultra.confirmed
    assert ultra.chosen.label == "chosen, all FP16"
    assert said(ultra)
    assert not said(hopper)
    # Another cost needs no new evaluations.
    assert ultra.evaluations == hopper.evaluations
    assert not any("estimated for" in note for note in notes)


def test_the_fastest_of_all_combinations_with_attention(cut: Workspace, tmp_path: Path) -> None:
    shutil.copytree(cut.root, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    found = searched(workspace, **FEW, cost="roofline", gpu="T4")
    # A T4 has no FP8.
    assert list(found.fastest) == ["int8"]
    costs, limit = found.costs, FEW["max_drop"]
    assert costs.order[1] == "blocks.0.attn"
    source, passport = workspace.source(cards.DEMO)
    search, fresh = make_splits(digits(workspace), None, passport, SearchConfig(search_images=120))
    ((samples, labels),) = labelled_batches(search, passport.preprocess, 120)
    target = tmp_path / "int8.onnx"
    few, scope = sample_images(passport.preprocess, 3), Scope(attention=True)
    config = QuantizeConfig(scheme=NAIVE, remainder="fp32", min_sqnr=None, scope=scope)
    quantize(source, workspace.calibration(cards.DEMO), target, few, config)
    chain = Chain(source, target, threads=1)
    reference = chain.run(samples.pixels, ())[-1]
    feasible = {}
    for chosen in subsets(tuple(sorted(costs.fastest()))):
        counter = Counter()
        counter.add(chain.run(samples.pixels, chosen)[-1], reference, labels)
        feasible[chosen] = is_feasible(counter.result(), len(fresh.hashes), limit)
    best = min(costs.total(chosen) for chosen, fits in feasible.items() if fits)
    assert costs.total(frozenset(found.chosen.quantised)) <= 1.05 * best


def test_each_format_that_can_be_faster_is_searched(cut: Workspace, tmp_path: Path) -> None:
    shutil.copytree(cut.root, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    place = {**FEW, "cost": "roofline"}
    # On an L4 both formats have the same rate, but in so small a model the number of kernels
    # decides, and FP8 in fc2 needs none for GELU.
    ada = searched(workspace, **place, gpu="L4", scheme=SchemeConfig())
    assert ada.format == "fp8"
    kinds = {name.rpartition(".")[2] for name in ada.chosen.quantised}
    assert kinds == {"qkv", "attn", "proj", "fc2"}
    assert {point.format for point in ada.points} == {"fp8"}
    assert "INT8 was not searched: its cost is at least 0." in shown(ada)
    # Without INT8 on the GPU, FP8 is searched too.
    ultra = searched(workspace, **place, gpu="B300", scheme=SchemeConfig())
    assert ultra.format == "fp8"
    assert ultra.artifact.path == workspace.graph(cards.DEMO, "fp8")
    assert load_recipe(ultra.recipe).config.format == "fp8"
    assert "nothing is faster in INT8 than in FP16 on B300" in shown(ultra)


def test_a_graph_that_fails_when_written_replaces_none(
    cut: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cut.root, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    # The user's own, of which there may be an engine.
    own = quantize_model(workspace, cards.DEMO, QuantizeConfig(format="fp8", min_sqnr=None))
    real = search_graphs.score

    def score(search: Any, graph: Path, images: Any) -> Evaluation:
        found = real(search, graph, images)
        return replace(found, lost=found.images, gained=0) if graph.stem == "fp8" else found

    monkeypatch.setattr(search_graphs, "score", score)
    # FP8 can be faster and is searched first; with FP16 sums it is slower than INT8 can be.
    found = searched(workspace, **FEW, cost="roofline", gpu="L4", scheme=SchemeConfig())
    assert found.format == "int8"
    assert found.outputs
    assert {point.format for point in found.points} == {"int8", "fp8"}
    assert [point.cost for point in found.points] == sorted(p.cost for p in found.points)
    assert sum("all FP16" in point.label for point in found.points) == 1
    assert workspace.graph(cards.DEMO, "int8").exists()
    assert graph_sha256(workspace.graph(cards.DEMO, "fp8")) == own.artifact.sha256


def shown(found: SearchResult) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(found)
    return stream.getvalue()


def said(found: SearchResult) -> bool:
    return "nothing is faster in INT8 than in FP16 on B300 at batch 120" in shown(found)


def labels(best: Best, **settings: Any) -> Iterator[str]:
    asked = SimpleNamespace(config=SearchConfig(**settings))
    return (scheme.label for scheme in Search.schemes(cast("Search", asked), "int8", best))


def test_ranges_then_strengths_of_the_best_are_tried() -> None:
    best = Best()
    tried = labels(best, scheme=SchemeConfig("minmax"))
    assert [next(tried) for _ in range(4)] == ["minmax", "auto", "percentile", "mse"]
    best.offer(Evaluation(9, 0, 100, 12.0), SchemeConfig("minmax"), cast("Chain", object()))
    best.offer(Evaluation(5, 0, 100, 30.0), SchemeConfig("mse"), cast("Chain", object()))
    best.offer(Evaluation(5, 0, 100, 29.0), SchemeConfig("auto"), cast("Chain", object()))
    assert list(tried) == ["mse, strength 0.5", "mse, strength 0.75"]


def test_no_strengths_without_smoothing_and_no_other_scheme_than_a_fixed_one() -> None:
    scheme = SchemeConfig("minmax", smooth=False)
    assert list(labels(Best(), scheme=scheme)) == ["minmax", "auto", "percentile", "mse"]
    assert list(labels(Best(), scheme=scheme, fixed_scheme=True)) == ["minmax"]


def test_a_strength_is_searched_and_written(cut: Workspace, tmp_path: Path) -> None:
    shutil.copytree(cut.root, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    # The outliers of this model are in its weights as well, so weights alone can decide.
    scheme = SchemeConfig("minmax", strength=0.0)
    found = searched(workspace, scheme=scheme, **FEW)
    assert found.scheme == scheme
    assert "all INT8" in found.chosen.label
    written = read_passport(workspace.graph(cards.DEMO, "int8")).settings
    assert written["plan"]["strength"] == 0.0, written


def test_confirmation_of_no_drop_claims_none() -> None:
    generator = np.random.default_rng(0)
    images, share, trials = 250, 0.02, 4000
    changed = generator.binomial(images, share, trials)
    lost = generator.binomial(changed, 0.5)
    for limit, most in ((0.5, 0.025), (2.0, 0.0025)):
        verdicts = [
            judge_drop(int(b), int(n - b), images, limit).verdict
            for b, n in zip(lost, changed, strict=True)
        ]
        # Nominal is 2.5 % at a limit of zero, plus three standard errors of 4,000 trials.
        assert verdicts.count("regressed") / trials < most + 3 * np.sqrt(0.025 / trials)


def test_expected_flips_are_what_happens() -> None:
    generator = np.random.default_rng(1)
    reference = generator.normal(0, 1.5, (4000, 10)).astype(np.float32)
    labels = reference.argmax(axis=1)
    labels[::5] = generator.integers(0, 10, len(labels[::5]))
    noise = generator.normal(0, 0.2, reference.shape).astype(np.float32)
    counter = Counter()
    counter.add(reference + noise, reference, labels.astype(np.int64))
    found = counter.result()
    # Poisson: about 250 lost, three standard deviations; that only the nearest rival is counted
    # makes the expectation a little too small.
    assert found.lost == pytest.approx(found.expected_lost, rel=0.25)
    assert not is_feasible(found, 4000, 1.0)
    quiet = Counter()
    quiet.add(reference, reference, labels.astype(np.int64))
    assert is_feasible(quiet.result(), 4000, 1.0)


def test_refusals(demo_workspace: Workspace, tmp_path: Path) -> None:
    def search(data: Path = TEST, confirm: Path | None = None, **settings: Any) -> None:
        config = SearchConfig(**settings)
        search_model(demo_workspace, cards.DEMO, data, config, confirm=confirm)

    with pytest.raises(DatasetError, match="was searched on"):
        search(confirm=TEST, max_drop=5.0)
    with pytest.raises(DatasetError, match="used for calibration"):
        search(CALIBRATION, max_drop=5.0)
    with pytest.raises(DatasetError, match="381 are needed"):
        search(max_drop=1.0)
    with pytest.raises(UsageError):
        SearchConfig(max_drop=0)
    with pytest.raises(UsageError, match="no data sheet of a GPU 'H1'; near it: H100-SXM"):
        SearchConfig(gpu="H1")
    with pytest.raises(UsageError, match="cost model cpu does not depend on a GPU"):
        SearchConfig(cost="cpu", gpu="L4")
    other = Workspace(tmp_path)
    export_model(other, cards.DEMO, WeightsChoice(random_seed=1))
    with pytest.raises(UsageError, match="not been calibrated"):
        search_model(other, cards.DEMO, TEST)
    calibrate_model(other, cards.DEMO, CALIBRATION)
    with pytest.raises(UsageError, match="random weights"):
        search_model(other, cards.DEMO, TEST)


def test_commands_take_recipes(cut: Workspace, small: SearchResult, tmp_path: Path) -> None:
    words = ["--workspace", str(cut.root), "--model", cards.DEMO, "--quiet"]
    runner = CliRunner()

    def run(*arguments: str) -> Any:
        return runner.invoke(main, [arguments[0], *words, *arguments[1:]])

    recipe = str(small.recipe)
    made = run("quantize", "--recipe", recipe, "--json")
    assert made.exit_code == 0
    assert json.loads(made.stdout)["artifact"]["changed"] is False
    assert "(unchanged)" not in run("quantize", "--recipe", recipe, "--cpu").stdout
    assert run("quantize", "--recipe", recipe, "--exclude", "blocks.0.*").exit_code == 2
    assert run("build-engine", "--fp16", "--recipe", recipe).exit_code == 2
    half = next(point.recipe for point in small.points if "all FP16" in point.label)
    assert run("quantize", "--recipe", half).exit_code == 0
    graph = cut.graph(cards.DEMO, "int8")
    assert read_passport(graph).settings["int8_nodes"] == 0
    assert run("quantize", "--recipe", recipe).exit_code == 0
    damaged = tmp_path / "damaged.json"
    damaged.write_text(Path(recipe).read_text()[:-20])
    assert run("quantize", "--recipe", str(damaged)).exit_code == 1


def test_a_recipe_of_other_weights_is_refused(
    small: SearchResult, demo_workspace: Workspace
) -> None:
    recipe = load_recipe(small.recipe)
    with pytest.raises(ArtifactError, match="other weights"):
        recipe.check(demo_workspace.source(cards.DEMO)[1].weights.identity)


def test_search_command_draws(cut: Workspace, small: SearchResult, tmp_path: Path) -> None:
    plot = tmp_path / "front.png"
    words = ["search", "--workspace", str(cut.root), "--model", cards.DEMO, "--quiet"]
    words += ["--data", str(digits(cut)), "--max-drop", "10", "--threads", "1", "--batch", "120"]
    words += ["--search-images", "120"]
    words += ["--no-smooth", "--range", "minmax", "--fixed-plan", "--output", str(plot)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == (0 if small.confirmed else 3), result.output
    assert "CONFIRMED" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cost", "macs", "--gpu", "L4"), "--gpu belongs to --cost roofline"),
        (("--cpu", "--gpu", "L4"), "--gpu belongs to --cost roofline"),
        (("--cost", "macs", "--no-quantize-outputs"), "belongs to --cost roofline and gpu"),
        (("--cost", "gpu", "--gpu", "L4"), "--gpu belongs to --cost roofline"),
        (("--cost", "gpu", "--cpu"), "times TensorRT engines, remainder fp32 is for ONNX Runtime"),
        (("--cost", "roofline", "--cpu", "--no-quantize-outputs"), "belongs to graphs for Tens"),
        (("--int8", "--fp8"), "--int8 and --fp8 exclude each other"),
        (("--gpu", "Voodoo 2"), "no data sheet of a GPU 'Voodoo 2'"),
    ],
)
def test_options_that_have_no_effect_and_a_gpu_without_a_data_sheet(
    words: tuple[str, ...], message: str, demo_workspace: Workspace
) -> None:
    place = ["--workspace", str(demo_workspace.root), "--model", cards.DEMO, "--data", str(TEST)]
    result = CliRunner().invoke(main, ["search", *place, *words])
    assert result.exit_code == 2
    assert message in result.stderr
