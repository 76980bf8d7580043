"""Write tests/support/surface: the public API, the options and the JSON fields, one a line.

    python scripts/public_surface.py [FOLDER]

What users depend on changes only on purpose: ``tests/test_public_surface.py`` fails until the
change is written here as well.  The fields are those that the commands print on the demo model;
TensorRT-RTX has to be installed for those of engines.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from api_surface import python_api
from cli_surface import command_line
from command_server import command_server
from demo_workspaces import TENSORRT, complete_workspace, graph_workspace
from json_surface import JSON_CASES, json_fields

from clipdeploy import pipeline
from clipdeploy.cli.main import main

SNAPSHOTS = Path(__file__).resolve().parents[1] / "tests" / "support" / "surface"
API, CLI, FIELDS = (f"{name}.json" for name in ("python_api", "cli", "json_fields"))


def text(surface: object) -> str:
    """As it is in a file."""
    return json.dumps(surface, indent=1, ensure_ascii=False) + "\n"


def api_text() -> str:
    """The names of ``clipdeploy.pipeline``."""
    return text(python_api(pipeline))


def cli_text() -> str:
    """The commands, their options, and the exit codes."""
    return text(command_line(main))


def fields_text() -> str:
    """The fields of every command's ``--json``; it runs all of them, which takes minutes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = complete_workspace(graph_workspace(folder / "graphs"), folder / "made")
        with command_server() as server:
            fields = json_fields(server, made, folder)
            return text({command: fields(command) for command in sorted(JSON_CASES)})


if __name__ == "__main__":
    if not TENSORRT:
        sys.exit("tensorrt_rtx is not installed: the fields of engines would be missing")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else SNAPSHOTS
    target.mkdir(parents=True, exist_ok=True)
    for file, made in ((API, api_text), (CLI, cli_text), (FIELDS, fields_text)):
        (target / file).write_text(made(), encoding="utf-8")
