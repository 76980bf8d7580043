"""Searches mixed precision for models that lose accuracy in plain INT8.

    python scripts/bench/search.py [--variants FOLDER] [--max-drop 6]

The models are the demo model and its variants with activation outliers
(``scripts/make_outlier_variants.py``; about a minute, --variants takes a folder that it wrote),
quantised with min-max and without smoothing.  Half of the 500 held-out digits are used for the
search, the other half for confirmation.  Prints for each model: points of top-1 lost with all
Linears in INT8, on the digits of the search; share of the MACs that the choice keeps in INT8; its
cost relative to FP16, with MACs in INT8 counted half; the interval of its drop on the digits of the
confirmation; the verdict.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from outliers import make_variants

from calibration.scheme import SchemeConfig
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    SearchConfig,
    SearchResult,
    Workspace,
    calibrate_model,
    export_model,
    search_model,
)

SCHEME = SchemeConfig("minmax", False, False, False, False)


def row(name: str, found: SearchResult, seconds: float) -> str:
    """A row of the table."""
    twin = next(point for point in found.points if "all INT8" in point.label)
    low, high = found.confirm.interval.low, found.confirm.interval.high
    return (
        f"{name:10}{twin.drop:10.2f}{100 * found.chosen.quantised_macs:8.0f} %"
        f"{found.chosen.cost:8.3f}"
        f"{low:9.2f} to {high:5.2f}  {found.confirm.verdict:12}{found.evaluations:5}{seconds:7.0f}"
    )


def main() -> None:
    """Create the variants, search each and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=Path)
    parser.add_argument("--max-drop", type=float, default=6.0, help="250 digits tell 4 from none")
    chosen = parser.parse_args()
    # The demo is too small to be faster in INT8 on a GPU, so the cost is the count of MACs.
    config = SearchConfig(
        max_drop=chosen.max_drop, batch=125, cost="macs", scheme=SCHEME, fixed_scheme=True
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.variants or Path(temporary, "variants")
        if chosen.variants is None:
            make_variants(folder)
        files = {"demo": None, **{path.stem: path for path in sorted(folder.glob("*.safetensors"))}}
        print(
            f"{'':10}{'all INT8':>10}{'MACs':>10}{'cost':>8}{'confirmed drop':>18}  "
            f"{'':12}{'runs':>5}{'s':>7}"
        )
        for name, file in files.items():
            workspace = Workspace(Path(temporary, name))
            export_model(workspace, cards.DEMO, WeightsChoice(file))
            calibrate_model(workspace, cards.DEMO, cards.demo_file("calibration.zip"))
            started = time.perf_counter()
            found = search_model(workspace, cards.DEMO, cards.demo_file("test.zip"), config)
            print(row(name, found, time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
