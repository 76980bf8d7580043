"""Contradictions and options without effect are usage errors in every command."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from command_cases import every_command
from verify_command import run

from clipdeploy.cli.main import main
from clipdeploy.cli.quantize import recipe_names
from clipdeploy.cli.usage import Command, Group
from clipdeploy.models import cards

INT8 = (
    "--recipe r.json",
    "--exclude blocks.0.*",
    "--range mse",
    # As the default is: the command line gave it all the same.
    "--range auto",
    "--no-smooth",
    "--strength 0.5",
    "--no-shift",
    "--no-bias-correction",
    "--no-weight-clip",
    "--quantize-attention",
    "--quantize-head",
    "--quantize-patch",
    "--calibration-images 20",
    "--seed 0",
)
DEPLOY = "deploy --val-data images"
WITHOUT_INT8 = [
    *(f"{command} {option}" for option in INT8 for command in ("build-engine", f"{DEPLOY} --fp16")),
    "build-engine --fp32 --data images",
    "build-engine --skip-unreadable",
    f"{DEPLOY} --fp32 --calibration-data images",
]
UNUSED = [
    *((words, "--int8 and --fp8") for words in WITHOUT_INT8),
    ("build-engine --int8 --fp16-io", "--fp16"),
    ("verify --data images --layout none --skip-unlabelled", "the layouts with classes"),
    ("search --data images --layout none --first-class 1", "the layouts with classes"),
    ("bisect --data images --layout folders --labels list", "the layouts with a label file"),
    ("build-engine --fp32 --fp16-io", "--fp16"),
    ("build-engine --int8 --range mse --no-shift", "--range auto"),
    ("quantize --range entropy --no-shift", "--range auto"),
    (f"{DEPLOY} --range percentile --no-shift", "--range auto"),
    (f"{DEPLOY} --layout none --labels list", "the layouts with a label file"),
    ("search --data images --range minmax --no-shift", "--range auto"),
    ("search --data images --confirm-data others --search-images 9", "a split of --data"),
    ("search --data images --confirm-data others --seed 1", "a split of --data"),
    ("export --model demo --resize-pos-embed", "--checkpoint"),
    ("export --model demo --random-init 1 --resize-pos-embed", "--checkpoint"),
    ("export --model demo --gelu quick", "--checkpoint"),
    ("export --model demo --no-ema", "--checkpoint"),
    ("export --checkpoint x.pth --resampling timm", "--image-size"),
    ("verify --data images --cache-size 5", "--cache-crops"),
    ("verify --data images --no-cache-crops --cache-size 5", "--cache-crops"),
    ("verify --data images --graphs-only --trust", "engines"),
    ("verify a.onnx b.onnx --data images --trust", "engines"),
    ("verify --data images --layout folders --labels list", "the layouts with a label file"),
    ("verify merge --layout folders --labels list", "the layouts with a label file"),
    ("benchmark a.onnx --cuda-graph", "engines"),
    ("benchmark a.onnx --trust", "engines"),
    ("inspect a.onnx --trust", "engines"),
    ("package a.onnx --cpp c --name digits", "--triton"),
    ("package a.onnx --cpp c --max-batch 2", "--triton"),
    ("package a.onnx --cpp c --instances 1", "--triton"),
]
TOGETHER = [
    ("build-engine --int8 --fp16", "--int8 and --fp16"),
    ("build-engine --fp16 --int8", "--fp16 and --int8"),
    ("build-engine --fp32 --fp16", "--fp32 and --fp16"),
    (f"{DEPLOY} --fp32 --int8", "--fp32 and --int8"),
    ("build-engine --profile 1,2,4 --max-batch 8", "--profile and --max-batch"),
    ("build-engine --profile 1,2,4 --opt-batch 8", "--profile and --opt-batch"),
    ("build-engine --int8 --no-smooth --strength 0.5", "--no-smooth and --strength"),
    ("quantize --no-smooth --strength 0.5", "--no-smooth and --strength"),
    ("search --data images --no-smooth --strength 0.5", "--no-smooth and --strength"),
    ("quantize --recipe r.json --range auto", "--recipe and --range"),
    ("quantize --recipe r.json --no-weight-clip", "--recipe and --no-weight-clip"),
    ("build-engine --int8 --recipe r.json --exclude a", "--recipe and --exclude"),
    (f"{DEPLOY} --recipe r.json --quantize-head", "--recipe and --quantize-head"),
    ("export --model demo --checkpoint a.pth --random-init 1", "--checkpoint and --random-init"),
    (f"{DEPLOY} --checkpoint a.pth --random-init 0", "--checkpoint and --random-init"),
    ("verify a.onnx b.engine --data images --graphs-only", "ARTIFACTS and --graphs-only"),
    ("package --triton t --cpp c", "--triton and --cpp"),
    ("package a.onnx --model demo --triton t", "ARTIFACT and --model"),
    ("benchmark a.onnx --model demo", "ARTIFACTS and --model"),
]


@pytest.mark.parametrize(("words", "owner"), UNUSED)
def test_an_option_without_effect_is_refused(words: str, owner: str, cwd: Path) -> None:
    result = run(*words.split())
    assert result.exit_code == 2, result.output
    assert f" belongs to {owner}: here it would have no effect (leave it out, or " in result.stderr
    assert result.stderr.startswith("error: --")
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize(("words", "pair"), TOGETHER)
def test_options_that_exclude_each_other_are_refused(words: str, pair: str, cwd: Path) -> None:
    result = run(*words.split())
    assert result.exit_code == 2, result.output
    assert f"{pair} exclude each other" in result.stderr
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize(
    "words", ["calibrate --data images merge", "calibrate --workspace a merge", "zoo --json list"]
)
def test_options_before_a_subcommand_are_refused(words: str, cwd: Path) -> None:
    result = run(*words.split())
    assert result.exit_code == 2, result.output
    assert f"has no effect before {words.split()[-1]!r}" in result.stderr


@pytest.mark.parametrize("option", ["--images 20", "--seed 3", "--skip-unreadable"])
def test_options_of_calibration_where_nothing_is_calibrated(
    option: str, artifacts: Path, cwd: Path
) -> None:
    at = ("--data", cards.demo_file("calibration.zip"), "--model", "demo")
    assert run("calibrate", *at, "--images", "10").exit_code == 0
    result = run("build-engine", "--int8", "--model", "demo", *option.split())
    assert result.exit_code == 2, result.output
    assert f"{option.split()[0]} belongs to --data: " in result.stderr


@pytest.mark.parametrize("option", ["--calibration-images 20", "--seed 3"])
def test_options_of_calibration_images_that_deploy_does_not_have(option: str, cwd: Path) -> None:
    result = run(*DEPLOY.split(), "--model", "demo", *option.split())
    assert result.exit_code == 2, result.output
    assert f"{option.split()[0]} belongs to --calibration-data: " in result.stderr


@pytest.mark.parametrize("option", ["--profile 1,2,4", "--max-batch 8", "--min-batch 1"])
def test_batches_of_a_graph_of_one_batch(option: str, cwd: Path) -> None:
    assert run("export", "--model", "demo", "--fixed-batch", "4").exit_code == 0
    result = run("build-engine", *option.split())
    assert result.exit_code == 2, result.output
    assert "belongs to a graph of any batch (this one was exported for 4)" in result.stderr


@pytest.mark.parametrize("option", ["--timing-cache", "--no-timing-cache"])
def test_kernel_times_where_none_are_measured(option: str, cwd: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    result = run("build-engine", "--backend", "tensorrt-rtx", option)
    assert result.exit_code == 2, result.output
    assert f"{option} belongs to another backend than tensorrt-rtx: " in result.stderr


def test_a_setting_is_no_contradiction(cwd: Path) -> None:
    (cwd / "clipdeploy.toml").write_text(
        'calibration_data = "images"\nval_data = "images"\ncache_size = 5\nmodel = "demo"\n'
    )
    verify = "verify --no-cache-crops"
    for words in ("build-engine", "deploy --fp16", verify, "package a.onnx --cpp c"):
        result = run(*words.split())
        for said in ("belongs to", "exclude each other", "no effect"):
            assert said not in result.output
        assert result.exit_code != 0


def test_limits_of_a_shard_are_not_forgotten(artifacts: Path, cwd: Path) -> None:
    images = ("--data", cards.demo_file("test.zip"), "--images", "32")
    at = (*images, "--graphs-only", "--workers", "0")
    result = run(
        "verify", *at, "--shard", "1/2", "--max-drop", "6", "--baseline", "none", "--model", "demo"
    )
    assert result.exit_code == 0, result.output
    assert "give --max-drop, --baseline to `verify merge` as well" in result.stderr


def test_every_command_keeps_the_rule() -> None:
    for path, command in every_command(main):
        assert isinstance(command, Command | Group), path


def test_the_options_of_int8_are_those_of_quantize() -> None:
    own = {param.name for _, command in every_command(main) for param in command.params}
    assert set(recipe_names()) <= own
    quantize = main.commands["quantize"]
    assert isinstance(quantize, click.Command)
    shared = {"model", "fp8", "cpu", "force", "workspace", "as_json", "quiet", "debug"}
    assert {param.name for param in quantize.params} - shared == set(recipe_names())


@pytest.mark.parametrize(
    ("words", "pair"),
    [
        ("verify --data a --val-data b", "--data and --val-data"),
        ("verify --val-data=a --data=a", "--val-data and --data"),
        ("verify --data a --limit 8 --images 16", "--limit and --images"),
        ("calibrate --data a --calibration-data b", "--data and --calibration-data"),
        ("deploy --val a --val-data b", "--val and --val-data"),
        ("benchmark --provider cpu --device cuda", "--provider and --device"),
        ("bisect --data a -o b.svg --output c.svg", "-o and --output"),
    ],
)
def test_one_option_under_two_names_is_refused(words: str, pair: str, cwd: Path) -> None:
    result = run(*words.split())
    assert result.exit_code == 2, result.output
    assert f"{pair} are the same option" in result.stderr
    assert list(cwd.iterdir()) == []


def test_several_outputs_may_have_several_names(cwd: Path) -> None:
    result = run("verify", "--data", "none", "--report", "a.html", "-o", "b.md", "--output", "c.md")
    assert "are the same option" not in result.stderr
