"""No command makes an INT8 graph of broken quality without saying so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from demo_variants import write_digits
from numpy.typing import NDArray
from PIL import Image

from clipdeploy.cli.main import main
from clipdeploy.models import cards

Pixels = NDArray[np.uint8]


def _run(artifacts: Path, command: str, *words: str | Path) -> Result:
    at = ("--model", "demo", "--workspace", str(artifacts))
    return CliRunner().invoke(main, [command, *at, *map(str, words)])


def _table(artifacts: Path) -> Path:
    return artifacts / cards.DEMO / "calibration.json"


def _repeated(folder: Path, picture: Pixels, count: int = 40) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


SHADES = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (np.zeros((8, 8), np.uint8), "40 of 40 images have a single colour, grey level 0"),
        (np.full((8, 8), 255, np.uint8), "40 of 40 images have a single colour, grey level 255"),
        (SHADES, "all 40 images are the same picture"),
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "build-engine"])
def test_images_that_show_nothing_are_refused(
    command: str, picture: Pixels, reason: str, artifacts: Path, tmp_path: Path
) -> None:
    data = _repeated(tmp_path / "images", picture)
    words = ("--int8",) if command == "build-engine" else ()
    result = _run(artifacts, command, "--data", data, *words)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert not _table(artifacts).exists()
    assert not list((artifacts / cards.DEMO).glob("*.partial"))


def _quantized(artifacts: Path) -> Path:
    return artifacts / cards.DEMO / "int8.onnx"


@pytest.mark.parametrize(
    "change", [lambda grey: grey // 8, lambda grey: 255 - grey // 16], ids=["dim", "bright"]
)
def test_dim_images_are_named_and_their_graph_is_refused(
    change: Callable[[Pixels], Pixels], artifacts: Path, tmp_path: Path
) -> None:
    data = write_digits(tmp_path / "digits", change, 40)
    calibrated = _run(artifacts, "calibrate", "--data", data)
    assert calibrated.exit_code == 0
    assert "the images are dim or flat" in calibrated.stderr
    result = _run(artifacts, "quantize")
    assert result.exit_code == 1
    assert "the calibration images are dim or flat" in result.stderr
    assert not _quantized(artifacts).exists()
    accepted = _run(artifacts, "quantize", "--min-sqnr", "-20")
    assert accepted.exit_code == 0
    assert _quantized(artifacts).exists()


def test_the_figure_is_in_every_form_of_the_result(artifacts: Path, digits: Path) -> None:
    calibrated = _run(artifacts, "calibrate", "--data", digits)
    assert calibrated.exit_code == 0
    assert "dim or flat" not in calibrated.stderr
    first = _run(artifacts, "quantize", "--json")
    assert first.exit_code == 0
    quality = json.loads(first.stdout)["quality"]
    assert (quality["images"], quality["warnings"]) == (8, [])
    assert 35 < quality["sqnr_db"] < 50
    assert quality["weakest"]["name"].startswith("blocks.")
    # An unchanged graph knows its figure.
    again = _run(artifacts, "quantize", "--json")
    assert json.loads(again.stdout)["quality"] == quality
    line = f"logits: SQNR {quality['sqnr_db']:.1f} dB on 8 calibration images"
    assert line in _run(artifacts, "quantize").stdout


def test_a_graph_little_above_the_minimum_is_made_with_a_warning(
    artifacts: Path, digits: Path
) -> None:
    assert _run(artifacts, "calibrate", "--data", digits).exit_code == 0
    result = _run(artifacts, "quantize", "--min-sqnr", "33")
    assert result.exit_code == 0
    assert "little above the minimum of 33 dB; the weakest Linear is blocks." in result.stderr
    refused = _run(artifacts, "quantize", "--min-sqnr", "70")
    assert refused.exit_code == 1
    assert "below 70 dB" in refused.stderr


@pytest.mark.parametrize("minimum", ["nan", "inf"])
def test_a_minimum_that_is_no_number_is_a_usage_error(
    minimum: str, artifacts: Path, digits: Path
) -> None:
    result = _run(artifacts, "quantize", "--min-sqnr", minimum)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
