from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.config import QuantizeConfig
from calibration.recipe import QuantizeRecipe, load_recipe, save_recipe
from calibration.scheme import SchemeConfig
from clipdeploy.core.errors import ArtifactError

CONFIG = QuantizeConfig(("head",), "fp32", SchemeConfig("mse", strength=0.5), min_sqnr=None)
RECIPE = QuantizeRecipe("clip-vit-demo", "ab" * 32, CONFIG, {"seed": 1})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_recipe(RECIPE, tmp_path / "recipe.json")
    return tmp_path / "recipe.json"


def test_a_recipe_loads_as_it_was_saved(path: Path) -> None:
    assert load_recipe(path) == RECIPE


def test_the_scheme_is_stored_under_the_key_of_earlier_versions(path: Path) -> None:
    stored = json.loads(path.read_text())
    assert list(stored) == ["model", "weights", "config", "found", "schema"]
    assert list(stored["config"]) == [
        *("exclude", "remainder", "plan", "scope", "min_sqnr", "weight_scales")
    ]
    assert stored["config"]["plan"]["range_method"] == "mse"


@pytest.mark.parametrize("text", ["[]", "{", '{"config": 1}', '{"config": {"plan": "mse"}}'])
def test_other_json_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"recipe\.json cannot be read"):
        load_recipe(path)


def test_other_weights_are_refused() -> None:
    RECIPE.check("ab" * 32)
    with pytest.raises(ArtifactError, match="other weights"):
        RECIPE.check("cd" * 32)
