"""A fine-tune on somebody's own classes, from its checkpoint to its verdict.

Covers: clipdeploy/imaging/labelled.py.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from verify_command import TEST, good, merge, refused, run, verify

from clipdeploy.models import cards
from exporters.headers import read_passport

# Four of the demo's digits under other names, the logits in an order of their own.
KEPT = {"ant": 3, "bee": 1, "cow": 4, "dog": 5}
PASSING = ("--max-drop", "10", "--workers", "0", "--json")


def checkpoint(path: Path, rows: list[int], **meta: Any) -> Path:
    """The demo's weights with these rows of its head, and what training kept beside them."""
    tensors = load_file(cards.demo_file("weights.safetensors"))
    for name in ("head.weight", "head.bias"):
        tensors[name] = tensors[name][rows].clone()
    torch.save({"state_dict": tensors, "meta": meta}, path)
    return path


def export(tmp_path: Path, weights: Path, *words: str | Path) -> Any:
    at = ("--workspace", tmp_path / "artifacts", "--checkpoint", weights)
    return run("export", "--model", "demo", *at, *words)


@pytest.fixture
def bugs(tmp_path: Path) -> Path:
    """Ten digits of each kept class, in folders of the classes' names."""
    root = tmp_path / "bugs"
    with zipfile.ZipFile(TEST) as archive:
        for name, digit in KEPT.items():
            (root / name).mkdir(parents=True)
            members = sorted(n for n in archive.namelist() if n.startswith(f"{digit}/"))
            for member in members[:10]:
                (root / name / Path(member).name).write_bytes(archive.read(member))
    return root


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "own.pth", list(KEPT.values()))


def passport_names(tmp_path: Path) -> tuple[str, ...]:
    graph = tmp_path / "artifacts" / cards.DEMO / "fp32.onnx"
    return read_passport(graph).class_names


def test_folders_name_the_classes_that_nobody_named(
    tmp_path: Path, bugs: Path, weights: Path
) -> None:
    result = export(tmp_path, weights)
    assert result.exit_code == 0, result.output
    assert "the 4 classes of this checkpoint have no names" in result.stderr
    assert "classes: 4, without names" in result.stdout
    result = verify(tmp_path / "artifacts", *PASSING, data=bugs)
    found = good(result)
    assert found["class_names"] == list(KEPT)
    assert found["baseline"]["top1_interval"]["low"] > 80
    assert "classes in the order of the folder names" in result.stderr


def test_a_label_file_names_them_or_counts_them(tmp_path: Path, bugs: Path, weights: Path) -> None:
    export(tmp_path, weights)
    flat, rows = tmp_path / "flat", []
    flat.mkdir()
    for number, path in enumerate(sorted(bugs.rglob("*.png"))):
        path.rename(flat / f"{number}.png")
        rows.append((f"{number}.png", path.parent.name))
    refused(verify(tmp_path / "artifacts", *PASSING, data=flat), 1, "no labels found", "--labels")
    for kind, text in (
        ("names.csv", "".join(f"{image},{name}\n" for image, name in rows)),
        ("numbers.txt", "".join(f"{image} {list(KEPT).index(name)}\n" for image, name in rows)),
    ):
        (tmp_path / kind).write_text(text)
        words = (*PASSING, "--labels", tmp_path / kind)
        found = good(verify(tmp_path / "artifacts", *words, data=flat))
        assert found["baseline"]["top1_interval"]["low"] > 80
    refused(
        verify(tmp_path / "artifacts", *PASSING, "--labels", "nosuch.txt", data=flat),
        1,
        "nosuch.txt",
    )


def test_a_file_names_them_once_for_all(tmp_path: Path, bugs: Path, weights: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(KEPT))
    assert export(tmp_path, weights, "--class-names", names).exit_code == 0
    assert passport_names(tmp_path) == tuple(KEPT)
    # Named once, they are kept with the weights; and a workspace that has them can be judged.
    again = export(tmp_path, weights)
    assert "(unchanged)" in again.stdout
    assert "names from --class-names" in again.stdout
    assert good(verify(tmp_path / "artifacts", *PASSING, data=bugs))
    (tmp_path / "other.txt").write_text("\n".join(reversed(KEPT)))
    result = verify(
        tmp_path / "artifacts", *PASSING, "--class-names", tmp_path / "other.txt", data=bugs
    )
    refused(result, 1, "differ from the graph's")
    # Other names are another graph.
    changed = export(tmp_path, weights, "--class-names", tmp_path / "other.txt")
    assert "(unchanged)" not in changed.stdout
    assert passport_names(tmp_path) == tuple(reversed(KEPT))


def test_verify_takes_names_for_a_graph_without(tmp_path: Path, bugs: Path, weights: Path) -> None:
    export(tmp_path, weights)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({name: index for index, name in enumerate(KEPT)}))
    # The folders are not in the order of the logits: their own order would be wrong.
    (bugs / "ant").rename(bugs / "zebra")
    wrong = verify(tmp_path / "artifacts", *PASSING, data=bugs)
    assert json.loads(wrong.stdout)["baseline"]["top1_interval"]["high"] < 50
    names.write_text(json.dumps(["zebra", "bee", "cow", "dog"]))
    words = (*PASSING, "--class-names", names)
    found = good(verify(tmp_path / "artifacts", *words, data=bugs))
    assert found["baseline"]["top1_interval"]["low"] > 80


@pytest.mark.parametrize(
    "meta", [{"dataset_meta": {"classes": tuple(KEPT)}}, {"CLASSES": list(KEPT)}]
)
def test_the_checkpoint_names_them(tmp_path: Path, bugs: Path, meta: dict[str, Any]) -> None:
    own = checkpoint(tmp_path / "own.pth", list(KEPT.values()), **meta)
    assert "names from the checkpoint: ant to dog" in export(tmp_path, own).stdout
    assert passport_names(tmp_path) == tuple(KEPT)
    assert good(verify(tmp_path / "artifacts", *PASSING, data=bugs))


def test_other_numbers_of_names_are_refused(tmp_path: Path, weights: Path) -> None:
    short = checkpoint(tmp_path / "short.pth", list(KEPT.values()), CLASSES=["ant", "bee"])
    refused(export(tmp_path, short), 1, "names 2 classes, its head has 4", "--class-names")
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee")
    refused(
        export(tmp_path, weights, "--class-names", names), 1, "names 2 classes, but the model has 4"
    )
    assert not (tmp_path / "artifacts").exists()


def test_the_cards_names_are_assumed_aloud(tmp_path: Path, digits: Path) -> None:
    """As many classes as the card has, and nobody says that they are the card's."""
    own = checkpoint(tmp_path / "own.pth", list(reversed(range(10))))
    result = export(tmp_path, own)
    assert "does not name its 10 classes: those of clip-vit-demo are assumed" in result.stderr
    # They are not: PyTorch's accuracy says so, and nothing is judged.
    result = verify(tmp_path / "artifacts", *PASSING, data=digits)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["rows"][0]["verdict"] == "not judged"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, reversed(range(10)))))
    assert export(tmp_path, own, "--class-names", names).exit_code == 0
    assert good(verify(tmp_path / "artifacts", *PASSING, data=digits))


def test_some_of_the_classes_are_judged_without_the_published_figure(
    artifacts: Path, digits: Path
) -> None:
    for digit in range(4, 10):
        for path in (digits / str(digit)).iterdir():
            path.unlink()
    found = good(verify(artifacts, "--max-drop", "10", "--workers", "0", "--json", data=digits))
    assert found["baseline"]["status"] == "unpublished"
    assert "4 of the 10 classes" in found["baseline"]["sentence"]
    assert found["baseline"]["published_top1"] is None


def test_what_has_no_class_stops_before_the_work_or_is_left_out(
    artifacts: Path, digits: Path
) -> None:
    whole = next((digits / "3").glob("*.png")).read_bytes()
    (digits / "stray.png").write_bytes(whole)
    (digits / "3" / ".ipynb_checkpoints").mkdir()
    (digits / "3" / ".ipynb_checkpoints" / "a-checkpoint.png").write_bytes(whole)
    at = ("--max-drop", "4", "--workers", "0", "--json")
    result = verify(artifacts, *at, data=digits)
    refused(result, 1, "1 of 101 images have no class: stray.png", "--skip-unlabelled")
    assert "load clip-vit-demo" not in result.stderr
    found = good(verify(artifacts, *at, "--skip-unlabelled", data=digits))
    assert found["images"] == 100
    problems = " ".join(found["problems"])
    assert "1 images without a class were left out: stray.png" in problems
    assert "3/.ipynb_checkpoints/a-checkpoint.png is hidden" in problems


def test_images_of_unusual_names_are_judged_too(artifacts: Path, digits: Path) -> None:
    for number, path in enumerate(sorted(digits.rglob("*.png"))):
        if number % 5 == 0:
            path.rename(path.with_suffix((".apng", ".orig", "")[number % 3]))
    (digits / "3" / "readme.doc").write_text("no image")
    at = ("--max-drop", "4", "--workers", "0", "--json")
    found = good(verify(artifacts, *at, data=digits))
    assert found["images"] == 100
    assert "1 files are not images and were left out: 3/readme.doc" in found["problems"]


def test_merge_holds_named_labels_against_the_shards(artifacts: Path, digits: Path) -> None:
    rows = [(path.relative_to(digits), path.parent.name) for path in digits.rglob("*.png")]
    table = digits.parent / "mine.txt"
    table.write_text("".join(f"{name} {digit}\n" for name, digit in rows))
    other = digits.parent / "other.txt"
    other.write_text("".join(f"{name} {9 - int(digit)}\n" for name, digit in rows))
    at = ("--max-drop", "4", "--workers", "0")
    for shard in ("1/2", "2/2"):
        words = (*at[2:], "--shard", shard, "--labels", table)
        assert verify(artifacts, *words, data=digits).exit_code == 0
    for wrong, said in ((other, "another class than the shards"), ("no.txt", "no.txt")):
        refused(merge(artifacts, "--labels", wrong), 1, said)
    assert merge(artifacts, *at[:2], "--labels", table).exit_code == 0


def test_every_stage_names_the_files_that_it_leaves_out(artifacts: Path, digits: Path) -> None:
    (digits / "3" / "readme.doc").write_text("no image")
    at = ("--model", "demo", "--workspace", artifacts)
    left_out = "1 files are not images and were left out: 3/readme.doc"
    result = run("calibrate", "--data", digits, *at, "--json")
    assert left_out in result.stderr
    assert left_out in json.loads(result.stdout)["problems"]
    calibration = artifacts / cards.DEMO / "calibration.json"
    calibration.unlink()
    assert left_out in run("build-engine", "--int8", "--data", digits, *at).stderr
    result = run("predict", digits, *at, "--json")
    assert left_out in result.stderr
    assert left_out in json.loads(result.stdout)["problems"]
    search = ("search", "--fixed-plan", "--search-images", "22", "--max-drop", "15")
    for words in (search, ("bisect", "--images", "2")):
        assert left_out in run(*words, "--data", digits, *at).stderr
