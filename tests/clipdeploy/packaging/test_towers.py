"""Both of CLIP's towers as Triton models, and the client that compares images with texts.

Covers: clipdeploy/stages/package.py.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_workspaces import EMBEDDER
from passport_edits import put, restamp
from triton_server import read_config, serving
from tritonclient.grpc import model_config_pb2

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.models import cards
from clipdeploy.models.clip.tokenizer import tokenize
from clipdeploy.packaging.client import TextModel, client_source
from clipdeploy.pipeline import (
    TritonConfig,
    TritonPackage,
    Workspace,
    package_cpp,
    package_triton,
    predict_images,
)
from exporters.headers import read_passport

TEXTS = ("a photo of the digit zero", "das Foto einer 7", "seven &amp; <b>", "Ünïcode ☃ " * 40)


@pytest.fixture
def package(towers: Workspace, tmp_path: Path) -> TritonPackage:
    return package_triton(towers.graph(EMBEDDER, "fp32"), tmp_path / "models")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        for digit in "07":
            archive.extract(min(n for n in archive.namelist() if n.startswith(digit)), folder)
    return folder


def run(client: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(client), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_both_towers_are_models(package: TritonPackage, towers: Workspace) -> None:
    text = package.text
    assert text is not None
    assert text.name == f"{EMBEDDER}-text-fp16"
    assert text.model.read_bytes() == towers.graph(EMBEDDER, "fp16", "text").read_bytes()
    config = read_config(text.path)
    [ids], [embedding] = config.input, config.output
    assert (ids.name, list(ids.dims)) == ("ids", [77])
    assert model_config_pb2.DataType.Name(ids.data_type) == "TYPE_INT32"
    assert (embedding.name, list(embedding.dims), embedding.label_filename) == (
        *("embedding", [32]),
        "",
    )
    sample = np.fromfile(text.path / "warmup" / "text.raw", np.int32).reshape(-1, 77)
    assert sample[0, 0] == 49406
    assert {path.name for path in text.path.iterdir()} == {
        *("1", "Dockerfile", "config.pbtxt", "warmup")
    }
    assert {path.name for path in package.path.iterdir()} == {
        *("1", "Dockerfile", "config.pbtxt", "warmup", "client.py", "bpe_simple_vocab_16e6.txt.gz")
    }
    assert not read_config(package.path).output[0].label_filename


def test_nothing_is_written_twice(package: TritonPackage, towers: Workspace) -> None:
    again = package_triton(towers.graph(EMBEDDER, "fp32"), package.path.parent)
    assert not again.changed
    assert again.text is not None
    assert not again.text.changed


def test_the_client_has_the_tokenizer(package: TritonPackage) -> None:
    client: dict[str, Any] = runpy.run_path(str(package.path / "client.py"))
    found, wanted = client["tokenize"](TEXTS), tokenize(TEXTS)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    assert found.cut == wanted.cut == (3,)
    with pytest.raises(SystemExit, match="contains a token of CLIP's"):
        client["tokenize"](["<|endoftext|>"])


def test_the_client_prints_what_predict_finds(
    package: TritonPackage, towers: Workspace, digits: Path
) -> None:
    assert package.text is not None
    images = sorted(digits.rglob("*.png"))
    with serving(package.path) as (url, seen), serving(package.text.path) as (other, asked):
        done = run(
            package.path / "client.py",
            *images,
            *(word for text in TEXTS[:2] for word in ("--text", text)),
            *("--url", url, "--text-url", other),
        )
    assert done.returncode == 0, done.stderr
    assert (seen, asked) == ([1, 1], [1, 1])
    shown = re.findall(r"^ +([\d.]+) % +(-?[\d.]+)  (.*)$", done.stdout, re.MULTILINE)
    predicted = predict_images(towers, EMBEDDER, images, texts=TEXTS[:2]).images
    guesses = [guess for image in predicted for guess in image.guesses]
    assert [label for _, _, label in shown] == [guess.label for guess in guesses]
    # The texts are from the FP16 graph there, and numbers are rounded.
    wanted = [(guess.percent, guess.cosine) for guess in guesses]
    np.testing.assert_allclose([(float(p), float(c)) for p, c, _ in shown], wanted, atol=0.01)
    assert [label for _, _, label in shown][::2] == list(TEXTS[:2])


def test_texts_are_needed(package: TritonPackage, digits: Path) -> None:
    done = run(package.path / "client.py", *digits.rglob("*.png"))
    assert done.returncode == 2
    assert "pass --text TEXT or --texts FILE" in done.stderr


def test_without_a_text_tower_images_are_compared(copied_towers: Workspace, digits: Path) -> None:
    for path in copied_towers.folder(EMBEDDER).glob("text-*"):
        path.unlink()
    made = package_triton(copied_towers.graph(EMBEDDER, "fp32"), copied_towers.root / "models")
    assert made.text is None
    assert any("export --model" in note and "--text-tower" in note for note in made.notes)
    with serving(made.path) as (url, _):
        done = run(made.path / "client.py", *sorted(digits.rglob("*.png")), "--url", url)
    assert done.returncode == 0, done.stderr
    first, second = re.findall(r"^ +(-?[\d.]+)  /", done.stdout, re.MULTILINE)
    assert first == second
    assert -1 <= float(first) < 0.99


def test_a_name_is_that_of_both(towers: Workspace, tmp_path: Path) -> None:
    made = package_triton(towers.graph(EMBEDDER, "fp16"), tmp_path, TritonConfig("clip"))
    assert made.text is not None
    assert (made.name, made.text.name) == ("clip", "clip-text")
    assert "TEXTS = ('clip-text', 'ids', 'embedding', 'int32', 0)" in (
        (made.path / "client.py").read_text()
    )


def test_a_crafted_name_is_refused(towers: Workspace) -> None:
    image, text = (
        read_passport(towers.graph(EMBEDDER, "fp32", each)) for each in ("image", "text")
    )
    assert client_source("clip", image, TextModel("clip-text", text))
    with pytest.raises(ArtifactError, match="not a valid model name"):
        client_source("clip", image, TextModel("x', 'y", text))


def test_a_text_tower_of_another_clip_is_refused(copied_towers: Workspace, tmp_path: Path) -> None:
    path = copied_towers.graph(EMBEDDER, "fp16", "text")
    restamp(path, put("weights.sha256", "0" * 64))
    with pytest.raises(ArtifactError, match="weights is"):
        package_triton(copied_towers.graph(EMBEDDER, "fp32"), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_no_program_prints_classes_of_embeddings(towers: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gives embeddings, and the C\\+\\+ program prints"):
        package_cpp(towers.graph(EMBEDDER, "fp32"), tmp_path / "program")
    with pytest.raises(ArtifactError, match="takes token ids, not images"):
        package_triton(towers.graph(EMBEDDER, "fp32", "text"), tmp_path / "models")
