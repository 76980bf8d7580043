"""A model repository of NVIDIA's Triton Inference Server.

REPOSITORY/NAME/config.pbtxt    inputs, outputs, batching, instances, warm-up
                labels.txt      a class a line
                warmup/         a real image, as the model takes it
                client.py       sends images, prints the five best classes
                Dockerfile      the server whose TensorRT is the engine's
                1/model.plan    or model.onnx, its passport beside it
"""

from __future__ import annotations

import re
import shutil
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
    sha256_file,
    write_atomic,
)
from clipdeploy.engines.passport import BatchProfile
from clipdeploy.packaging.artifact import Packable, labels
from clipdeploy.packaging.client import client_source
from clipdeploy.packaging.dockerfile import dockerfile
from clipdeploy.packaging.servers import IMAGE, MATRIX, server_for
from clipdeploy.packaging.triton_config import (
    WARMUP,
    TritonConfig,
    batching,
    check_batch,
    triton_config,
)
from exporters.samples import Samples

__all__ = ["TritonConfig", "TritonPackage", "package_triton"]

_CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class TritonPackage(Shown):
    """What was written: the model's folder, and the version that holds the artifact.

    ``changed`` is False if that version was already there.  ``server`` is the release that serves
    it, None if none is known.  ``max_batch`` is 0 for a model of one fixed batch.
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

    def __rich__(self) -> Renderable:
        batches = f"up to {self.max_batch} images" if self.max_batch else "one fixed batch"
        rows = [
            ("model", f"{self.path}, version {self.version}"),
            ("at once", batches),
            ("server", self.server or "not known, see its Dockerfile"),
            ("made", "now" if self.changed else "before; nothing has changed since"),
        ]
        return facts([*rows, *(("note", note) for note in self.notes)])


def package_triton(
    source: Packable,
    repository: Path,
    samples: Samples,
    config: TritonConfig = TritonConfig(),
    *,
    force: bool = False,
) -> TritonPackage:
    """Write ``source`` as a model of ``repository``; ``samples`` holds the image of the warm-up.

    A new model appears whole.  Where it exists, the artifact becomes its next version, or replaces
    the newest one with ``force``; the same artifact again is left as it is.

    Raises:
        ArtifactError: Triton cannot serve it, or another kind of model has that name there.
        UsageError: a larger batch than the artifact takes.
        FileError: no permission, no space.
    """
    _check_servable(source)
    check_batch(source, config)
    name = config.name or f"{source.graph.model}-{source.graph.precision}"
    folder = repository / name
    restore_folders(folder)
    about = _about(source, name, config, samples)
    if versions := _versions(folder):
        _check_same_kind(folder, about)
        model, changed = _next_version(source, folder, versions[-1], force=force)
        # Until the configuration is replaced the older one names the same tensors.
        for path, data in sorted(about.items(), key=lambda item: item[0] == _CONFIG):
            write_atomic(folder / path, data)
    else:
        model, changed = _new_model(source, folder, about), True
    return _package(source, config, model, changed=changed)


def _file(source: Packable) -> str:
    return "model.plan" if source.engine else "model.onnx"


def _new_model(source: Packable, folder: Path, about: Mapping[str, bytes]) -> Path:
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(
            f"{folder} is there, and is no model", hint="choose another --name, or remove it"
        )
    with atomic_folder(folder) as made:
        _write_version(source, made / "1" / _file(source))
        for path, data in about.items():
            (made / path).parent.mkdir(exist_ok=True)
            (made / path).write_bytes(data)
    return folder / "1" / _file(source)


def _next_version(source: Packable, folder: Path, newest: int, *, force: bool) -> tuple[Path, bool]:
    """The artifact as a version, and whether it had to be written."""
    model = folder / str(newest) / _file(source)
    if not force and model.exists() and sha256_file(model) == source.sha256:
        return model, False
    version = folder / str(newest if force else newest + 1)
    with atomic_folder(version) as made:
        _write_version(source, made / _file(source))
    return version / _file(source), True


def _check_servable(source: Packable) -> None:
    engine = source.engine
    if engine is None:
        return
    if engine.backend == "tensorrt-rtx":
        raise ArtifactError(
            f"{source.path} is an engine of TensorRT-RTX, which no backend of Triton loads",
            hint=f"package the graph, {source.path.with_suffix('.onnx')}, or build with "
            "--backend tensorrt",
        )
    if engine.settings.get("strip_weights"):
        raise ArtifactError(
            f"{source.path} holds no weights, and Triton cannot put them in",
            hint="build it without --strip-weights",
        )
    if source.fixed_batch is None and (missing := _untaken(engine.profiles)):
        raise ArtifactError(
            f"no profile of {source.path} takes {missing} image{'s' * (missing > 1)}, and Triton "
            "makes batches of any size",
            hint="build it with profiles that begin at 1 and leave no gap",
        )


def _untaken(profiles: tuple[BatchProfile, ...]) -> int:
    """The smallest batch below the largest that no profile takes; 0 if there is none."""
    most = max(high for _, _, high in profiles)
    taken = {batch for low, _, high in profiles for batch in range(low, high + 1)}
    return min(set(range(1, most + 1)) - taken, default=0)


def _versions(folder: Path) -> list[int]:
    if not folder.exists():
        return []
    with file_errors("read", folder):
        found = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in found if name.isdecimal() and int(name) > 0)


def _write_version(source: Packable, model: Path) -> None:
    with file_errors("copy", source.path):
        model.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path, model)
        model.with_name(f"{model.name}.json").write_bytes(source.passport_json)


def _interface(config: str) -> list[str]:
    """The lines of a configuration that every version must share: backend, inputs, outputs."""
    kept = re.findall(r"^(?:backend:.*|(?:input|output) \{\n(?:  .*\n)*\})", config, re.MULTILINE)
    return [str(part) for part in kept]


def _check_same_kind(folder: Path, about: Mapping[str, bytes]) -> None:
    for name, part in ((_CONFIG, _interface), ("labels.txt", str.splitlines)):
        path = folder / name
        if not path.exists():
            continue
        # What cannot be decoded differs from what would be written.
        there = read_regular(path).decode("utf-8", "replace")
        if part(there) != part(about[name].decode()):
            raise ArtifactError(
                f"{folder} is another model: its {name} differs, and its versions share one",
                hint="choose another --name, or remove the folder",
            )


def _about(source: Packable, name: str, config: TritonConfig, samples: Samples) -> dict[str, bytes]:
    """Everything beside the versions, by its path."""
    spec = source.graph.input
    image = samples.of(source.fixed_batch or 1).as_input(spec)
    return {
        _CONFIG: triton_config(source, name, config).encode(),
        "labels.txt": ("\n".join(labels(source.graph)) + "\n").encode(),
        f"warmup/{WARMUP}": image.tobytes(),
        "client.py": client_source(name, source.graph).encode(),
        "Dockerfile": dockerfile(source, name).encode(),
    }


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
        yield (
            f"no release of Triton with TensorRT {source.engine.backend_version} is known to "
            f"clipdeploy: look it up in {MATRIX}, and pass it to docker build (see the Dockerfile)"
        )
    if source.engine is None and source.graph.precision == "int8":
        yield (
            "ONNX Runtime runs this INT8 graph slower than an FP16 one on most GPUs: for speed, "
            "package an engine"
        )
    if source.graph.precision == "int8-cpu":
        yield (
            "on a server without VNNI ONNX Runtime's fast INT8 kernels saturate: check the "
            "accuracy there, or package another precision"
        )
    if source.graph.weights.kind == "random":
        yield "its weights are random: good for measuring speed, and for nothing else"
