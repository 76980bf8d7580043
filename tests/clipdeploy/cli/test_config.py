"""``clipdeploy config``, and the pipeline when everything but the model stands in a file."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from demo_workspaces import few_digits

from clipdeploy.cli.config import template
from clipdeploy.cli.main import main
from clipdeploy.cli.settings import CONFIG_FILE, SETTINGS, load_settings
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

pytestmark = pytest.mark.usefixtures("cwd")

CALIBRATION = str(cards.demo_file("calibration.zip"))
TEST = str(cards.demo_file("test.zip"))


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def write(*lines: str) -> None:
    Path(CONFIG_FILE).write_text("\n".join(lines), encoding="utf-8")


def rows(shown: str) -> dict[str, tuple[str, str]]:
    """Value and origin of each setting; no value here has two spaces in it."""
    lines = [line.split("  ") for line in shown.split("\n\n")[0].splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {name: (value, origin) for name, value, origin in cells}


def test_each_value_and_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    write("max_drop = 0.5", 'workspace = "out"', "cache_crops = true")
    monkeypatch.setenv("CLIPDEPLOY_MAX_DROP", "0.25")
    result = run("config")
    assert result.exit_code == 0, result.output
    shown = rows(result.stdout)
    assert list(shown) == ["setting", *(setting.name for setting in SETTINGS)]
    assert shown["max_drop"] == ("0.25", "CLIPDEPLOY_MAX_DROP")
    assert shown["workspace"] == ("out", CONFIG_FILE)
    assert shown["cache_crops"] == ("true", CONFIG_FILE)
    assert shown["backend"] == ("auto", "default")
    assert shown["model"] == ("the workspace's last one", "default")


def test_the_command_line_outranks_here_too() -> None:
    write('workspace = "out"')
    assert rows(run("config", "--workspace", "here").stdout)["workspace"] == (
        "here",
        "command line",
    )


def test_json_has_values_of_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    write("max_drop = 1", 'val_data = "val"')
    monkeypatch.setenv("CLIPDEPLOY_OFFLINE", "1")
    read = json.loads(run("config", "--json").stdout)
    assert read["file"] == CONFIG_FILE
    by_name = {row.pop("name"): row for row in read["settings"]}
    assert by_name["max_drop"] == {
        "value": 1.0,
        "source": "file",
        "origin": CONFIG_FILE,
        "variable": "CLIPDEPLOY_MAX_DROP",
    }
    assert by_name["offline"]["value"] is True
    assert by_name["offline"]["source"] == "environment"
    assert by_name["val_data"]["value"] == "val"
    assert by_name["model"]["value"] is None
    assert by_name["model"]["source"] == "default"


def test_without_a_file_it_says_how_to_get_one() -> None:
    result = run("config")
    assert "no clipdeploy.toml here; `clipdeploy config --init` writes one" in result.stdout
    write("")
    assert "--init" not in run("config").stdout


def test_what_is_most_likely_not_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    write('val_data = "gone"', 'calibration_data = "."')
    monkeypatch.setenv("CLIPDEPLOY_WORKSPCE", "x")
    result = run("config")
    assert result.exit_code == 0
    assert "val_data: gone does not exist (clipdeploy.toml)" in result.stderr
    assert "calibration_data" not in result.stderr
    assert "CLIPDEPLOY_WORKSPCE is not a setting (nearest: CLIPDEPLOY_WORKSPACE)" in result.stderr
    assert run("config", "--quiet").stderr == ""


def test_init_writes_a_template_and_never_overwrites(cwd: Path) -> None:
    result = run("config", "--init")
    assert result.exit_code == 0, result.output
    assert Path(CONFIG_FILE).read_text(encoding="utf-8") == template()
    assert load_settings().given == {}
    write("max_drop = 0.5")
    again = run("config", "--init")
    assert again.exit_code == 2
    assert "clipdeploy.toml exists already" in again.stderr
    assert Path(CONFIG_FILE).read_text(encoding="utf-8") == "max_drop = 0.5"
    assert [path.name for path in cwd.iterdir()] == [CONFIG_FILE]


def test_every_line_of_the_template_can_be_uncommented() -> None:
    lines = template().splitlines()
    Path("cards.csv").touch()
    write(*(line.removeprefix("#") if not line.startswith("# ") else line for line in lines))
    assert list(load_settings().given) == [setting.name for setting in SETTINGS]
    assert tomllib.loads(template()) == {}
    for setting in SETTINGS:
        assert setting.variable in template()


def test_a_model_of_the_settings_contradicts_no_file(
    demo_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDEPLOY_MODEL", "demo")
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    words = ("benchmark", graph, "--batch", "1", "--rounds", "1", "--warmup", "0")
    assert run(*words).exit_code == 0
    assert "leave out --model" in run(*words, "--model", "demo").stderr


def test_a_verdict_says_which_settings_it_rests_on(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(demo_workspace.root, tmp_path / "copy")
    write(f'workspace = "{tmp_path / "copy"}"', f'val_data = "{TEST}"', "max_drop = 30")
    words = ("verify", "--model", "demo", "--images", "20", "--json")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["max_drop"] == 30
    line_of_settings = next(
        line for line in result.stderr.splitlines() if line.startswith("settings: ")
    )
    assert f"--data {TEST} (clipdeploy.toml), --max-drop 30.0 (clipdeploy.toml)" in line_of_settings
    typed = run(*words, "--max-drop", "20", "--data", CALIBRATION, "--allow-leak")
    assert json.loads(typed.stdout)["max_drop"] == 20
    assert "--max-drop" not in typed.stderr


def calibrated_on(artifacts: Path) -> list[str]:
    table = json.loads((artifacts / cards.DEMO / "calibration.json").read_text())
    return sorted(image["sha256"] for image in table["images"])


def test_a_setting_fills_a_gap_and_replaces_no_calibration(cwd: Path, artifacts: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    few_digits(cwd / "digits.zip", 3, "calibration.zip")
    build = ("build-engine", "--int8", "--range", "minmax")
    without = run(*build, "--model", "demo")
    assert without.exit_code == 2
    for way in ("has not been calibrated", "--data", "CLIPDEPLOY_CALIBRATION_DATA", CONFIG_FILE):
        assert way in without.stderr
    write('model = "demo"', 'calibration_data = "digits.zip"', 'backend = "tensorrt-rtx"')
    built = run(*build)
    assert built.exit_code == 0, built.output
    assert "calibration_data: digits.zip (clipdeploy.toml)" in built.stderr
    assert "settings: --backend tensorrt-rtx (clipdeploy.toml)" in built.stderr
    first = calibrated_on(artifacts)
    assert len(first) == 30
    few_digits(cwd / "others.zip", 3)
    write('model = "demo"', 'calibration_data = "others.zip"')
    kept = run(*build)
    assert kept.exit_code == 0, kept.output
    assert "calibration_data" not in kept.stderr
    assert "others.zip" not in kept.stderr
    assert calibrated_on(artifacts) == first
    assert run(*build, "--images", "10").exit_code == 0
    assert len(calibrated_on(artifacts)) == 10
    assert not set(calibrated_on(artifacts)) & set(first)


def test_calibrate_takes_the_setting_and_merge_ignores_it(cwd: Path, artifacts: Path) -> None:
    write(f'calibration_data = "{CALIBRATION}"')
    shard = run("calibrate", "--shard", "1/1", "--images", "20", "--model", "demo")
    assert shard.exit_code == 0, shard.output
    assert f"settings: --data {CALIBRATION} (clipdeploy.toml)" in shard.stderr
    merged = run("calibrate", "merge", "--model", "demo")
    assert merged.exit_code == 0, merged.output
    assert "settings:" not in merged.stderr
    assert artifacts == cwd / "artifacts"


@pytest.mark.parametrize("words", [("config",), ("config", "--json")])
def test_a_mirrors_secrets_are_not_shown(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDEPLOY_MIRROR", "https://ann:s3cret@host/clip?token=s3cret")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "https://***@host/clip?***" in result.stdout
    assert "s3cret" not in result.output
    monkeypatch.setenv("CLIPDEPLOY_MIRROR", "ann:s3cret@host")
    result = run(*words)
    assert result.exit_code == 2
    assert '"***@host" is not an address' in result.stderr
    assert "s3cret" not in result.output
    monkeypatch.delenv("CLIPDEPLOY_MIRROR")
    for line in ('mirror = "ann:s3cret@host"', 'mirror = "https://ann:s3cret@host/"'):
        write(line)
        assert "s3cret" not in run(*words).output
