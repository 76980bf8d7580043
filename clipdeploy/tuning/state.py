"""Saves the measurements of a search, so that an interrupted search resumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import write_atomic
from clipdeploy.core.passport import read_json, to_json
from clipdeploy.tuning.cost import CostModel
from clipdeploy.tuning.pareto import Evaluation

__all__ = ["SearchState", "load_state", "save_state"]

_SCHEMA = 1


@dataclass
class SearchState:
    """Everything a search has measured.

    ``key``: hash of all inputs that the measurements depend on.  ``costs``: the cost model, if it
    was measured.  ``power``: by scheme, the error power of each product alone.  ``evaluations``: by
    scheme and combination, see :meth:`slot`.  A scheme's name begins with its format.
    """

    key: str
    costs: CostModel | None = None
    power: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    schema: int = _SCHEMA

    @staticmethod
    def slot(scheme: str, quantised: frozenset[str]) -> str:
        """The key of a combination in ``evaluations``."""
        return f"{scheme}: {' '.join(sorted(quantised))}"

    def of(self, scheme: str) -> dict[frozenset[str], Evaluation]:
        """All evaluations of one scheme, by combination."""
        prefix = self.slot(scheme, frozenset())
        return {
            frozenset(slot.removeprefix(prefix).split()): found
            for slot, found in self.evaluations.items()
            if slot.startswith(prefix)
        }


def load_state(path: Path, key: str) -> SearchState:
    """Load the state at ``path``; return a new one if it is missing, damaged or has another key.

    Raises:
        FileError: the file exists and cannot be opened.
    """
    if not path.exists():
        return SearchState(key)
    try:
        found = read_json(path, SearchState, _SCHEMA)
    except ArtifactError:
        return SearchState(key)
    return found if found.key == key else SearchState(key)


def save_state(state: SearchState, path: Path) -> None:
    """Write the state atomically.

    Raises:
        FileError: no permission, or no space.
    """
    write_atomic(path, to_json(state))
