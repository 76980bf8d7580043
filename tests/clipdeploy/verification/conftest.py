"""Made-up results to judge; no model is run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from made_results import make_results, record

from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.results import Results

MakeResults = Callable[..., Results]


@pytest.fixture(scope="session")
def made() -> MakeResults:
    """``made(records, **changes of the run key)``."""
    return make_results


@pytest.fixture(scope="session")
def one() -> Callable[..., ImageRecord]:
    """``one(number, reference=True, artifacts=(True,), finite=True, labelled=True)``."""
    return record
