"""Edits single fields in passports of real artifacts."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from clipdeploy.core.passport import IMAGENET_MEAN, IMAGENET_STD, PASSPORT_KEY, to_json
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import build_engine
from clipdeploy.engines.passport import passport_path
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

__all__ = [
    "DIGITS",
    "EVERY",
    "FAULTS",
    "GRAPHS",
    "Edit",
    "a_three",
    "changed",
    "edits",
    "file",
    "leaves",
    "put",
    "restamp",
    "text_of",
    "with_engine",
    "write_text",
]

Json = dict[str, Any]
Edit = Callable[[Json], None]
GRAPHS = ("fp32.onnx", "fp16.onnx", "int8.onnx")
EVERY = (*GRAPHS, "int8.engine")


def with_engine(source: Workspace, root: Path) -> Path:
    """Copy the demo's workspace and compile its INT8 graph with TensorRT-RTX."""
    shutil.copytree(source.root, root)
    workspace = Workspace(root)
    graph, engine = workspace.graph(cards.DEMO, "int8"), workspace.engine(cards.DEMO, "int8")
    build_engine(graph, engine, BuildConfig(backend="tensorrt-rtx"))
    return root


def a_three(folder: Path) -> Path:
    """Return a held-out image of a 3."""
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        name = min(each for each in archive.namelist() if each.startswith("3/"))
        return Path(archive.extract(name, folder))


def leaves(raw: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(raw, dict):
        items = raw.items()
    elif isinstance(raw, list):
        items = enumerate(raw)
    else:
        yield where
    for key, value in items:
        yield from leaves(value, (*where, key))


def changed(value: Any) -> Any:
    """Return another value of the same type, or any value for an empty field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.01
    return f"{value}x" if isinstance(value, str) else 7


def file(artifacts: Path, kind: str) -> Path:
    return artifacts / cards.DEMO / kind


def text_of(path: Path) -> str:
    if path.suffix == ".engine":
        return passport_path(path).read_text()
    return to_json(read_passport(path)).decode()


def write_text(path: Path, text: str) -> None:
    if path.suffix == ".engine":
        passport_path(path).write_text(text)
        return
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {PASSPORT_KEY: text})
    onnx.save(model, path)


def restamp(path: Path, edit: Edit) -> None:
    """Edit the passport in a graph, or the graph's passport in an engine's."""
    raw = json.loads(text_of(path))
    edit(raw["graph"] if path.suffix == ".engine" else raw)
    assert json.dumps(raw) != json.dumps(json.loads(text_of(path)))
    write_text(path, json.dumps(raw))


def put(where: str, value: Any) -> Edit:
    *path, last = where.split(".")

    def edit(raw: Json) -> None:
        for key in path:
            raw = raw[key]
        raw[last] = value

    return edit


def edits(*each: Edit) -> Edit:
    def edit(raw: Json) -> None:
        for one in each:
            one(raw)

    return edit


DIGITS = list("0123456789")
# The edit, and the field that the message must name.
FAULTS: dict[str, tuple[Edit, str]] = {
    "class names rolled": (put("class_names", [*DIGITS[1:], "0"]), "class_names[0]"),
    "class names backwards": (put("class_names", DIGITS[::-1]), "class_names[0]"),
    "two class names swapped": (put("class_names", list("0124356789")), "class_names[3]"),
    "a class renamed": (put("class_names", [*DIGITS[:9], "nine"]), "class_names[9]"),
    "a class name twice": (put("class_names", list("0123456788")), "class_names"),
    "a class name missing": (put("class_names", DIGITS[:9]), "class_names"),
    "no class names": (put("class_names", []), "class_names"),
    "ImageNet's mean": (put("preprocess.mean", IMAGENET_MEAN), "preprocess.mean[0]"),
    "ImageNet's std": (put("preprocess.std", IMAGENET_STD), "preprocess.std[0]"),
    "blue's mean in the last digit": (
        put("preprocess.mean", (0.48145466, 0.4578275, 0.40821074)),
        "preprocess.mean[2]",
    ),
    "another crop": (put("preprocess.crop_pct", 0.9), "preprocess.crop_pct"),
    "another interpolation": (
        put("preprocess.interpolation", "bilinear"),
        "preprocess.interpolation",
    ),
    "another way to crop": (put("preprocess.crop_mode", "squash"), "preprocess.crop_mode"),
    "orientation ignored": (put("preprocess.exif_orientation", False), "exif_orientation"),
    "another size": (put("preprocess.size", 36), "preprocess.size"),
    "another recipe alone": (put("recipe.numerics", "as-shipped"), "mean[0]|recipe.numerics"),
    "numerics with their preprocessing": (
        edits(
            put("recipe.numerics", "as-shipped"),
            put("preprocess.mean", IMAGENET_MEAN),
            put("preprocess.std", IMAGENET_STD),
        ),
        "recipe.numerics",
    ),
    "another resize alone": (put("recipe.resize", "timm"), "exif_orientation|recipe.resize"),
    "another model": (put("model", cards.find("clip-vit-base-p16").name), "model is"),
    "another kind": (put("kind", "engine"), "kind"),
    "half an input": (put("input.dtype", "float16"), "input.dtype"),
    "another input": (put("input.name", "pixels"), "input.name"),
    "a fixed batch": (
        edits(put("input.shape", [4, 3, 32, 32]), put("output.shape", [4, 10])),
        "input.shape[0]|profiles",
    ),
    "half an output": (put("output.dtype", "float16"), "output.dtype"),
    "weights of two kinds": (put("weights.kind", "random"), "weights"),
}
