"""``predict`` on real digits, from every artifact, and what it says to bad input."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from clipdeploy.cli.main import main
from clipdeploy.models import cards
from clipdeploy.stages import predict as stage
from clipdeploy.verification.targets import Target
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One held-out image of every digit, in ``DIGIT/NAME``."""
    folder = tmp_path_factory.mktemp("digits")
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        for digit in "0123456789":
            member = min(name for name in archive.namelist() if name.startswith(f"{digit}/"))
            archive.extract(member, folder)
    return folder


def predict(workspace: Workspace, *words: str | Path) -> Result:
    place = ["--workspace", str(workspace.root)]
    return CliRunner().invoke(main, ["predict", *place, *map(str, words)])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_digit_is_known(demo_workspace: Workspace, digits: Path, precision: str) -> None:
    graph = demo_workspace.graph(cards.DEMO, precision)  # type: ignore[arg-type]
    result = predict(demo_workspace, digits, "--artifact", graph, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["runner"] == "ONNX Runtime (CPU)"
    assert len(found["images"]) == 10
    for image in found["images"]:
        written = Path(image["image"]).parent.name
        assert image["guesses"][0]["label"] == written
        assert len(image["guesses"]) == 5
        # A softmax: the largest first, all five no more than the whole.
        shares = [guess["percent"] for guess in image["guesses"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 100 + 1e-9


def test_a_wrong_graph_gives_wrong_digits(
    demo_workspace: Workspace, digits: Path, tmp_path: Path
) -> None:
    proto = onnx.load(demo_workspace.graph(cards.DEMO, "fp32"))
    (bias,) = (t for t in proto.graph.initializer if t.name == "head.bias")
    values = numpy_helper.to_array(bias) + 100 * (np.arange(10) == 7)
    bias.CopyFrom(numpy_helper.from_array(values.astype(np.float32), bias.name))
    onnx.save(proto, tmp_path / "sevens.onnx")
    result = predict(demo_workspace, digits, "--artifact", tmp_path / "sevens.onnx", "--json")
    firsts = [image["guesses"][0]["label"] for image in json.loads(result.stdout)["images"]]
    assert firsts == ["7"] * 10


def test_without_an_artifact_the_model_says_which(demo_workspace: Workspace, digits: Path) -> None:
    image = next(digits.rglob("*.png"))
    result = predict(demo_workspace, image, "--model", "demo", "--top", "2")
    assert result.exit_code == 0, result.output
    assert "fp32.onnx on ONNX Runtime" in result.stderr
    assert str(image) in result.stdout.replace("\n", "")
    assert result.stdout.count("%") == 2


def test_classes_have_names_only_where_a_passport_states_them(demo_workspace: Workspace) -> None:
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    card = cards.find("clip-vit-base-p16")
    names = tuple(name for name, _ in cards.class_names(card))
    passport = replace(read_passport(graph), model=card.name, classes=len(names), class_names=names)
    known = Target(graph, "graph", passport)
    assert stage._words(known)[0] == ("n01440764", "tench, Tinca tinca")
    assert stage._words(replace(known, vouched=False))[0] == ("0", "0")


def test_bad_input(demo_workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for words, said in (
        ((tmp_path / "gone.png",), "gone.png"),
        ((tmp_path / "text.png",), "cannot read the image"),
        ((tmp_path / "text.png", "--artifact", tmp_path / "text.png"), "neither .onnx nor .engine"),
        ((tmp_path / "text.png", "--artifact", tmp_path / "gone.onnx"), "gone.onnx"),
    ):
        result = predict(demo_workspace, *words)
        assert result.exit_code in (1, 2)
        assert said in result.stderr
        assert result.stderr.count("error:") == 1
        assert result.stdout == ""
