"""What the verbs of the Python API take: names, paths, numbers; and what they refuse.

Covers: clipdeploy/core/paths.py.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.recipe import QuantizeRecipe, save_recipe
from clipdeploy import pipeline
from clipdeploy.core.errors import UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import WeightsOrigin
from clipdeploy.models import cards
from clipdeploy.pipeline import (
    BenchmarkConfig,
    BisectConfig,
    BuildConfig,
    CalibrateConfig,
    DeployConfig,
    Expected,
    ExportConfig,
    Fp16Config,
    Labelling,
    Limits,
    ModelChoices,
    QuantizeConfig,
    SchemeConfig,
    SearchConfig,
    TritonConfig,
    VerifyConfig,
    VerifyScope,
    WeightsChoice,
    Workspace,
    benchmark_artifacts,
    benchmark_model,
    bisect_model,
    build_model,
    calibrate_model,
    convert_model,
    export_model,
    inspect_file,
    merge_calibration,
    package_cpp,
    package_triton,
    predict_images,
    quantize_model,
    verify_model,
    write_reports,
)
from clipdeploy.stages.quantize import chosen_config
from exporters.headers import read_passport

ALIAS = "demo"
CALIBRATION = str(cards.demo_file("calibration.zip"))
TEST = str(cards.demo_file("test.zip"))
BRIEF = BenchmarkConfig(batches=(1,), seconds=None, rounds=2, warmup=0.0)
# More digits than Python writes.
LONG = 10**5000
SKIPPED_FIRST = ("blocks.0.*",)


@pytest.fixture
def workspace(demo_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the finished workspace, named by a text relative to the working folder."""
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path)
    return "artifacts"


def test_a_workspace_takes_a_text_and_any_name(workspace: str) -> None:
    made = Workspace(workspace)
    assert made == Workspace(Path(workspace))
    assert made.graph(ALIAS, "fp32") == Path(workspace, cards.DEMO, "fp32.onnx")
    assert made.engine(ALIAS, "int8").parent == made.folder(cards.DEMO)
    assert made.source(ALIAS)[1].model == cards.DEMO


def test_every_verb_takes_an_alias_and_texts(workspace: str, tmp_path: Path) -> None:
    at = Workspace(workspace)
    assert not export_model(at, ALIAS).changed
    assert not convert_model(at, ALIAS).changed
    assert not calibrate_model(at, ALIAS, CALIBRATION).changed
    assert not quantize_model(at, model=ALIAS).artifact.changed
    graph = str(at.graph(ALIAS, "fp32"))
    scope = VerifyScope(artifacts=(graph,), limit=8)  # type: ignore[arg-type]
    judgement = verify_model(at, ALIAS, TEST, VerifyConfig(workers=0), scope, keep="kept.jsonl")
    assert judgement.verification is not None
    assert judgement.verification.model == cards.DEMO
    assert Path("kept.jsonl").exists()
    write_reports(judgement, "page.md")
    assert Path("page.md").exists()
    found = bisect_model(at, ALIAS, TEST, str(at.graph(ALIAS, "int8")), BisectConfig(1))
    assert found.model == cards.DEMO
    assert predict_images(at, ALIAS, TEST, graph, top=1).model == cards.DEMO
    assert predict_images(at, None, [TEST], artifact=graph, top=1).model == cards.DEMO
    assert benchmark_model(at, ALIAS, BRIEF).model == cards.DEMO
    assert benchmark_artifacts(graph, BRIEF)
    assert inspect_file(graph).passport is not None
    assert package_triton(graph, "models").changed
    assert package_cpp(graph, "program").changed
    config = CalibrateConfig(images=4, shard=(1, 1))
    part = str(calibrate_model(at, ALIAS, CALIBRATION, config).path)
    assert len(merge_calibration(at, ALIAS, part).table.images) == 4


def test_every_verb_refuses_a_name_that_is_no_model(workspace: str) -> None:
    at = Workspace(workspace)
    for verb in (convert_model, quantize_model, benchmark_model, pipeline.artifact_to_package):
        with pytest.raises(UsageError, match="unknown model 'demi'"):
            verb(at, "demi")


def test_configurations_take_texts() -> None:
    config = DeployConfig("val", calibration=os.fspath("images"), cpp="c")  # type: ignore[arg-type]
    assert config.val == Path("val")
    assert config.calibration == Path("images")
    assert config.cpp == Path("c")
    assert config.triton is None
    asked = Labelling(labels="list.txt", class_names="names.txt")  # type: ignore[arg-type]
    assert (asked.labels, asked.class_names) == (Path("list.txt"), Path("names.txt"))


NUMBERS: list[tuple[Callable[..., Any], str]] = [
    *((CalibrateConfig, name) for name in ("images", "seed", "threads")),
    *((BisectConfig, name) for name in ("images", "seed", "batch", "threads")),
    *((VerifyConfig, name) for name in ("max_drop", "max_drop_top5", "batch", "workers")),
    (VerifyConfig, "threads"),
    (VerifyScope, "limit"),
    *((Limits, name) for name in ("top1", "top5")),
    *((Expected, name) for name in ("top1", "top5")),
    *((SearchConfig, name) for name in ("max_drop", "budget", "seed", "search_images", "batch")),
    (SearchConfig, "threads"),
    *((BenchmarkConfig, name) for name in ("seconds", "rounds", "warmup", "seed", "threads")),
    *((BuildConfig, name) for name in ("memory_pool_mib", "optimization_level")),
    *((TritonConfig, name) for name in ("max_batch", "queue_delay", "instances")),
    *((ExportConfig, name) for name in ("opset", "batch")),
    (SchemeConfig, "strength"),
    (QuantizeConfig, "min_sqnr"),
    *((WeightsChoice, name) for name in ("random_seed", "heads", "image_size")),
    (ModelChoices, "eps"),
]


def repr_of(value: object) -> str:
    return "long" if value is LONG else repr(value)


@pytest.mark.parametrize(
    "value", [-500, math.nan, math.inf, 10**30, LONG, "3", True, []], ids=repr_of
)
@pytest.mark.parametrize(("config", "field"), NUMBERS)
def test_numbers_that_cannot_be(config: Callable[..., Any], field: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        config(**{field: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_every_number_of_a_public_configuration_is_checked() -> None:
    """A new field has to get into the list above."""
    listed = {(config, field) for config, field in NUMBERS}
    for name in pipeline.__all__:
        config = getattr(pipeline, name)
        for field, kind in getattr(config, "__annotations__", {}).items():
            numeric = kind.split(" | ")[0] in ("int", "float")
            if numeric and (name.endswith(("Config", "Choice", "Scope")) or config is Limits):
                assert (config, field) in listed, f"{name}.{field}"


@pytest.mark.parametrize("field", ["averaged", "gelu", "pooling", "resampling"])
def test_an_unknown_choice_is_refused(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} cannot be 'tanh'"):
        ModelChoices(**{field: "tanh"})  # type: ignore[arg-type]
    assert getattr(ModelChoices(**{field: None}), field) is None


def test_numbers_of_numpy_are_numbers() -> None:
    assert CalibrateConfig(images=np.int64(8)).images == 8  # type: ignore[arg-type]
    assert VerifyConfig(max_drop=np.float32(0.5)).max_drop == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("profiles", [(), ((1, 2),), ((0, 1, 2),), ((1, 8, 10**9),), ((3, 2, 1),)])
def test_profiles_that_cannot_be(profiles: Any) -> None:
    with pytest.raises(UsageError):
        BuildConfig(profiles=profiles)


def test_classes_to_name_are_counted(demo_workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="invalid value -1 for top"):
        predict_images(demo_workspace, ALIAS, TEST, top=-1)


@pytest.fixture
def searched(workspace: str) -> Workspace:
    """A workspace whose INT8 graph a search wrote."""
    at = Workspace(workspace)
    config = QuantizeConfig(SKIPPED_FIRST)
    made = quantize_model(at, cards.DEMO, config).artifact
    identity = made.passport.weights.identity
    save_recipe(QuantizeRecipe(cards.DEMO, identity, config, {}), at.recipe(cards.DEMO))
    return at


def test_a_searched_graph_is_kept(searched: Workspace) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    graph, said = searched.graph(cards.DEMO, "int8"), list[str]()
    before = sha256_file(graph)
    engine = build_model(searched, ALIAS, "int8", note=said.append)
    assert sha256_file(graph) == before == engine.passport.hashes.graph
    assert said == ["keeping the INT8 graph of the search; --force or INT8 options replace it"]


def test_a_searched_graph_gives_way_to_another_choice(searched: Workspace) -> None:
    assert chosen_config(searched, ALIAS).exclude == SKIPPED_FIRST
    assert chosen_config(searched, ALIAS, force=True) == QuantizeConfig()
    asked = QuantizeConfig(("head",))
    assert chosen_config(searched, ALIAS, asked) == asked


@pytest.mark.parametrize(
    ("precision", "more", "said"),
    [
        ("fp16", {"data": "images"}, "data belongs to --int8"),
        ("fp32", {"quantize": QuantizeConfig(("head",))}, "quantize belongs to --int8"),
        ("int8", {"fp16": Fp16Config(half_io=True)}, "fp16 belongs to an engine in FP16"),
        ("int8", {"calibrate": CalibrateConfig(images=5)}, "calibrate belongs to data"),
        ("int8", {"quantize": QuantizeConfig(remainder="fp32")}, "no engine is built from INT8"),
    ],
)
def test_what_a_build_would_not_use_is_refused(
    precision: Any, more: dict[str, Any], said: str, demo_workspace: Workspace
) -> None:
    with pytest.raises(UsageError, match=said):
        build_model(demo_workspace, cards.DEMO, precision, **more)
    assert not demo_workspace.engine(cards.DEMO, precision).exists()


def test_what_a_deployment_would_not_use_is_refused() -> None:
    config = DeployConfig(Path(TEST), precision="fp16")
    with pytest.raises(UsageError, match="quantize belongs to --int8"):
        replace(config, quantize=QuantizeConfig(("head",)))


def test_a_changed_keep_is_noticed(workspace: str) -> None:
    at, tensor = Workspace(workspace), "blocks.0.mlp.fc1"
    names = [tensor, "blocks.1.mlp.fc1"]
    graph = at.graph(cards.DEMO, "fp32")
    outputs = [output_of(graph, name) for name in names]
    both = convert_model(at, ALIAS, Fp16Config(tuple(outputs)))
    assert both.changed
    one = convert_model(at, ALIAS, Fp16Config((outputs[0],)))
    assert one.changed
    assert one.sha256 != both.sha256
    assert not convert_model(at, ALIAS, Fp16Config((outputs[0],))).changed
    assert convert_model(at, ALIAS).changed
    assert read_passport(at.graph(cards.DEMO, "fp16")).settings["keep_fp32"] == []


def output_of(graph: Path, node: str) -> str:
    import onnx

    found = next(each for each in onnx.load(graph).graph.node if each.name.startswith(node))
    name: str = found.output[0]
    return name


def test_weights_in_words() -> None:
    assert WeightsOrigin("random", seed=3).description == "random weights, seed 3"
