"""Install a wheel with the newest version of every dependency, run the demo, and print a table row.

    python -m build
    python scripts/support_table.py dist/*.whl python3.11 python3.12

For x86-64 Linux.  Each interpreter gets a virtual environment in a temporary folder.  The rows are
those of the table in docs/getting-started.md.  The exit code is 1 if an installation or a demo
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Titles of the columns, with the distribution whose version is shown.
COLUMNS = {
    "PyTorch": "torch",
    "NumPy": "numpy",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "ONNX Runtime": "onnxruntime-gpu",
    "TensorRT-RTX": "tensorrt-rtx",
}
_VERSIONS = (
    "import importlib.metadata as m, json, platform, sys;"
    "print(json.dumps([platform.python_version(), *map(m.version, sys.argv[1:])]))"
)


def header() -> list[str]:
    """The table's first two lines."""
    titles = ["Python", *COLUMNS, "`clipdeploy demo`"]
    return [row(titles), row(["---"] * len(titles))]


def row(cells: list[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A program in ``folder``, where no source of the project can be imported."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )


def measure(python: str, wheel: Path, torch: str, folder: Path) -> list[str]:
    """The cells of one interpreter.

    Raises:
        subprocess.CalledProcessError: the installation or the demo failed.
    """
    run([python, "-m", "venv", "venv"], folder)
    own = str(folder / "venv" / "bin" / "python")
    # PyTorch first: its build for this machine may be another one than the newest.
    for requirement in (torch, str(wheel)):
        run([own, "-m", "pip", "install", "--quiet", requirement], folder)
    found = json.loads(run([own, "-c", _VERSIONS, *COLUMNS.values()], folder).stdout)
    run([str(folder / "venv" / "bin" / "clipdeploy"), "demo"], folder)
    return [*found, "exit code 0"]


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--torch", default="torch", help="requirement, such as torch==2.13.0")
    options = parser.parse_args()
    print("\n".join(header()), flush=True)
    failed = False
    for python in options.pythons:
        with tempfile.TemporaryDirectory() as folder:
            try:
                cells = measure(python, options.wheel.resolve(), options.torch, Path(folder))
                print(row(cells), flush=True)
            except subprocess.CalledProcessError as error:
                failed = True
                print(f"{python}: {error}\n{error.stdout}{error.stderr}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
