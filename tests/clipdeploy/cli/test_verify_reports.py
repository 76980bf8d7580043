"""``verify --output`` as a user types it; the page in a real browser, the JSON by its schema.

Covers: clipdeploy/stages/report.py.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jsonschema
import numpy as np
import pytest
from browser import open_page
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from pages import read_page
from PIL import Image

from clipdeploy.cli.main import main
from clipdeploy.models import cards
from clipdeploy.verification.reports.drawings import TONES
from clipdeploy.workspace.folder import Workspace

ROOT = Path(__file__).resolve().parents[3]
TEST = cards.demo_file("test.zip")
VERIFY = ("--model", "demo", "--max-drop", "15")
LIMIT = ("--data", str(TEST), "--images", "24")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@dataclass(frozen=True)
class Reported:
    """One run of the command: its workspace, where the reports are, what it printed."""

    artifacts: Path
    folder: Path
    result: Result


@pytest.fixture(scope="module")
def reported(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    folder = tmp_path_factory.mktemp("reports")
    shutil.copytree(demo_workspace.root, folder / "artifacts")
    paths = [folder / f"verdict.{suffix}" for suffix in ("html", "md", "json")]
    reports = [word for path in paths for word in ("--output", path)]
    at = ("--workspace", folder / "artifacts")
    result = run("verify", *VERIFY, *LIMIT, *reports, "--json", *at)
    assert result.exit_code == 0, result.output
    return Reported(folder / "artifacts", folder, result)


def test_every_report_of_one_run(reported: Reported) -> None:
    page = read_page((reported.folder / "verdict.html").read_text(encoding="utf-8"))
    assert page.text.startswith("EQUIVALENT 3 graphs lose no more than 15.00 points")
    for name in ("fp32 graph", "fp16 graph", "int8 graph"):
        assert name in page.text
    assert (reported.folder / "verdict.md").read_text(encoding="utf-8").startswith("# EQUIVALENT\n")
    assert (reported.folder / "verdict.json").read_text(encoding="utf-8") == reported.result.stdout
    assert f"report: {reported.folder / 'verdict.html'}" in reported.result.stderr


def test_the_heat_map_of_a_bisected_graph_is_shown_and_of_no_other(
    reported: Reported, tmp_path: Path
) -> None:
    artifacts, page = tmp_path / "artifacts", tmp_path / "verdict.html"
    shutil.copytree(reported.artifacts, artifacts)
    at = ("--workspace", artifacts)
    found = run("bisect", *at, "--model", "demo", "--data", TEST, "--images", "2", "--batch", "2")
    assert found.exit_code == 0, found.output
    heading = "Where int8.onnx diverges from PyTorch"
    again = run("verify", *VERIFY, *LIMIT, *at, "--output", page)
    assert again.exit_code == 0, again.output
    shown = read_page(page.read_text(encoding="utf-8"))
    assert heading in shown.text
    assert "No block stands out" in shown.text
    # The picture comes from a file: whatever is in it stays a picture.
    kept = artifacts / cards.DEMO / "bisection.json"
    raw = json.loads(kept.read_text(encoding="utf-8"))
    raw["svg"] += "</svg></div><h1>FORGED</h1><style>table { display: none }</style>"
    kept.write_text(json.dumps(raw), encoding="utf-8")
    run("verify", *VERIFY, *LIMIT, *at, "--output", page)
    written = page.read_text(encoding="utf-8")
    assert heading in read_page(written).text
    assert "FORGED" not in written
    quantised = run("quantize", *at, "--model", "demo", "--exclude", "blocks.0.*")
    assert quantised.exit_code == 0, quantised.output
    run("verify", *VERIFY, *LIMIT, *at, "--output", page)
    assert heading not in read_page(page.read_text(encoding="utf-8")).text


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_in_a_browser(width: int, reported: Reported, tmp_path: Path) -> None:
    picture = tmp_path / f"verdict-{width}.png"
    assert open_page(reported.folder / "verdict.html", picture, width, 2600) == []
    shown = pixels(picture)
    assert shown.shape == (2600, width, 3)
    green = np.array([int(TONES["good"][place : place + 2], 16) for place in (1, 3, 5)])
    # The verdict on top, and the interval of each drop further down.
    verdict, rest = shown[:140], shown[400:]
    assert (verdict == green).all(axis=2).sum() > 500
    assert (rest == green).all(axis=2).sum() > 300
    # Nothing sticks out on the right: the margin is as white as the one on the left.
    assert (shown[:, -12:] == 255).all()
    assert (shown[:, :12] == 255).all()


def test_a_request_would_be_seen(reported: Reported, tmp_path: Path) -> None:
    text = (reported.folder / "verdict.html").read_text(encoding="utf-8")
    address = "http://127.0.0.1:9/picture.png"
    leaking = text.replace("</header>", f'<img src="{address}"></header>')
    page = tmp_path / "page.html"
    # The page's own policy stops it; without the policy it goes out, and the log has it.
    page.write_text(leaking, encoding="utf-8")
    assert open_page(page, tmp_path / "one.png", 600, 600) == []
    page.write_text(leaking.replace("http-equiv", "name"), encoding="utf-8")
    assert address in open_page(page, tmp_path / "two.png", 600, 600)


def test_a_page_too_wide_would_be_seen(reported: Reported, tmp_path: Path) -> None:
    text = (reported.folder / "verdict.html").read_text(encoding="utf-8")
    wide = '<div style="width: 900px; height: 20px; background: #000"></div></header>'
    page = tmp_path / "page.html"
    page.write_text(text.replace("</header>", wide), encoding="utf-8")
    open_page(page, tmp_path / "wide.png", 400, 600)
    assert (pixels(tmp_path / "wide.png")[:, -12:] == 0).any()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "verification_schema", ROOT / "scripts" / "verification_schema.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_is_up_to_date(script: ModuleType) -> None:
    kept = (ROOT / "docs" / "verification.schema.json").read_text(encoding="utf-8")
    assert kept == script.text(), "run scripts/verification_schema.py"


def test_the_output_follows_the_schema(script: ModuleType, reported: Reported) -> None:
    jsonschema.Draft202012Validator.check_schema(script.schema())
    validator = jsonschema.Draft202012Validator(script.schema())
    result = json.loads(reported.result.stdout)
    validator.validate(result)
    # The schema covers every field, and a wrong one is found.
    assert result.keys() == script.schema()["$defs"]["Verification"]["properties"].keys()
    result["rows"][0]["verdict"] = "fine"
    assert not validator.is_valid(result)
    result["rows"][0]["verdict"] = "equivalent"
    del result["rows"][0]["drop"]["p_value"]
    assert not validator.is_valid(result)


def test_every_field_is_documented(script: ModuleType) -> None:
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    for part in script.schema()["$defs"].values():
        for field in part["properties"]:
            assert f"`{field}`" in text, field


def test_bad_reports_are_refused_before_the_work(reported: Reported, tmp_path: Path) -> None:
    at = ("--workspace", reported.artifacts, "--model", "demo")
    # The data does not exist: had the work begun, that would be the error.
    run_it = ("verify", "--data", tmp_path / "none", *at)
    for command in (run_it, ("verify", "merge", *at)):
        result = run(*command, "--output", tmp_path / "a.html", "--output", "b.pdf")
        assert result.exit_code == 2, result.output
        assert "b.pdf is not a report" in result.stderr
        assert ".html, .md or .json" in result.stderr
    (tmp_path / "file").write_text("in the way")
    result = run(*run_it, "--output", tmp_path / "file" / "a.html")
    assert result.exit_code == 1
    assert f"cannot write {tmp_path / 'file' / 'a.html'}" in result.stderr
    shard = run(*run_it, "--shard", "1/2", "--output", tmp_path / "a.html")
    assert shard.exit_code == 2
    assert "a shard has no verdict to report" in shard.stderr


def test_merged_shards_with_and_without_the_images(reported: Reported, tmp_path: Path) -> None:
    images = tmp_path / "digits.zip"
    shutil.copy(TEST, images)
    at = ("--workspace", reported.artifacts)
    for shard in ("1/2", "2/2"):
        part = ("--data", images, "--images", "24", "--shard", shard)
        assert run("verify", "--model", "demo", *part, *at).exit_code == 0
    page = tmp_path / "page.html"
    folder = reported.artifacts / cards.DEMO
    shards = {path: path.read_bytes() for path in folder.glob("verification.*-of-2.jsonl")}

    def merge(*more: str | Path) -> Result:
        # A merge uses its shards up.
        for path, data in shards.items():
            path.write_bytes(data)
        return run("verify", "merge", *VERIFY, *at, "--output", page, *more)

    assert merge().exit_code == 0
    whole = page.read_bytes()
    assert len(read_page(whole.decode()).images) == 6
    images.rename(tmp_path / "elsewhere.zip")
    assert merge().exit_code == 0
    without = read_page(page.read_text(encoding="utf-8"))
    assert without.images == []
    assert f"Not shown: the images, because {images} does not exist" in without.text
    assert "the images were not compared with the records" in without.text
    assert merge("--data", tmp_path / "elsewhere.zip").exit_code == 0
    assert page.read_bytes() == whole
