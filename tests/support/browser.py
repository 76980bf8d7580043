"""Loads pages in a real browser: screenshots and network requests."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    # Chromium's sandbox fails as root in a container.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    # No request leaves this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
_TIMEOUT = 120
# Requests of the browser itself, for updates and the time, have no initiator.
_BROWSER_ITSELF = "not an origin"


def find_browser() -> str:
    """Return the path of the browser; skip the test if there is none."""
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine: apt-get install chromium fonts-dejavu-core")


def open_page(page: Path, screenshot: Path, width: int, height: int) -> list[str]:
    """Load a page, save a screenshot and return the requested URLs."""
    log = screenshot.with_suffix(".net.json")
    with tempfile.TemporaryDirectory() as profile:
        words = [
            find_browser(),
            *_FLAGS,
            f"--user-data-dir={profile}",
            f"--log-net-log={log}",
            f"--window-size={width},{height}",
            f"--screenshot={screenshot}",
            page.resolve().as_uri(),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    assert screenshot.is_file(), done.stderr
    return requests_of(log)


def requests_of(log: Path) -> list[str]:
    """Return the URLs that a page requested, from Chromium's network log."""
    content = json.loads(log.read_text(encoding="utf-8"))
    start = content["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    started = [event["params"] for event in content["events"] if event["type"] == start]
    jobs = [params for params in started if "url" in params]
    return [params["url"] for params in jobs if params.get("initiator") != _BROWSER_ITSELF]
