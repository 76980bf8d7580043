"""Tables with the longest names and figures there are: nothing is lost at 80 columns.

Covers: clipdeploy/cli/text.py, clipdeploy/tuning/tables.py.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from calibration.scheme import SchemeConfig
from clipdeploy.cli.text import show, wrapped
from clipdeploy.models import cards
from clipdeploy.tuning.bisection import BlockError, Measurement, PartError
from clipdeploy.tuning.cost import CostModel
from clipdeploy.tuning.culprit import Culprit
from clipdeploy.tuning.linears import LinearFacts
from clipdeploy.tuning.pareto import Candidate, Evaluation
from clipdeploy.tuning.result import Bisection, bisection_table
from clipdeploy.tuning.search import SearchResult, search_table
from clipdeploy.verification.baseline import Baseline
from clipdeploy.verification.metrics import Accuracy, Fidelity
from clipdeploy.verification.paired import judge_drop
from clipdeploy.verification.result import Row, Verification, verification_table
from exporters.metrics import BROKEN_DB

LONGEST = max((card.name for card in cards.all_cards()), key=len)
DEPTH = 12
ACCURACY = Accuracy(100.0, 100.0, (99.9, 100.0), (99.9, 100.0))
FIDELITY = Fidelity(50_000, 1.5e-10, 1e-11, -0.99999, 130.6, 100.0, True, ACCURACY)


def rendered(shown: RenderableType, columns: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=columns).print(shown)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def whole(shown: RenderableType, columns: int = 80) -> bool:
    """Whether all that there is to say is said in so many columns."""
    narrow, endless = rendered(shown, columns), rendered(shown, 1000)
    letters = [Counter("".join("".join(lines).split())) for lines in (narrow, endless)]
    return letters[0] == letters[1] and max(map(len, narrow)) <= columns


def verification(*artifacts: str) -> Verification:
    drop = judge_drop(0, 0, 50_000, 1.0)
    verdicts = ("equivalent", "not executed", "not judged")
    rows = tuple(
        Row(name, "graph", "int8-cpu", "", not index, verdicts[index % 3], drop.sentence,
            None if index == 1 else replace(FIDELITY, finite=index != 2), drop, 0, ())
        for index, name in enumerate(artifacts)
    )  # fmt: skip
    return Verification(
        model=LONGEST, data=f"/a/folder/far/away/{'x' * 40}", images=50_000, listed=50_000,
        labelled=True, skipped=(), problems=("the images are of another set",), leaked=None,
        random_weights=False, class_names=(), max_drop=1.0, sequential=False,
        baseline=Baseline("confirmed", "PyTorch's top-1 is 87.17 %", 87.17, None, ()),
        reference=ACCURACY, rows=rows, passed=False,
    )  # fmt: skip


def bisection() -> Bisection:
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "rest")
    names = [f"blocks.{block}.{kind}" for block in range(DEPTH) for kind in kinds]
    db = BROKEN_DB
    parts = tuple(
        PartError(name, name.rpartition(".")[0], db, db, db, 1.0, -99.99, -99.99, -99.99)
        for name in names
    )
    blocks = tuple(BlockError(f"blocks.{i}", db, db, db, -99.99, -99.99) for i in range(DEPTH))
    facts = tuple(LinearFacts(name, 1386.4, 1.0, 3, None, 0.0, db, 1.0, 0) for name in names)
    return Bisection(
        model=LONGEST, reference=f"artifacts/{LONGEST}/fp32.onnx",
        candidate=f"artifacts/{LONGEST}/int8.onnx", precision="int8", data="x",
        labelled=True, random_weights=False, measured=Measurement(64, FIDELITY, parts, blocks),
        linears=facts, culprits=tuple(Culprit(n, 9.0, 1.0, 0.0, 1.0, "x") for n in names[:5]),
        sentence="one stands out",
    )  # fmt: skip


def search() -> SearchResult:
    linears = [f"blocks.{block}.mlp.fc1" for block in range(DEPTH)]
    attention = [f"blocks.{block}.attn" for block in range(DEPTH - 1)]
    points = tuple(
        Candidate(label, "int8", (*linears * 8, *attention), 1.0, 1.0,
                  Evaluation(499, 0, 500, -17.2), False, True, f"search/point-{number}.json")
        for number, label in enumerate(("chosen, all INT8+attn", "all FP16", ""), 97)
    )  # fmt: skip
    judged = judge_drop(0, 0, 500, 1.0)
    path = Path(f"artifacts/{LONGEST}/int8.onnx")
    costs = CostModel("macs", "FP16 MACs", 8, {})
    return SearchResult(
        LONGEST, "data", points[0], tuple(linears), points, costs, "int8",
        SchemeConfig("percentile"), {"int8": 0.9, "fp8": 0.8}, False, 1, judged,
        judged, False, path.with_name("recipe.json"), cast(Any, SimpleNamespace(path=path)),
    )  # fmt: skip


def test_a_verification_is_whole() -> None:
    assert whole(verification_table(verification("a", "fp16.engine", "b" * 70)))


def test_a_bisection_is_whole() -> None:
    assert whole(bisection_table(bisection()))


def test_a_search_is_whole() -> None:
    assert whole(search_table(search()))


def test_a_table_that_loses_something_is_noticed() -> None:
    table = Table()
    table.add_column("x", no_wrap=True)
    table.add_row("x" * 100)
    assert not whole(table)
    assert whole(table, 200)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("a short line", ["a short line"]),
        ("one two three four five six", ["one two three four", "five six"]),
        ("  label  one two three four", ["  label  one two", "         three four"]),
        (f"a path/{'x' * 30} is whole", ["a", f"path/{'x' * 30}", "is whole"]),
        ("fix     -> pip install a and b and c", ["fix     -> pip install a and b and c"]),
        ("one\n\ntwo", ["one", "", "two"]),
        ("a well-known hyphenated-word", ["a well-known", "hyphenated-word"]),
    ],
)
def test_words_are_wrapped_and_never_cut(text: str, lines: list[str]) -> None:
    assert wrapped(text, 20).split("\n") == lines


def test_a_line_that_must_not_wrap_is_whole_in_a_narrow_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    path = "artifacts/" + "x" * 100 + "/deployment.html"
    show(Group(Text("many words that may wrap"), Text(path, no_wrap=True, overflow="ignore")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == path
    assert max(map(len, lines[:-1])) <= 20
