"""Every name of TensorRT that the code uses exists, and every call fits its signature.

Checked against NVIDIA's own bindings: the oldest and the newest TensorRT, and TensorRT-RTX.  This
says that the calls are spelt right, not that they work: docs/gpu.md lists what has been run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorrt_bindings import NEWEST, OLDEST, bindings, describe
from tensorrt_uses import Names, misfits, missing, uses

import clipdeploy
from clipdeploy.engines.compiler import _HARDWARE

SOURCE = Path(clipdeploy.__file__).parent
FILES = sorted(p for p in SOURCE.rglob("*.py") if "trt" in p.read_text() and p.name != "zoo.py")
RTX = "tensorrt_rtx"
# What a version lacks; the code asks for it first, with hasattr.
RTX_ONLY = {
    ("ComputeCapability",),
    ("ComputeCapability", "__members__"),
    ("CudaGraphStrategy",),
    ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
    ("DynamicShapesKernelSpecializationStrategy",),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    ("IRuntimeCache",),
    ("IRuntimeCache", "deserialize"),
    ("IRuntimeCache", "serialize"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "set_runtime_cache"),
}
STREAMING = {
    ("Builder", "build_serialized_network_to_stream"),
    ("IStreamWriter", "__init__"),
    ("IStreamWriter", "write"),
    ("IStreamWriter",),
}
LACKS = {OLDEST: RTX_ONLY | STREAMING, NEWEST: RTX_ONLY, RTX: set()}


@pytest.fixture(scope="module", params=LACKS, ids=lambda text: text.replace("==", "-"))
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def names(version: str, pytestconfig: pytest.Config) -> Names:
    if version == RTX:
        pytest.importorskip(RTX, reason="TensorRT-RTX has no wheel for this platform")
        return describe(None)
    return describe(bindings(version, pytestconfig.cache.mkdir("tensorrt-bindings")))


def test_the_uses_of_tensorrt_are_found() -> None:
    assert {"backends.py", "compiler.py", "engine.py"} <= {path.name for path in FILES}
    found = {use.name for path in FILES for use in uses(path.read_text())}
    assert {
        ("Runtime", "deserialize_cuda_engine"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_input_shape"),
        ("MemoryPoolType", "WORKSPACE"),
        ("BuilderFlag", "TF32"),
        ("TensorIOMode", "INPUT"),
        ("ICudaEngine", "create_engine_inspector"),
        ("IProgressMonitor", "step_complete"),
        ("nptype",),
    } <= found


def test_every_name_exists(version: str, names: Names) -> None:
    lacking = {name for path in FILES for name in missing(path.read_text(), names)}
    assert lacking == LACKS[version]


def test_every_call_fits_its_signature(names: Names) -> None:
    assert {path.name: found for path in FILES if (found := misfits(path.read_text(), names))} == {}


def test_members_that_are_chosen_by_their_name_exist(names: Names) -> None:
    assert set(_HARDWARE.values()) <= names["HardwareCompatibilityLevel"].keys()


def test_what_the_code_asks_for_comes_with_what_it_then_uses(names: Names) -> None:
    late = ("IRuntimeCache", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy")
    assert len({each in names for each in late}) == 1
    streams = "build_serialized_network_to_stream" in names["Builder"]
    assert streams == ("IStreamWriter" in names)


def test_host_code_of_an_engine_is_never_enabled(names: Names) -> None:
    name = ("Runtime", "engine_host_code_allowed")
    assert name[1] in names[name[0]]
    found = {use.name for path in FILES for use in uses(path.read_text())}
    assert name not in found
    assert name in {u.name for u in uses(f"def f(runtime: trt.Runtime): runtime.{name[1]} = True")}


@pytest.mark.parametrize(
    "source",
    [
        "module.Runtimes(logger)",
        "self._module.MemoryPoolType.WORKSPCE",
        "def f(engine: trt.ICudaEngine): engine.create_execution_contxt()",
        "config.set_flag(trt.BuilderFlag.INT9)",
        "kinds = module.TensorIOMode\nkinds.INPTU",
        "def f() -> trt.IExecutionContext: ...\ncontext = f()\ncontext.execute_async_v4(0)",
        "def f() -> tuple[Any, trt.ICudaEngine]: ...\n_, engine = f()\nengine.num_profiles",
        "base: type[trt.IProgressMonitor] = x\nclass A(base):\n  def phase_started(self): ...",
    ],
)
def test_a_misspelt_name_is_found(source: str, names: Names) -> None:
    assert len(missing(source, names)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "module.Runtime()",
        "module.Runtime(logger, 2)",
        "module.nptype()",
        "def f(context: trt.IExecutionContext): return context.execute_async_v3()",
        "def f(context: trt.IExecutionContext): return context.execute_async_v3(0, 1)",
        "def f(context: trt.IExecutionContext): return context.execute_async_v3(stream=0)",
        "def f(context: trt.IExecutionContext): context.execute_async_v3(0)",
        "def f(context: trt.IExecutionContext): context.set_input_shape('x', (1,))",
        "def f(engine: trt.ICudaEngine): partial(engine.create_execution_context, 1, 2)",
    ],
)
def test_a_call_that_does_not_fit_is_found(source: str, names: Names) -> None:
    assert len(misfits(source, names)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "module.Runtime(logger)",
        "def f(context: trt.IExecutionContext): return context.execute_async_v3(stream_handle=0)",
        "def f(engine: trt.ICudaEngine): engine.create_execution_context()",
        "def f(engine: trt.ICudaEngine): partial(engine.create_execution_context, config)",
    ],
)
def test_a_call_that_fits_is_not_reported(source: str, names: Names) -> None:
    assert misfits(source, names) == []
