"""Two hundred malformed inputs for all commands of clipdeploy.

Each is a :class:`Hostile`, whose ``make`` writes files to a folder and returns the command line.
``{out}`` in a command line is a folder that only a successful command may create.  Random values
are seeded with the number of the input.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from passport_edits import Edit, edits, put, restamp
from PIL import Image

from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

__all__ = ["ODD_NAMES", "Case", "Hostile", "hostile_inputs"]

DEMO = cards.DEMO
ODD_NAMES = (
    "a\x1b[2Jb",
    "a\x1b]0;title\x07b",
    "a\rPASS",
    "a\nPASS",
    "a\u202egnp.b",
    "a\x9b31mb",
    "a\u2028b",
    "[red]a[/nothing]",
    "-rf",
    "$(touch x)",
    "a'; touch x; '",
    "%s%n{0}",
    "a" * 250,
    "\udcff\udcfe",
)


@dataclass(frozen=True)
class Case:
    """The folder of an input; ``root`` contains a workspace ``artifacts`` to damage."""

    root: Path
    demo: Workspace

    @property
    def artifacts(self) -> Workspace:
        return Workspace(self.root / "artifacts")

    def file(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def with_graphs(self, *kinds: str) -> None:
        """Copy files of the demo's workspace, such as ``fp32.onnx`` or ``calibration.json``."""
        folder = self.artifacts.folder(DEMO)
        folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            name = kind
            shutil.copy(self.demo.folder(DEMO) / name, folder / name)


@dataclass(frozen=True)
class Hostile:
    """``codes``: allowed exit codes."""

    name: str
    make: Callable[[Case], list[Any]]
    codes: tuple[int, ...] = (1, 2)


def hostile_inputs() -> list[Hostile]:
    """Return all inputs."""
    groups = (_passports, _kept_files, _settings, _images, _checkpoints, _names, _special, _graphs)
    return [each for group in groups for each in group()]


def _random(number: int) -> np.random.Generator:
    return np.random.default_rng(number)


# --- passports

_TEXTS = (
    "../../x",
    '"; import os; os.abort(); "',
    "x\nRUN touch x",
    "x\x1b[2J",
    "$(touch x)",
    "x" * 9000,
)
_PLACES = ("model", "input.name", "output.name", "input.dtype", "preprocess.crop_mode")
_WRONG: tuple[tuple[str, Any], ...] = (
    ("preprocess.size", 10**15),
    ("preprocess.size", -1),
    ("preprocess.crop_pct", 1e-300),
    ("preprocess.crop_pct", "0.9"),
    ("preprocess.std", [0, 0, 0]),
    ("preprocess.mean", [1e308, 0, 0]),
    ("classes", 10**18),
    ("classes", -10),
    ("classes", 2**70),
    ("class_names", ["a\nb", *"123456789"]),
    ("class_names", ["a"] * 10),
    ("output.shape", []),
    ("input.shape", [10**12, 3, 32, 32]),
    ("parents", {"source_graph": "../x"}),
    ("versions", {"torch": "2\r\nx"}),
    ("settings", {"a": {"b": ["\x1b[2J"]}}),
    ("weights.sha256", "../../etc/passwd"),
    ("schema", 10**9),
    ("schema", "new"),
    ("kind", None),
)
_USES: tuple[Callable[[Path], list[Any]], ...] = (
    lambda graph: ["package", graph, "--triton", "{out}"],
    lambda graph: ["package", graph, "--cpp", "{out}"],
    lambda graph: ["predict", "3.png", "--artifact", graph],
    lambda graph: ["verify", "--data", cards.demo_file("test.zip"), "--limit", "2"],
    lambda graph: ["quantize"],
    lambda graph: ["benchmark", graph, "--seconds", "0.1"],
)


def _passports() -> Iterator[Hostile]:
    pairs: list[tuple[str, Any]] = [(place, text) for place in _PLACES for text in _TEXTS]
    for number, (place, value) in enumerate((*pairs, *_WRONG)):
        yield Hostile(f"passport-{number}-{place}", _passport(number, put(place, value)))
    several = edits(put("input.name", "a b"), put("model", "../x"), put("classes", 0))
    yield Hostile("passport-several", _passport(0, several))


def _passport(number: int, edit: Edit) -> Callable[[Case], list[Any]]:
    def make(case: Case) -> list[Any]:
        case.with_graphs("fp32.onnx")
        graph = case.artifacts.graph(DEMO, "fp32")
        restamp(graph, edit)
        case.file("3.png", _png())
        return _used(number, graph)

    return make


def _used(number: int, graph: Path) -> list[Any]:
    """Return a command line that reads ``graph``, as a file or from the workspace."""
    words = _USES[number % len(_USES)](graph)
    return words if graph in words else [*words, "--model", "demo"]


# --- files of a workspace, and settings

_ROTTEN: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    lambda data, random: b"",
    lambda data, random: data[: len(data) // 2],
    lambda data, random: random.bytes(1000),
    lambda data, random: b"[" * 100_000,
    lambda data, random: b"null",
    lambda data, random: b'{"schema": 1e400}',
    lambda data, random: data.replace(b'"', b"'"),
    lambda data, random: b"\xff\xfe" + data.decode(errors="replace").encode("utf-16-le"),
)


def _kept_files() -> Iterator[Hostile]:
    for number, rot in enumerate(_ROTTEN):
        for kind in ("calibration.json", "workspace.json", "recipe.json", "verification.jsonl"):
            yield Hostile(f"kept-{number}-{kind}", _kept(kind, number, rot))
    for number, name in enumerate(("../../x", "/etc", "a\x1b[2J", "", "..", "a/b")):
        data = json.dumps({"last_model": name}).encode()
        yield Hostile(f"last-model-{number}", _last_model(data))


def _kept(
    kind: str, number: int, rot: Callable[[bytes, np.random.Generator], bytes]
) -> Callable[[Case], list[Any]]:
    def make(case: Case) -> list[Any]:
        case.with_graphs("fp32.onnx")
        folder = case.artifacts.folder(DEMO)
        whole = (case.demo.folder(DEMO) / "calibration.json").read_bytes()[:5000]
        path = case.artifacts.root / kind if kind == "workspace.json" else folder / kind
        path.write_bytes(rot(whole, _random(number)))
        return {
            "calibration.json": ["quantize", "--model", "demo"],
            "workspace.json": ["package", "--triton", "{out}"],
            "recipe.json": ["quantize", "--model", "demo", "--recipe", path],
            "verification.jsonl": ["verify", "merge", path, "--model", "demo"],
        }[kind]

    return make


def _last_model(data: bytes) -> Callable[[Case], list[Any]]:
    def make(case: Case) -> list[Any]:
        case.file("artifacts/workspace.json", data)
        return ["package", "--triton", "{out}"]

    return make


_TOML = (
    b"\x00\x01\x02",
    b"a = [" + b"[" * 5000,
    b"workspace = 5",
    b"workspace = ''",
    b'model = "../../x"',
    b'backend = "$(touch x)"',
    b"max_drop = nan",
    b"max_drop = 1e400",
    b"max_drop = -1",
    b'"a\\u001b[2J" = 1',
    b"[section]\nmodel = 'demo'",
    b"model = 'demo'\nmodel = 'demo'",
    b'mirror = "ann:s3cret@host"',
    "workspace = 'a'".encode("utf-16"),
    b"#" * (3 << 20),
)


def _settings() -> Iterator[Hostile]:
    for number, data in enumerate(_TOML):

        def make(case: Case, data: bytes = data) -> list[Any]:
            case.file("clipdeploy.toml", data)
            return ["config"]

        yield Hostile(f"settings-{number}", make)


# --- images


def _png(image: Image.Image | None = None, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (image or Image.new("RGB", (40, 40), (9, 99, 200))).save(stream, kind, **options)
    return stream.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _header(width: int, height: int) -> bytes:
    """Return a PNG that claims this size but contains a few bytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (_chunk(b"IHDR", head), _chunk(b"IDAT", zlib.compress(bytes(9))), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


_BAD_IMAGES: dict[str, Callable[[], bytes]] = {
    "narrow": lambda: _png(Image.new("1", (1, 300_000))),
    "flat": lambda: _png(Image.new("L", (200_000, 1))),
    "a bomb": lambda: _header(60_000, 60_000),
    "an endless bomb": lambda: _header(2**31 - 1, 2**31 - 1),
    "no pixels": lambda: _header(0, 0),
    "too few bytes": lambda: _header(30, 30),
    "empty": lambda: b"",
    "text": lambda: b"no image",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "cut png": lambda: _png()[:-30],
    "cut jpeg": lambda: _png(kind="JPEG")[:200],
    "cut gif": lambda: _png(kind="GIF")[:20],
    "floats": lambda: _png(Image.new("F", (9, 9)), "TIFF"),
    "zip": lambda: b"PK\x03\x04" + bytes(100),
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
}
_ODD_IMAGES: dict[str, Callable[[], bytes]] = {
    "one pixel": lambda: _png(Image.new("RGB", (1, 1))),
    "cmyk": lambda: _png(Image.new("CMYK", (40, 40)), "JPEG"),
    "sixteen bits": lambda: _png(Image.new("I;16", (40, 40))),
    "palette": lambda: _png(Image.new("P", (40, 40)), transparency=0),
    "odd exif": lambda: _png(kind="JPEG", exif=b"Exif\x00\x00" + bytes(range(200))),
    "odd profile": lambda: _png(icc_profile=bytes(range(256))),
}


def _images() -> Iterator[Hostile]:
    for images, codes in ((_BAD_IMAGES, (1,)), (_ODD_IMAGES, (0,))):
        for name, draw in images.items():

            def make(case: Case, draw: Callable[[], bytes] = draw) -> list[Any]:
                case.with_graphs("fp32.onnx")
                return ["predict", case.file("x.png", draw()), "--model", "demo"]

            yield Hostile(f"image-{name}", make, codes)


# --- checkpoints


class _Custom:
    pass


def _loop() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    inner["state_dict"] = {"model": inner}
    return inner


def _weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    def make() -> object:
        from safetensors.torch import load_file

        found = load_file(cards.demo_file("weights.safetensors"))
        return {**found, "head.bias": change(found["head.bias"])}

    return make


_SAVED: dict[str, Callable[[], object]] = {
    **{
        str(dtype): _weights(lambda value, dtype=dtype: value.to(dtype))
        for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "quantised": _weights(lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)),
    "sparse": _weights(lambda value: value.to_sparse()),
    "nested": _weights(lambda value: torch.nested.nested_tensor([value, value[:2]])),
    "meta": _weights(lambda value: value.to("meta")),
    "endless": _weights(lambda value: value[:1].half().expand(2**20, 2**20)),
    "nan": _weights(lambda value: value * float("nan")),
    "a matrix": _weights(lambda value: value[None]),
    "no values": _weights(lambda value: value[:0]),
    "a loop": _loop,
    "nothing": dict,
    "a list": lambda: [torch.ones(3)],
    "an object": lambda: {"a": _Custom()},
    "numbers": lambda: {1: torch.ones(2), (2,): torch.ones(2)},
    "odd names": lambda: {f"blocks.0.{name}": torch.ones(2) for name in ODD_NAMES[:-1]},
}


def _checkpoints() -> Iterator[Hostile]:
    for number, (name, content) in enumerate(_SAVED.items()):

        def make(case: Case, number: int = number, content: Any = content) -> list[Any]:
            path = case.root / "weights.pth"
            torch.save(content(), path, _use_new_zipfile_serialization=bool(number % 2))
            return ["export", "--model", "demo", "--checkpoint", path]

        yield Hostile(f"checkpoint-{name}", make)
    for number in range(12):
        start = (b"", b"\x80\x02", b"PK\x03\x04", pickle.dumps(print)[:-1])[number % 4]
        ending = ("pth", "bin", "safetensors")[number % 3]

        def rotten(case: Case, number: int = number, start: Any = start, end: str = ending) -> Any:
            path = case.file(f"weights.{end}", start + _random(number).bytes(99 * number))
            return ["export", "--model", "demo", "--checkpoint", path]

        yield Hostile(f"checkpoint-bytes-{number}", rotten)


# --- names, and paths that are not regular files

_TAKES_NAMES: tuple[Callable[[str], list[Any]], ...] = (
    lambda name: ["inspect", f"{name}.onnx"],
    lambda name: ["predict", f"{name}.png", "--model", "demo"],
    lambda name: ["zoo", "show", name],
    lambda name: ["deploy", "--model", "demo", "--fp16", "--val", name],
    lambda name: ["bisect", "--model", "demo", "--data", name],
    lambda name: ["search", "--model", "demo", "--data", name],
    lambda name: ["build-engine", "--model", name],
    lambda name: ["calibrate", "--model", "demo", "--data", name],
    lambda name: ["export", "--model", "demo", "--checkpoint", f"hf://{name}"],
    lambda name: ["benchmark", f"{name}.engine"],
    lambda name: ["package", f"{name}.onnx", "--triton", "{out}", "--name", name],
    lambda name: ["completion", name],
    lambda name: ["doctor", name],
    lambda name: ["demo", name],
    lambda name: [name],
)


def _names() -> Iterator[Hostile]:
    for number in range(30):
        name, use = ODD_NAMES[number % len(ODD_NAMES)], _TAKES_NAMES[number % len(_TAKES_NAMES)]

        def make(case: Case, name: str = name, use: Any = use) -> list[Any]:
            case.with_graphs("fp32.onnx", "int8.onnx", "calibration.json")
            return list(use(name))

        yield Hostile(f"name-{number}", make)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    # A socket's path is limited to 107 bytes, so a relative path is used.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


_SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": _pipe,
    "socket": _socket,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
}
_AT: dict[str, Callable[[Path], list[Any]]] = {
    "x.onnx": lambda path: ["inspect", path],
    "x.pth": lambda path: ["export", "--model", "demo", "--checkpoint", path],
    "x.zip": lambda path: ["calibrate", "--model", "demo", "--data", path],
    "x.json": lambda path: ["quantize", "--model", "demo", "--recipe", path],
    "x.txt": lambda path: [
        *("verify", "--model", "demo", "--data", cards.demo_file("test.zip")),
        *("--limit", "2", "--labels", path),
    ],
    "clipdeploy.toml": lambda path: ["config"],
    "artifacts/workspace.json": lambda path: ["package", "--triton", "{out}"],
    f"artifacts/{DEMO}/calibration.json": lambda path: ["quantize", "--model", "demo"],
}


def _special() -> Iterator[Hostile]:
    for where, use in _AT.items():
        for kind, put_there in _SPECIAL.items():

            def make(
                case: Case, where: str = where, use: Any = use, put_there: Any = put_there
            ) -> list[Any]:
                case.with_graphs("fp32.onnx")
                put_there(case.root / where)
                return list(use(case.root / where))

            yield Hostile(f"special-{where.split('/')[-1]}-{kind}", make)


# --- graphs


def _graphs() -> Iterator[Hostile]:
    for number in range(8):

        def make(case: Case, number: int = number) -> list[Any]:
            case.with_graphs("fp32.onnx")
            graph, random = case.artifacts.graph(DEMO, "fp32"), _random(number)
            data = bytearray(graph.read_bytes())
            if number % 2:
                data = data[: int(random.integers(1, len(data)))]
            else:
                data[-20_000:] = random.bytes(20_000)
            graph.write_bytes(data)
            return _used(number, graph)

        yield Hostile(f"graph-bytes-{number}", make)
