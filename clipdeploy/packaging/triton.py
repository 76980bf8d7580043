"""Writes a model into a model repository of NVIDIA's Triton Inference Server.

REPOSITORY/NAME/config.pbtxt    inputs, outputs, batching, instances, warm-up
                labels.txt      one class per line; none for embeddings
                warmup/         a preprocessed image, or the ids of a text
                client.py       sends images, prints the five most likely classes, or compares the
                                images with texts; a text tower has none
                bpe_...txt.gz   the tokenizer's vocabulary, if the client compares with texts
                Dockerfile      a server with the TensorRT version of the engine
                1/model.plan    or model.onnx, its passport, and reference.json if the accuracy
                                of its reference was confirmed
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import (
    atomic_folder,
    file_errors,
    read_regular,
    restore_folders,
    write_atomic,
)
from clipdeploy.engines.passport import BatchProfile
from clipdeploy.models.clip.tokenizer import VOCABULARY_FILE, vocabulary_data
from clipdeploy.packaging.artifact import Packable, copy_artifact, is_copy, labels_text
from clipdeploy.packaging.client import TextModel, client_source
from clipdeploy.packaging.dockerfile import dockerfile
from clipdeploy.packaging.servers import IMAGE, MATRIX, server_for
from clipdeploy.packaging.triton_config import (
    TritonConfig,
    batching,
    check_batch,
    triton_config,
    warmup_file,
)
from clipdeploy.workspace.proof import ReferenceProof
from exporters.samples import GraphSamples

__all__ = ["TritonConfig", "TritonPackage", "package_triton"]

_CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class TritonPackage(Shown):
    """A written Triton model: its folder and the version that contains the artifact.

    ``changed`` is False if that version already existed.  ``server`` is the image that can serve
    it, None if none is known.  ``max_batch`` is 0 for a model with a fixed batch.  ``text`` is the
    text tower that was written beside the image tower, None if there is none.
    ``reference`` says how the reference of the artifact was proven, None if that was not looked up.
    """

    path: Path
    model: Path
    name: str
    version: int
    changed: bool
    server: str | None
    max_batch: int
    preferred: tuple[int, ...]
    notes: tuple[str, ...]
    text: TritonPackage | None = None
    reference: ReferenceProof | None = None

    def __rich__(self) -> Renderable:
        batches = f"up to {self.max_batch} images" if self.max_batch else "one fixed batch"
        text = [("texts", f"{self.text.path}, version {self.text.version}")] if self.text else []
        rows = [
            ("model", f"{self.path}, version {self.version}"),
            *text,
            ("batch", batches),
            ("server", self.server or "unknown, see its Dockerfile"),
            ("made", "now" if self.changed else "before; nothing has changed since"),
        ]
        proof = [("reference", self.reference.sentence)] if self.reference else []
        return facts([*rows, *proof, *(("note", note) for note in self.notes)])


def package_triton(
    source: Packable,
    repository: Path,
    samples: GraphSamples,
    config: TritonConfig = TritonConfig(),
    *,
    texts: TextModel | None = None,
    force: bool = False,
) -> TritonPackage:
    """Write ``source`` as a model into ``repository``; ``samples`` supplies the warm-up image.

    ``texts`` is the text tower that the client compares images with.

    A new model is written atomically.  If the model exists, the artifact becomes its next version,
    or replaces the newest version with ``force``; an identical artifact is not written again.

    Raises:
        ArtifactError: Triton cannot serve the artifact, or the name belongs to another model.
        UsageError: the artifact does not accept the maximum batch.
        FileError: no permission or no disk space.
    """
    _check_servable(source)
    check_batch(source, config)
    name = config.name or f"{source.graph.model}-{source.graph.precision}"
    folder = repository / name
    restore_folders(folder)
    shared = _shared_files(source, name, config, samples, texts)
    if versions := _versions(folder):
        _check_same_model(folder, shared)
        model, changed = _next_version(source, folder, versions[-1], force=force)
        # The configuration is replaced last: until then the old one describes the same tensors.
        for path, data in sorted(shared.items(), key=lambda item: item[0] == _CONFIG):
            write_atomic(folder / path, data)
    else:
        model, changed = _new_model(source, folder, shared), True
    return _package(source, config, model, changed=changed)


def _file_name(source: Packable) -> str:
    return "model.plan" if source.engine else "model.onnx"


def _new_model(source: Packable, folder: Path, shared: Mapping[str, bytes]) -> Path:
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(
            f"{folder} exists and is not a model", hint="choose another --name, or remove it"
        )
    with atomic_folder(folder) as made:
        _write_version(source, made / "1" / _file_name(source))
        for path, data in shared.items():
            (made / path).parent.mkdir(exist_ok=True)
            (made / path).write_bytes(data)
    return folder / "1" / _file_name(source)


def _next_version(source: Packable, folder: Path, newest: int, *, force: bool) -> tuple[Path, bool]:
    """Write the artifact as a version unless it exists; return its path and whether it is new."""
    model = folder / str(newest) / _file_name(source)
    if not force and is_copy(source, model):
        return model, False
    version = folder / str(newest if force else newest + 1)
    with atomic_folder(version) as made:
        _write_version(source, made / _file_name(source))
    return version / _file_name(source), True


def _check_servable(source: Packable) -> None:
    engine = source.engine
    if engine is None:
        return
    if engine.backend == "tensorrt-rtx":
        raise ArtifactError(
            f"{source.path} is an engine of TensorRT-RTX, which Triton cannot load",
            hint=f"package the graph, {source.path.with_suffix('.onnx')}, or build with "
            "--backend tensorrt",
        )
    if source.fixed_batch is None and (missing := _first_gap(engine.profiles)):
        raise ArtifactError(
            f"no profile of {source.path} accepts {missing} image{'s' * (missing > 1)}, and Triton "
            "forms batches of any size",
            hint="build it with profiles that start at 1 and have no gaps",
        )


def _first_gap(profiles: tuple[BatchProfile, ...]) -> int:
    """The smallest batch below the maximum that no profile accepts; 0 if there is none."""
    most = max(high for _, _, high in profiles)
    accepted = {batch for low, _, high in profiles for batch in range(low, high + 1)}
    return min(set(range(1, most + 1)) - accepted, default=0)


def _versions(folder: Path) -> list[int]:
    if not folder.exists():
        return []
    with file_errors("read", folder):
        found = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in found if name.isdecimal() and int(name) > 0)


def _write_version(source: Packable, model: Path) -> None:
    with file_errors("copy", source.path):
        model.parent.mkdir(exist_ok=True)
        copy_artifact(source, model)
        model.with_name(f"{model.name}.json").write_bytes(source.passport_json)


def _interface(config: str) -> list[str]:
    """The parts of a configuration that all versions must share: backend, inputs, outputs."""
    parts = re.findall(r"^(?:backend:.*|(?:input|output) \{\n(?:  .*\n)*\})", config, re.MULTILINE)
    return [str(part) for part in parts]


def _check_same_model(folder: Path, shared: Mapping[str, bytes]) -> None:
    for name, part in ((_CONFIG, _interface), ("labels.txt", str.splitlines)):
        path = folder / name
        if not path.exists() or name not in shared:
            continue
        # Undecodable bytes are replaced, and so differ from the new text.
        existing = read_regular(path).decode("utf-8", "replace")
        if part(existing) != part(shared[name].decode()):
            raise ArtifactError(
                f"{folder} is another model: its {name} differs, and all versions share it",
                hint="choose another --name, or remove the folder",
            )


def _shared_files(
    source: Packable,
    name: str,
    config: TritonConfig,
    samples: GraphSamples,
    texts: TextModel | None,
) -> dict[str, bytes]:
    """The files that all versions share, by path."""
    spec = source.graph.input
    sample = samples.of(source.fixed_batch or 1).as_input(spec)
    files = {
        _CONFIG: triton_config(source, name, config).encode(),
        f"warmup/{warmup_file(source)}": sample.tobytes(),
        "Dockerfile": dockerfile(source, name).encode(),
    }
    if not source.graph.embeds:
        files["labels.txt"] = labels_text(source.graph)
    if source.graph.tower == "image":
        files["client.py"] = client_source(name, source.graph, texts).encode()
    if texts is not None:
        files[VOCABULARY_FILE] = vocabulary_data()
    return files


def _package(
    source: Packable, config: TritonConfig, model: Path, *, changed: bool
) -> TritonPackage:
    most, preferred = batching(source, config)
    release = server_for(source.engine)
    return TritonPackage(
        path=model.parent.parent,
        model=model,
        name=model.parent.parent.name,
        version=int(model.parent.name),
        changed=changed,
        server=release and f"{IMAGE}:{release}-py3",
        max_batch=most,
        preferred=preferred,
        notes=tuple(_notes(source, release)),
    )


def _notes(source: Packable, release: str | None) -> Iterator[str]:
    if source.engine and release is None:
        version = source.engine.backend_version
        yield (
            f"no known Triton release has TensorRT {version}: look it up in {MATRIX}, and pass it "
            "to docker build (see the Dockerfile)"
        )
    if source.engine is None and source.graph.precision == "int8":
        yield (
            "ONNX Runtime runs this INT8 graph slower than an FP16 graph on most GPUs; package an "
            "engine for speed"
        )
    if source.graph.precision == "int8-cpu":
        yield (
            "ONNX Runtime's fast INT8 kernels saturate on CPUs without VNNI: check the accuracy "
            "on the server, or package another precision"
        )
    if source.graph.weights.kind == "random":
        yield "the weights are random: use it only to measure speed"
