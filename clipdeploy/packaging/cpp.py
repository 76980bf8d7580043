"""Writes a C++17 program that runs a graph on ONNX Runtime or an engine on TensorRT.

DIR/CMakeLists.txt         cmake -B build && cmake --build build && ctest --test-dir build
    main.cpp  model.h      raw images in, logits out
    onnxruntime_model.cpp  tensorrt_model.cpp
    model.onnx             or model.engine, its passport, and reference.json if the accuracy of
                           its reference was confirmed
    image.raw  logits.txt  preprocessed images, and the logits that Python computes for them
    labels.txt             one class per line
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import atomic_folder, file_errors
from clipdeploy.packaging.artifact import Packable, copy_artifact, is_copy, labels_text
from clipdeploy.packaging.client import template
from clipdeploy.runners.base import Images, Logits
from clipdeploy.runners.onnx import OnnxRunner
from clipdeploy.workspace.proof import ReferenceProof
from exporters.samples import Samples

__all__ = ["CppPackage", "check_replaceable", "package_cpp", "sample_count"]

_SOURCES = ("main.cpp", "model.h", "onnxruntime_model.cpp", "tensorrt_model.cpp")
_CMAKE = "CMakeLists.txt"
_IMAGES = 3


@dataclass(frozen=True)
class CppPackage(Shown):
    """A written C++ package; ``runtime`` is ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.

    ``changed`` is False if the folder already held the same files.
    ``reference`` says how the reference of the artifact was proven, None if that was not looked up.
    """

    path: Path
    model: Path
    runtime: str
    changed: bool
    notes: tuple[str, ...]
    reference: ReferenceProof | None = None

    def __rich__(self) -> Renderable:
        rows = [
            ("program", f"{self.path}, for {self.runtime}"),
            ("made", "now" if self.changed else "before; nothing has changed since"),
        ]
        proof = [("reference", self.reference.sentence)] if self.reference else []
        return facts([*rows, *proof, *(("note", note) for note in self.notes)])

    @property
    def commands(self) -> tuple[str, str]:
        """The commands that build the program and compare its logits with ``logits.txt``."""
        folder, build = (shlex.quote(str(path)) for path in (self.path, self.path / "build"))
        return (
            f"cmake -S {folder} -B {build} && cmake --build {build}",
            f"ctest --test-dir {build} --output-on-failure",
        )


def sample_count(source: Packable) -> int:
    """The number of sample images: 3, or a batch that the artifact accepts."""
    if source.fixed_batch is not None:
        return source.fixed_batch
    if source.engine is None:
        return _IMAGES
    low, best, high = source.engine.profiles[0]
    return _IMAGES if low <= _IMAGES <= high else best


def package_cpp(
    source: Packable, folder: Path, samples: Samples, *, force: bool = False
) -> CppPackage:
    """Write the program for ``source`` into ``folder`` atomically.

    ``samples`` has :func:`sample_count` images.  ``force`` replaces an older package.

    Raises:
        ArtifactError: the folder holds other files, or an older package without ``force``.
        FileError: no permission or no disk space.
    """
    model = folder / f"model{source.path.suffix}"
    files = _files(source, model.name, samples)
    notes: tuple[str, ...] = ()
    if source.engine:
        notes = ("logits.txt is missing: Python computes it only where the engine can run",)
    changed = not _is_current(source, model, files)
    if changed or force:
        check_replaceable(folder, force=force)
        with atomic_folder(folder) as made, file_errors("copy", source.path):
            for name, data in files.items():
                (made / name).write_bytes(data)
            copy_artifact(source, made / model.name)
    return CppPackage(folder, model, source.runtime, changed or force, notes)


def _is_current(source: Packable, model: Path, files: Mapping[str, bytes]) -> bool:
    if not is_copy(source, model):
        return False
    paths = {model.with_name(name): data for name, data in files.items()}
    return all(path.is_file() and path.read_bytes() == data for path, data in paths.items())


def check_replaceable(folder: Path, *, force: bool) -> None:
    """Check that a package may be written to ``folder``; ``force`` replaces an older package.

    Raises:
        ArtifactError: the folder holds other files, or an older package without ``force``.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    # Even with force, only a folder with a C++ package is removed.
    if not all((folder / name).is_file() for name in (_CMAKE, *_SOURCES)):
        raise ArtifactError(f"{folder} has other files in it", hint="choose another folder")
    if not force:
        raise ArtifactError(
            f"{folder} already has another package",
            hint="choose another folder, or replace the package and its build with --force",
        )


def _files(source: Packable, model: str, samples: Samples) -> dict[str, bytes]:
    images = samples.of(sample_count(source)).as_input(source.graph.input)
    files = {name: template(name).template.encode() for name in _SOURCES}
    files |= {
        _CMAKE: _cmake(source, model).encode(),
        "labels.txt": labels_text(source.graph),
        "image.raw": images.tobytes(),
        f"{model}.json": source.passport_json,
    }
    if source.engine is None:
        files["logits.txt"] = _text(_logits(source.path, images)).encode()
    return files


def _logits(graph: Path, images: Images) -> Logits:
    with OnnxRunner(graph) as runner:
        return runner(images)


def _text(logits: Logits) -> str:
    """Format one line per image; nine digits represent a float32 exactly."""
    return "".join(" ".join(f"{np.float32(value):.9g}" for value in row) + "\n" for row in logits)


def _cmake(source: Packable, model: str) -> str:
    exact = source.graph.precision == "int8-cpu"
    return template(_CMAKE).substitute(
        model=model,
        runtime=source.runtime,
        definitions="  target_compile_definitions(classify PRIVATE EXACT_INT8)\n" if exact else "",
        expected="" if source.engine else "logits.txt",
    )
