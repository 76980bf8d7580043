"""FP8 through every stage: graph, verdict, bisection, engine, package and deployment."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from demo_workspaces import TENSORRT
from judging import each_once
from numpy.typing import NDArray
from onnx import numpy_helper
from verify_command import run

from calibration.config import QuantizeConfig, stored_settings
from calibration.policy import Scope
from calibration.recipe import QuantizeRecipe, load_recipe, save_recipe
from clipdeploy.core.errors import ArtifactError, BuildError, DatasetError, UsageError
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import EngineArtifact, build_engine
from clipdeploy.models import cards
from clipdeploy.pipeline import (
    DeployConfig,
    VerifyScope,
    build_model,
    deploy_model,
    package_cpp,
    package_triton,
    quantize_model,
    search_model,
    verify_model,
)
from clipdeploy.runners.onnx import OnnxRunner
from clipdeploy.stages.quantize import in_format, recipe_config
from clipdeploy.tuning.chain import Chain
from clipdeploy.tuning.search import SearchConfig
from clipdeploy.verification.result import Row
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import Workspace
from exporters.metrics import sqnr_db

needs_tensorrt = pytest.mark.skipif(not TENSORRT, reason="TensorRT-RTX has no wheel here")
TEST, CALIBRATION = cards.demo_file("test.zip"), cards.demo_file("calibration.zip")
FP8 = QuantizeConfig(format="fp8", scope=Scope(attention=True))


@pytest.fixture(scope="module")
def workspace(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The demo with an FP8 graph whose attention is quantised too.  Read only."""
    made = Workspace(tmp_path_factory.mktemp("fp8") / "artifacts")
    shutil.copytree(demo_workspace.root, made.root)
    quantize_model(made, cards.DEMO, FP8)
    return made


@pytest.fixture(scope="module")
def graph(workspace: Workspace) -> Path:
    return workspace.graph(cards.DEMO, "fp8")


@pytest.fixture(scope="module")
def engine(workspace: Workspace) -> EngineArtifact:
    return build_engine(
        workspace.graph(cards.DEMO, "fp8"), workspace.root / "fp8.engine", BuildConfig()
    )


def judged(workspace: Workspace, graph: Path) -> Row:
    """The row of ``graph``, on 40 held-out digits."""
    scope = VerifyScope(artifacts=(graph,), limit=40)
    found = verify_model(workspace, cards.DEMO, TEST, VerifyConfig(20, workers=0), scope)
    assert found.verification is not None
    return found.verification.rows[-1]


def test_the_verdict_of_a_sound_graph(workspace: Workspace, graph: Path) -> None:
    row = judged(workspace, graph)
    assert row.verdict == "equivalent"
    assert row.fidelity is not None
    assert row.fidelity.sqnr_db is not None
    # Measured 29.0 dB on 100 digits and 28.5 on these.
    assert 26 < row.fidelity.sqnr_db < 34


def test_the_verdict_of_a_wrong_scale(workspace: Workspace, graph: Path, tmp_path: Path) -> None:
    """Without a passport, so that the file itself says that it is FP8."""
    model = onnx.load(graph)
    del model.metadata_props[:]
    for tensor in model.graph.initializer:
        if "attn.qkv.input_scale" in tensor.name:
            wrong = numpy_helper.to_array(tensor) * np.float16(0.02)
            tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    with each_once():
        row = judged(workspace, tmp_path / "wrong.onnx")
    assert (row.precision, row.calibrated) == ("fp8", None)
    assert row.verdict == "regressed"


def test_another_fp8_of_another_tool(workspace: Workspace, graph: Path, tmp_path: Path) -> None:
    """E5M2: judged, and its calibration images are as unknown as those of any such file."""
    model = onnx.load(graph)
    del model.metadata_props[:]
    ours, other = onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2
    for tensor in model.graph.initializer:
        if tensor.data_type == ours:
            numbers = numpy_helper.to_array(tensor).astype(ml_dtypes.float8_e5m2)
            tensor.raw_data, tensor.data_type = numbers.tobytes(), other
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == ours:
            value.type.tensor_type.elem_type = other
    onnx.save(model, tmp_path / "e5m2.onnx")
    with each_once():
        row = judged(workspace, tmp_path / "e5m2.onnx")
    assert (row.precision, row.calibrated) == ("fp8", None)
    assert row.fidelity is not None
    assert row.fidelity.sqnr_db is not None
    # A bit less of mantissa is 6 dB.
    assert 19 < row.fidelity.sqnr_db < 26


def test_images_it_was_calibrated_on_are_refused(workspace: Workspace, graph: Path) -> None:
    with pytest.raises(DatasetError, match="was used for calibration"):
        verify_model(
            workspace, cards.DEMO, CALIBRATION, scope=VerifyScope(artifacts=(graph,), limit=50)
        )


def test_the_graph_is_made_once(workspace: Workspace) -> None:
    again = quantize_model(workspace, cards.DEMO, FP8)
    assert not again.artifact.changed
    left_out = {e.name for e in again.placement.entries if not e.quantized}
    assert left_out == {"head", "patch_embed", "blocks.5.attn.scores", "blocks.5.attn.mix"}
    passport = again.artifact.passport
    assert (passport.precision, passport.settings["fp8_nodes"]) == ("fp8", 34)
    assert passport.settings["weight_scales"] == "tensor"


def test_it_is_bisected(workspace: Workspace, graph: Path, demo_images: NDArray[Any]) -> None:
    source, _ = workspace.source(cards.DEMO)
    chain = Chain(source, graph)
    whole = chain.run(demo_images, chain.everything)[-1]
    alone = chain.run(demo_images, {"blocks.0.mlp.fc2"})[-1]
    runner = OnnxRunner(graph)
    expected, reference = runner(demo_images), OnnxRunner(source)(demo_images)
    # Both round to float16 and to FP8 at the same places, but add in another order.
    agreement = sqnr_db(expected, whole)
    assert agreement is None or agreement > 35
    error, part = sqnr_db(reference, whole), sqnr_db(reference, alone)
    assert error is not None
    assert part is not None
    assert part > error + 3


@needs_tensorrt
def test_the_engine(engine: EngineArtifact) -> None:
    made = engine.passport
    assert all(float(each) >= 8.9 for each in made.capabilities)
    assert made.remarks == ()
    assert made.checked_products == 24
    assert made.compiled is not None
    for block in made.compiled.blocks[1:-2]:
        assert (block.gemms, block.attention) == ({"fp8": 4}, {"fp8": 2})
    # One kernel for attention, one for each Linear, and four between them.
    assert max(count for name, count in made.kernels.items() if name.startswith("blocks")) <= 9


@needs_tensorrt
@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6"])
def test_older_gpus_are_refused(graph: Path, tmp_path: Path, capability: str) -> None:
    config = BuildConfig(compute_capability=("12.0", capability))
    with pytest.raises(BuildError, match=f"fp8, which SM {capability} cannot compute"):
        build_engine(graph, tmp_path / "fp8.engine", config)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_is_not_packaged(graph: Path, tmp_path: Path) -> None:
    for package in (package_triton, package_cpp):
        with pytest.raises(ArtifactError, match="ONNX Runtime runs only for judging"):
            package(graph, tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


DEPLOY = DeployConfig(TEST, "fp8", CALIBRATION, build=BuildConfig(backend="tensorrt-rtx"))


@needs_tensorrt
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DEPLOY, "Triton loads neither"),
        (replace(DEPLOY, scope=VerifyScope(graphs_only=True)), "cannot be packaged"),
    ],
)
def test_a_deployment_without_a_package_to_make_ends_first(
    config: DeployConfig, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        deploy_model(Workspace(tmp_path / "artifacts"), cards.DEMO, config)
    assert not (tmp_path / "artifacts" / cards.DEMO / "fp32.onnx").exists()


def test_a_search_chooses_between_fp8_and_fp16(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(tmp_path / "copy")
    shutil.copytree(workspace.root, copy.root)
    config = SearchConfig(30, search_images=40, cost="macs", format="fp8", fixed_scheme=True)
    found = search_model(copy, cards.DEMO, TEST, config)
    # FP8 loses less than 30 points of top-1, so that every Linear may be in it.
    assert found.chosen.label == "chosen, all FP8"
    assert found.artifact.path == copy.graph(cards.DEMO, "fp8")
    assert found.artifact.passport.settings["fp8_nodes"] == 24
    assert found.chosen.evaluation.sqnr_db is not None
    assert 26 < found.chosen.evaluation.sqnr_db < 36
    assert load_recipe(found.recipe).config.format == "fp8"
    assert found.format == "fp8"
    for wrong in ({"format": "fp4"}, {"format": "fp8", "remainder": "fp32"}):
        with pytest.raises(UsageError):
            SearchConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="A100-40GB has no FP8 products"):
        search_model(copy, cards.DEMO, TEST, replace(config, cost="roofline", gpu="A100-40GB"))


def test_a_recipe_is_for_one_format(workspace: Workspace, tmp_path: Path) -> None:
    weights = workspace.source(cards.DEMO)[1].weights.identity
    path = tmp_path / "recipe.json"
    for config, other in ((FP8, "int8"), (QuantizeConfig(), "fp8")):
        save_recipe(QuantizeRecipe(cards.DEMO, weights, config), path)
        assert load_recipe(path).config == config
        assert recipe_config(workspace, cards.DEMO, path, config.format) == config
        with pytest.raises(UsageError, match=f"for {config.format}, not for {other}"):
            recipe_config(workspace, cards.DEMO, path, other)  # type: ignore[arg-type]
        deploy = replace(DEPLOY, precision=other, quantize_recipe=path, cpp=tmp_path / "cpp")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=f"for {config.format}, not for {other}"):
            deploy_model(Workspace(tmp_path / "none"), cards.DEMO, deploy)
        assert not (tmp_path / "none" / cards.DEMO / "fp32.onnx").exists()


def test_int8_graphs_of_earlier_versions_are_not_made_again() -> None:
    assert "format" not in stored_settings(QuantizeConfig())
    assert stored_settings(FP8)["format"] == "fp8"


def test_the_precision_sets_the_format() -> None:
    assert in_format(QuantizeConfig(), "fp8").format == "fp8"
    assert in_format(QuantizeConfig(), "int8") == QuantizeConfig()
    with pytest.raises(UsageError, match="for FP8, but the precision is int8"):
        in_format(FP8, "int8")
    with pytest.raises(UsageError, match="for FP8, but the precision is int8"):
        replace(DEPLOY, beside=("int8",), quantize=FP8)
    for wrong in ({"format": "fp4"}, {"format": "fp8", "remainder": "fp32"}):
        with pytest.raises(UsageError):
            QuantizeConfig(**wrong)  # type: ignore[arg-type]


def test_calibration_images_are_only_for_8_bits(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="belongs to --int8 and --fp8"):
        build_model(workspace, cards.DEMO, "fp16", data=CALIBRATION)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("quantize --fp8 --cpu", "--fp8 and --cpu exclude each other"),
        ("quantize --fp8 --strength 0.5", "--strength belongs to INT8"),
        ("quantize --fp8 --no-smooth", "--no-smooth belongs to INT8"),
        ("build-engine --fp8 --no-shift", "--no-shift belongs to INT8"),
        ("build-engine --fp16 --weight-scales tensor", "belongs to --int8 and --fp8"),
    ],
)
def test_options_that_do_not_belong_to_fp8(words: str, said: str, workspace: Workspace) -> None:
    name, *rest = words.split()
    result = run(name, "--workspace", str(workspace.root), "--model", cards.DEMO, *rest)
    assert result.exit_code == 2
    assert said in result.stderr
