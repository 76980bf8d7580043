"""A recipe file: how an INT8 graph is made, to be made again.

It holds a :class:`calibration.qdq.QuantizeConfig` and says where it came from.  Only the
configuration is used; the weights it was found for are compared, and others are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.qdq import QuantizeConfig
from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import write_atomic
from clipdeploy.core.passport import read_json, to_json
from clipdeploy.core.values import Fault, is_name, unless, unless_lines

__all__ = ["RECIPE_SCHEMA", "QuantizeRecipe", "load_recipe", "save_recipe"]

RECIPE_SCHEMA = 1


@dataclass(frozen=True)
class QuantizeRecipe:
    """``weights`` is the identity of the checkpoint it was found for; ``found`` says how."""

    model: str
    weights: str
    config: QuantizeConfig
    found: dict[str, Any] = field(default_factory=dict)
    schema: int = RECIPE_SCHEMA

    def faults(self) -> Iterator[Fault]:
        """Values that no recipe has; see :mod:`clipdeploy.core.values`."""
        yield from unless(is_name(self.model), "model", self.model, "a model's name")
        yield from unless_lines("weights", self.weights)
        yield from unless_lines("config.exclude", self.config.exclude)

    def check(self, weights: str) -> None:
        """Refuse other weights than those it was found for.

        Raises:
            ArtifactError: they are others.
        """
        if self.weights != weights:
            raise ArtifactError(
                f"the recipe was found for other weights of {self.model}",
                hint="search again for this checkpoint, or pass the options one by one",
            )


def save_recipe(recipe: QuantizeRecipe, path: Path) -> None:
    """Write a recipe.

    Raises:
        FileError: no permission, no space.
    """
    write_atomic(path, to_json(recipe))


def load_recipe(path: Path) -> QuantizeRecipe:
    """Read a recipe.

    Raises:
        FileError: it cannot be opened.
        ArtifactError: it is no recipe, or was written by a newer clipdeploy.
    """
    return read_json(path, QuantizeRecipe, RECIPE_SCHEMA)
