"""Reads and writes recipe files, which hold the configuration of an INT8 graph.

A recipe holds a :class:`calibration.config.QuantizeConfig` and its origin.  It applies only to the
weights for which a search found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.config import SCHEME_KEY, QuantizeConfig, stored_settings
from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import read_regular, write_atomic
from clipdeploy.core.passport import from_json, settings_of, to_json
from clipdeploy.core.values import Fault, is_name, unless, unless_lines

__all__ = ["RECIPE_SCHEMA", "QuantizeRecipe", "load_recipe", "save_recipe"]

RECIPE_SCHEMA = 1


@dataclass(frozen=True)
class QuantizeRecipe:
    """``weights``: identity of the checkpoint it applies to.  ``found``: settings of the search."""

    model: str
    weights: str
    config: QuantizeConfig
    found: dict[str, Any] = field(default_factory=dict)
    schema: int = RECIPE_SCHEMA

    def faults(self) -> Iterator[Fault]:
        """Invalid values; see :mod:`clipdeploy.core.values`."""
        yield from unless(is_name(self.model), "model", self.model, "a model's name")
        yield from unless_lines("weights", self.weights)
        yield from unless_lines("config.exclude", self.config.exclude)

    def check(self, weights: str) -> None:
        """Check that the recipe applies to ``weights``.

        Raises:
            ArtifactError: it was found for other weights.
        """
        if self.weights != weights:
            raise ArtifactError(
                f"the recipe was found for other weights of {self.model}",
                hint="search again for this checkpoint, or give the options one by one",
            )


def save_recipe(recipe: QuantizeRecipe, path: Path) -> None:
    """Write a recipe; ``config.scheme`` is stored as ``plan``, see :func:`stored_settings`.

    Raises:
        FileError: no permission, or no space.
    """
    stored = {**settings_of(recipe), "config": stored_settings(recipe.config)}
    write_atomic(path, to_json(stored))


def load_recipe(path: Path) -> QuantizeRecipe:
    """Read a recipe.

    Raises:
        FileError: the file cannot be opened.
        ArtifactError: it is not a recipe, or a newer clipdeploy wrote it.
    """
    data = read_regular(path)
    return from_json(data, QuantizeRecipe, str(path), RECIPE_SCHEMA, prepare=_with_field_names)


def _with_field_names(raw: Any) -> Any:
    """Rename the stored key ``config.plan`` to the field name ``config.scheme``."""
    if not isinstance(raw, dict) or not isinstance(raw.get("config"), dict):
        return raw
    config = {"scheme" if k == SCHEME_KEY else k: v for k, v in raw["config"].items()}
    return {**raw, "config": config}
