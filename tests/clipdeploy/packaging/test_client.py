"""Tests the Python client: its preprocessing bit for bit, and with a server."""

from __future__ import annotations

import io
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from triton_server import serving

from clipdeploy.core.passport import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.imaging.preprocess import crop_image, decode
from clipdeploy.models import cards
from clipdeploy.packaging.client import client_source
from clipdeploy.pipeline import package_triton
from exporters.headers import read_passport
from exporters.samples import Samples
from exporters.session import OnnxSession

Graphs = dict[str, Path]


def _noise(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (height, width), np.uint16))
    return rgb.convert(mode)


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def _file(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


FILES = {
    "wide": _file(_noise("RGB", 335, 250), "PNG"),
    "tall": _file(_noise("RGB", 61, 97), "JPEG"),
    "exact": _file(_noise("RGB", 32, 32), "PNG"),
    "small": _file(_noise("RGB", 9, 5), "PNG"),
    "grey": _file(_noise("L", 50, 40), "PNG"),
    "alpha": _file(_noise("RGBA", 40, 50), "PNG"),
    "palette": _file(_noise("P", 40, 41), "PNG"),
    "cmyk": _file(_noise("CMYK", 64, 50), "JPEG"),
    "sixteen bits": _file(_noise("I;16", 44, 55), "PNG"),
    "turned": _turned(_noise("RGB", 90, 45)),
}
BASE = Preprocess(32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SPECS = {
    "published": BASE,
    "timm centre": replace(BASE, crop_pct=0.9, exif_orientation=False),
    "timm squash": replace(BASE, crop_pct=0.95, crop_mode="squash", exif_orientation=False),
    "bilinear": replace(BASE, interpolation="bilinear"),
    "as shipped": replace(BASE, mean=IMAGENET_MEAN, std=IMAGENET_STD),
}


def prepared_by_client(source: str, folder: Path, data: bytes) -> NDArray[Any]:
    """Preprocess an image file with the text of a client."""
    (folder / "client.py").write_text(source, encoding="utf-8")
    (folder / "image").write_bytes(data)
    prepare: Callable[[str], NDArray[Any]] = runpy.run_path(str(folder / "client.py"))["prepare"]
    return prepare(str(folder / "image"))


@pytest.mark.parametrize("recipe", SPECS)
@pytest.mark.parametrize("kind", ["fp32", "half", "uint8"])
def test_images_are_prepared_bit_for_bit_as_clipdeploy_does(
    kind: str, recipe: str, graphs: Graphs, tmp_path: Path
) -> None:
    spec = SPECS[recipe]
    passport = replace(read_passport(graphs[kind]), preprocess=spec)
    source = client_source("digits", passport)
    for name, data in FILES.items():
        crop = crop_image(decode(data, name, exif_orientation=spec.exif_orientation), spec)
        [wanted] = Samples(crop[None], spec).as_input(passport.input)
        found = prepared_by_client(source, tmp_path, data)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes(), name


def test_a_client_with_other_constants_differs(graphs: Graphs, tmp_path: Path) -> None:
    passport = read_passport(graphs["fp32"])
    source = client_source("digits", passport)
    right = prepared_by_client(source, tmp_path, FILES["wide"])
    for old, new in (
        ("0.48145466", "0.48145566"),
        ("bicubic", "bilinear"),
        ("tion=True", "tion=False"),
    ):
        assert old in source
        wrong = prepared_by_client(source.replace(old, new), tmp_path, FILES["turned"])
        assert wrong.tobytes() != prepared_by_client(source, tmp_path, FILES["turned"]).tobytes()
    assert right.shape == (3, 32, 32)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five held-out digits as files."""
    folder = tmp_path_factory.mktemp("digits")
    crops = iter_crops(select(open_images(cards.demo_file("test.zip")), 5, seed=3), BASE)
    paths = [folder / f"{index}.png" for index in range(5)]
    for path, crop in zip(paths, crops, strict=True):
        Image.fromarray(crop.pixels).save(path)
    return paths


def run_client(client: Path, url: str, *images: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(client), *map(str, images), "--url", url]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("kind", "batches"), [("fp16", [1, 1, 1, 1, 1]), ("uint8", [1] * 5), ("batch 4", [4, 4])]
)
def test_the_client_prints_the_five_most_likely_classes(
    kind: str, batches: list[int], graphs: Graphs, digits: list[Path], tmp_path: Path
) -> None:
    made = package_triton(graphs[kind], tmp_path)
    with serving(made.path) as (url, seen):
        done = run_client(made.path / "client.py", url, *digits)
    assert done.returncode == 0, done.stderr
    assert seen == batches
    passport = read_passport(graphs[kind])
    crops = np.stack([np.asarray(Image.open(path)) for path in digits])
    images = Samples(crops, passport.preprocess)
    session = OnnxSession(graphs[kind])
    count = 4 if kind == "batch 4" else 1
    printed_guesses = re.findall(r"^  +([\d.]+) %  (\d)$", done.stdout, re.MULTILINE)
    assert len(printed_guesses) == 5 * 5
    for index in range(5):
        part = Samples(images.crops[[index] * count], images.spec).as_input(passport.input)
        logits = session.run(part)[0][0].astype(np.float64)
        likely = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = np.argsort(-likely, kind="stable")[:5]
        rows = printed_guesses[5 * index : 5 * index + 5]
        assert [int(label) for _, label in rows] == best.tolist()
        # Two decimals are printed.
        np.testing.assert_allclose([float(p) for p, _ in rows], 100 * likely[best], atol=0.011)


def test_a_server_with_another_model_refuses_the_client(
    graphs: Graphs, digits: list[Path], tmp_path: Path
) -> None:
    made = package_triton(graphs["fp32"], tmp_path)
    other = package_triton(graphs["uint8"], tmp_path / "other")
    with serving(made.path) as (url, seen):
        done = run_client(other.path / "client.py", url, digits[0])
    assert done.returncode != 0
    assert "unexpected request" in done.stderr
    assert seen == []
