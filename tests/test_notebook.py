"""docs/notebook.ipynb runs from top to bottom, and shows its results as tables and pictures."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebook.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_kept_without_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 10
    assert not [cell for cell in code if cell.outputs or cell.execution_count is not None]


def last_result(cell: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """What the cell's last line shows, by MIME type; pictures are shown like it."""
    shown = [one.data for one in cell.outputs if "data" in one]
    return shown[-1] if shown else None


@pytest.mark.slow
def test_every_cell_runs_and_shows_its_result(tmp_path: Path) -> None:
    notebook = read()
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    code = {cell.source: cell for cell in notebook.cells if cell.cell_type == "code"}
    for source, cell in code.items():
        printed = [one for one in cell.outputs if one.output_type in ("stream", "error")]
        assert printed == [], source
        line = source.splitlines()[-1]
        shown = last_result(cell)
        if re.fullmatch(r"[a-z]+", line):
            assert shown is not None
            html = shown["text/html"]
            assert html.count("<tr") >= 2, source
            assert html.count("<table") == html.count("</table>") > 0
        elif line.startswith("draw_"):
            assert shown is not None
            assert len(shown["image/png"]) > 10_000
    assert (tmp_path / "verdict.html").is_file()


BARS = """
import clipdeploy
with clipdeploy.ProgressBars().task("load images", 3) as advance:
    advance(3)
"""
HIDDEN = "import sys; sys.modules['ipywidgets'] = None"


def test_progress_is_a_bar_with_ipywidgets_and_a_line_without() -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (BARS, HIDDEN + BARS)]
    NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120).execute()
    for cell, kind in zip(cells, ("widget-view", "text/plain"), strict=True):
        shown = [one.data for one in cell.outputs]
        assert any(kind in name for name in shown[0])
        lines = any("load images ..." in data.get("text/plain", "") for data in shown)
        assert lines == (cell is cells[1])
