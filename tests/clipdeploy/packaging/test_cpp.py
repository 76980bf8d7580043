"""Tests that the C++ program compiles and computes the same logits as Python."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from clipdeploy.core.errors import ArtifactError, FileError
from clipdeploy.engines.passport import load_engine_passport
from clipdeploy.models import cards
from clipdeploy.packaging.artifact import open_packable
from clipdeploy.packaging.cpp import package_cpp as write_program
from clipdeploy.packaging.cpp import sample_count
from clipdeploy.pipeline import package_cpp, sample_images
from clipdeploy.runners.onnx import OnnxRunner
from exporters.headers import read_passport

Graphs = dict[str, Path]
DescribedEngine = Callable[..., Path]
SUPPORT = Path(__file__).parents[2] / "support"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
TOYS = (f"-I{SUPPORT / 'tensorrt_stub'}", f"-I{SUPPORT / 'cuda_stub'}")
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror")


def header_folder(variable: str, header: str, *folders: str) -> Path | None:
    """The folder of a library's headers, from an environment variable or Debian's path."""
    for folder in (os.environ.get(variable), *folders):
        if folder and (Path(folder) / header).is_file():
            return Path(folder)
    return None


ONNXRUNTIME = header_folder(
    "ONNXRUNTIME_INCLUDE_DIR",
    "onnxruntime_c_api.h",
    "/usr/include/onnxruntime",
    "/usr/local/include/onnxruntime",
    "/usr/local/include",
)
TENSORRT = header_folder(
    "TENSORRT_INCLUDE_DIR", "NvInfer.h", "/usr/include/x86_64-linux-gnu", "/usr/include"
)
CUDA = header_folder("CUDA_INCLUDE_DIR", "cuda_runtime_api.h", "/usr/local/cuda/include")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: apt install g++")


def wheel_library() -> Path:
    """The library in Python's wheel, so that both programs run the same kernels."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    found = sorted(folder.glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this platform's wheel of ONNX Runtime holds no shared library")
    return found[0]


def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def compile_program(folder: Path, program: Path, sources: Sequence[str], *flags: str) -> None:
    words = (str(COMPILER), *FLAGS, *(str(folder / name) for name in sources), *flags)
    run(*words, "-o", program)


@dataclass(frozen=True)
class Built:
    """A package that was compiled with CMake."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "build" / "classify"


@pytest.fixture(scope="module")
def built(graphs: Graphs, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The FP32 graph's package, built by its own CMakeLists.txt."""
    if COMPILER is None or shutil.which("cmake") is None:
        pytest.skip("no C++ compiler or no CMake: apt install g++ cmake")
    if ONNXRUNTIME is None:
        pytest.skip(
            "no headers of ONNX Runtime: apt install libonnxruntime-dev (from Debian 13 on), "
            "or set ONNXRUNTIME_INCLUDE_DIR"
        )
    folder = tmp_path_factory.mktemp("cpp") / "package"
    package_cpp(graphs["fp32"], folder)
    build = folder / "build"
    run(
        *("cmake", "-S", folder, "-B", build, "-DCMAKE_CXX_FLAGS=-Werror"),
        *(f"-DONNXRUNTIME_INCLUDE_DIR={ONNXRUNTIME}", f"-DONNXRUNTIME_LIBRARY={wheel_library()}"),
    )
    run("cmake", "--build", build)
    return Built(folder)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "uint8", "batch 4", "half"])
def test_its_logits_equal_those_of_python(
    kind: str, built: Built, graphs: Graphs, tmp_path: Path
) -> None:
    made = package_cpp(graphs[kind], tmp_path / "package")
    spec = read_passport(graphs[kind]).input
    count = sample_count(open_packable(graphs[kind]))
    axes = [int(axis) for axis in spec.shape[1:]]
    images = np.fromfile(made.path / "image.raw", spec.dtype).reshape(count, *axes)
    done = run(built.program, made.model, made.path / "image.raw")
    logits = np.array([line.split() for line in done.stdout.splitlines()], np.float32)
    # The same kernels and nine digits per float need no tolerance.
    np.testing.assert_array_equal(logits, OnnxRunner(graphs[kind])(images))
    np.testing.assert_array_equal(logits, np.loadtxt(made.path / "logits.txt", np.float32))
    assert logits.argmax(axis=1).tolist() != [0] * count


def test_its_own_test_passes_and_fails_on_other_logits(built: Built) -> None:
    words = ("ctest", "--test-dir", built.folder / "build")
    assert "1/1 Test #1: sample" in run(*words).stdout
    logits = built.folder / "logits.txt"
    whole = logits.read_text()
    logits.write_text(whole.replace(whole.split()[3], "-7.5", 1))
    try:
        assert run(*words, check=False).returncode != 0
    finally:
        logits.write_text(whole)


def test_errors_are_reported(built: Built, graphs: Graphs, tmp_path: Path) -> None:
    model, image = built.folder / "model.onnx", built.folder / "image.raw"
    cut = tmp_path / "cut.raw"
    cut.write_bytes(image.read_bytes()[:-1])
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no graph")
    short, nan = tmp_path / "short.txt", tmp_path / "nan.txt"
    short.write_text("1 2 3\n")
    nan.write_text(" ".join(["nan"] * 30))
    one = tmp_path / "one.raw"
    one.write_bytes(image.read_bytes()[: image.stat().st_size // 3])
    for words, code, said in (
        ((), 2, "usage: classify MODEL IMAGES.raw"),
        ((model, tmp_path / "gone.raw"), 1, "cannot read"),
        ((model, cut), 1, "the images have 36863 bytes, one image has 12288"),
        ((garbage, image), 1, "error: ONNX Runtime: "),
        ((tmp_path / "gone.onnx", image), 1, "error: ONNX Runtime: "),
        ((model, image, short), 1, "has 3 logits, the model computed 30"),
        ((model, image, nan), 1, ""),
        ((graphs["batch 4"], one), 1, "the model has a fixed batch of 4 images, the file has 1"),
    ):
        done = run(built.program, *words, check=False)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr


@needs_compiler
def test_every_half_is_converted_as_by_numpy(graphs: Graphs, tmp_path: Path) -> None:
    made = package_cpp(graphs["fp32"], tmp_path / "package")
    (tmp_path / "halves.cpp").write_text(
        '#include <cstdio>\n#include "model.h"\nint main() {\n'
        "  for (unsigned bits = 0; bits < 65536; ++bits) {\n"
        "    const float value = from_half(static_cast<std::uint16_t>(bits));\n"
        "    std::fwrite(&value, sizeof value, 1, stdout);\n  }\n}\n"
    )
    compile_program(tmp_path, tmp_path / "halves", ["halves.cpp"], f"-I{made.path}")
    raw = subprocess.run([tmp_path / "halves"], capture_output=True, check=True).stdout
    wanted = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.frombuffer(raw, np.float32), wanted)


@needs_compiler
def test_the_tensorrt_program_runs_with_a_fake_tensorrt(
    described_engine: DescribedEngine, tmp_path: Path
) -> None:
    """The fake implements each call as TensorRT's documentation describes it."""
    made = package_cpp(described_engine(), tmp_path / "package")
    program = tmp_path / "classify"
    sources = ("main.cpp", "tensorrt_model.cpp")
    compile_program(made.path, program, sources, *TOYS)
    plan, images = tmp_path / "toy.engine", tmp_path / "images.raw"
    plan.write_text("toy 4 3 1 2 4 6")
    for count in (1, 2, 5):
        pixels = np.arange(4 * count, dtype=np.float32)
        pixels.tofile(images)
        done = run(program, plan, images)
        logits = np.array([line.split() for line in done.stdout.splitlines()], np.float32)
        wanted = pixels.reshape(count, 4).sum(axis=1, keepdims=True) * np.arange(1, 4)
        np.testing.assert_array_equal(logits, wanted)
    for count in (3, 7):
        np.zeros(4 * count, np.float32).tofile(images)
        done = run(program, plan, images, check=False)
        assert done.returncode == 1
        assert f"no profile of the engine accepts {count} images" in done.stderr
    plan.write_text("another version")
    done = run(program, plan, images, check=False)
    assert done.returncode == 1
    assert "TensorRT: magicTag does not match\n" in done.stderr
    assert "error: TensorRT cannot load the engine" in done.stderr
    assert "chatter" not in done.stderr


@needs_compiler
@pytest.mark.skipif(CUDA is None, reason="no headers of CUDA")
@pytest.mark.parametrize("tensorrt", ["toy", "real"])
def test_the_tensorrt_program_compiles_with_the_real_headers(
    tensorrt: str, described_engine: DescribedEngine, tmp_path: Path
) -> None:
    if tensorrt == "real" and TENSORRT is None:
        pytest.skip("no headers of TensorRT: set TENSORRT_INCLUDE_DIR")
    made = package_cpp(described_engine(), tmp_path / "package")
    headers = f"-isystem{TENSORRT}" if tensorrt == "real" else TOYS[0]
    flags = (headers, f"-isystem{CUDA}", "-fsyntax-only")
    run(str(COMPILER), *FLAGS, made.path / "tensorrt_model.cpp", *flags)


def test_no_program_enables_host_code(described_engine: DescribedEngine, tmp_path: Path) -> None:
    made = package_cpp(described_engine(), tmp_path / "package")
    code = (made.path / "tensorrt_model.cpp").read_text()
    lines = [line for line in code.splitlines() if not line.lstrip().startswith("//")]
    assert "HostCodeAllowed" not in "\n".join(lines)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_is_packaged_for_its_runtime(
    backend: str, described_engine: DescribedEngine, tmp_path: Path
) -> None:
    engine = described_engine(backend=backend, profiles=((4, 8, 16),))
    made = package_cpp(engine, tmp_path / "package")
    assert made.runtime == backend
    assert f"set(RUNTIME {backend} " in (made.path / "CMakeLists.txt").read_text()
    assert load_engine_passport(made.model) == load_engine_passport(engine)
    # Eight images, because the profile accepts no fewer than four.
    assert (made.path / "image.raw").stat().st_size == 8 * 3 * 32 * 32 * 4
    assert not (made.path / "logits.txt").exists()
    assert made.notes
    labels = (made.path / "labels.txt").read_text().split()
    assert labels == [name for name, _ in cards.class_names(cards.find(cards.DEMO))]


def test_a_cpu_graph_is_run_with_exact_int8(graphs: Graphs, tmp_path: Path) -> None:
    source = open_packable(graphs["int8"])
    cpu = replace(source, graph=replace(source.graph, precision="int8-cpu"))
    for packable, asked in ((source, False), (cpu, True)):
        folder = tmp_path / packable.graph.precision
        write_program(packable, folder, sample_images(source.graph.preprocess))
        assert ("classify PRIVATE EXACT_INT8" in (folder / "CMakeLists.txt").read_text()) == asked


def test_the_same_package_is_unchanged_and_another_needs_force(
    graphs: Graphs, tmp_path: Path
) -> None:
    folder = tmp_path / "package"
    assert package_cpp(graphs["fp32"], folder).changed
    (folder / "build").mkdir()
    assert not package_cpp(graphs["fp32"], folder).changed
    with pytest.raises(ArtifactError, match="already has another package"):
        package_cpp(graphs["fp16"], folder)
    assert (folder / "build").exists()
    made = package_cpp(graphs["fp16"], folder, force=True)
    assert made.model.read_bytes() == graphs["fp16"].read_bytes()
    assert not (folder / "build").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_other_files_is_never_replaced(graphs: Graphs, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    for force in (False, True):
        with pytest.raises(ArtifactError, match="has other files"):
            package_cpp(graphs["fp32"], tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_package_is_written_atomically(
    failure: BaseException, graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half of")
        raise failure

    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises((FileError, KeyboardInterrupt)):
        package_cpp(graphs["fp32"], tmp_path / "package")
    assert list(tmp_path.iterdir()) == []
