"""Write docs/images/report.png, a screenshot of the report of ``clipdeploy demo``.

    python scripts/report_picture.py [FILE]

Requires Chromium, see scripts/system_packages.sh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from clipdeploy.models import cards
from clipdeploy.pipeline import (
    VerifyScope,
    Workspace,
    calibrate_model,
    convert_model,
    export_model,
    quantize_model,
    verify_model,
    write_reports,
)

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "docs" / "images" / "report.png"
# A relative path, as the user of a clone would pass it, because the report shows it.
TEST = Path("clipdeploy/data/demo/test.zip")
WIDTH, HEIGHT = 1100, 1350
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
COLOURS = 64


def write_report(folder: Path) -> Path:
    """Run every stage on the demo card and write the report."""
    workspace = Workspace(folder)
    export_model(workspace, cards.DEMO)
    convert_model(workspace, cards.DEMO)
    calibrate_model(workspace, cards.DEMO, cards.demo_file("calibration.zip"))
    quantize_model(workspace, cards.DEMO)
    found = verify_model(workspace, cards.DEMO, TEST, scope=VerifyScope(graphs_only=True))
    report = folder / "report.html"
    write_reports(found, [report])
    return report


def photograph(page: Path, picture: Path) -> None:
    """Render the top of the page with a browser, in few colours."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit("no Chromium: apt-get install chromium fonts-dejavu-core")
    raw = page.with_suffix(".png")
    size = (f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={raw}")
    subprocess.run([browser, *FLAGS, *size, page.as_uri()], check=True, capture_output=True)
    with Image.open(raw) as shot:
        few = shot.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(picture, optimize=True)


def main() -> None:
    """Run the stages and write the screenshot."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else DEFAULT).resolve()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as temporary:
        photograph(write_report(Path(temporary)), target)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
