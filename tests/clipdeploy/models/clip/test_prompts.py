"""Class texts and templates: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipdeploy.core.errors import ClipdeployError
from clipdeploy.models.cards import imagenet_classes
from clipdeploy.models.clip.prompts import IMAGENET, TEMPLATES, Prompts, read_prompts


def written(tmp_path: Path, text: str, name: str = "classes.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_names_texts_and_templates(tmp_path: Path) -> None:
    classes = written(tmp_path, "\ufeffcat\n\nn02\tgolden retriever\tGolden Retriever dog \n")
    templates = written(tmp_path, "a {}.\n{}\n", "templates.txt")
    found = read_prompts(classes, templates)
    assert found.names == ("cat", "n02")
    assert found.of_class(0) == ["a cat.", "cat"]
    assert found.of_class(1) == [
        "a golden retriever.",
        "golden retriever",
        "a Golden Retriever dog.",
        "Golden Retriever dog",
    ]


def test_the_shipped_lists() -> None:
    found = read_prompts(IMAGENET)
    assert found.names == tuple(name for name, _ in imagenet_classes())
    assert found.of_class(2)[0] == "a bad photo of a great white shark."
    assert [len(read_prompts(IMAGENET, name).templates) for name in TEMPLATES] == [80, 7]
    # The two lists of ImageNet's classes are in the same order.
    labels = [label.replace("-", " ").lower() for _, label in imagenet_classes()]
    shared = sum(
        bool({*text.lower().split()} & {*label.replace(",", " ").split()})
        for (text,), label in zip(found.texts, labels, strict=True)
    )
    assert shared > 900


def test_each_part_changes_the_hash(tmp_path: Path) -> None:
    base = Prompts(("a", "b"), (("x",), ("y",)), ("{}", "a {}"))
    others = [
        Prompts(("a", "c"), base.texts, base.templates),
        Prompts(base.names, (("x", "z"), ("y",)), base.templates),
        Prompts(base.names, base.texts, ("a {}", "{}")),
        Prompts(("b", "a"), (("y",), ("x",)), base.templates),
    ]
    assert len({base.sha256, *(other.sha256 for other in others)}) == 5


FAULTS = {
    "no class": ("\n \n", "{}", "no classes"),
    "a class twice": ("cat\ndog\ncat\n", "{}", "'cat'"),
    "a text twice": ("cat\tpet\ndog\tpet\n", "{}", "'pet'"),
    "an empty text": ("cat\t\tpet\n", "{}", "line 1, has an empty field"),
    "a control character": ("cat\ndo\x1b[2Jg\n", "{}", "line 2, has control characters"),
    "no placeholder": ("cat\n", "a photo", "0 placeholders"),
    "two placeholders": ("cat\n", "{} and {}", "2 placeholders"),
    "no template": ("cat\n", "\n", "no templates"),
    "a template twice": ("cat\n", "{}\n{}", "2 templates are"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, tmp_path: Path) -> None:
    classes, templates, message = FAULTS[fault]
    with pytest.raises(ClipdeployError, match=message) as caught:
        read_prompts(written(tmp_path, classes), written(tmp_path, templates, "templates.txt"))
    assert caught.value.hint


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ClipdeployError, match="UTF-8"):
        read_prompts(path)
    with pytest.raises(ClipdeployError, match=r"missing.txt is neither a file nor imagenet"):
        read_prompts(tmp_path / "missing.txt")
    with pytest.raises(ClipdeployError, match="openai81 is neither a file nor openai80 or simple"):
        read_prompts(IMAGENET, "openai81")
