"""Loads a TensorRT engine into GPU memory once, and runs it with inputs from pinned memory.

Polygraphy's runner is made for debugging: it copies through pageable memory and allocates outputs
in every run.  This module uses PyTorch's CUDA allocator, streams and graphs instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import EngineError, first_line
from clipdeploy.core.passport import TensorSpec
from clipdeploy.engines.backends import (
    Backend,
    CapturedLog,
    capture_log,
    choose_backend,
    compiles_kernels_at_run_time,
    created,
    tensorrt_module,
)
from clipdeploy.engines.passport import BatchProfile
from clipdeploy.engines.preflight import Plan, preflight
from clipdeploy.runners.base import Closing, Images, Logits, batch_ranges, best_profile, in_parts
from clipdeploy.runners.kernel_cache import KernelCache, cache_file, runtime_config

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Engine", "EngineRunner", "layer_information"]


@dataclass
class _Launcher:
    """An execution context of one profile, or of one batch size with its CUDA graph."""

    context: trt.IExecutionContext
    graph: Any = None


def _backend(plan: Plan) -> Backend:
    return choose_backend("auto").backend if plan.passport is None else plan.passport.backend


def load_engine(plan: Plan) -> tuple[Any, trt.ICudaEngine]:
    """Deserialise an engine, and return the backend's module and the engine.

    ``engine_host_code_allowed`` stays off, so host code in a plan is never run.

    Raises:
        EngineError: TensorRT refuses the engine; the message quotes TensorRT.
    """
    module = tensorrt_module(_backend(plan))
    from polygraphy.backend.trt import get_trt_logger

    with capture_log() as log:
        runtime: trt.Runtime | None = created(lambda: module.Runtime(get_trt_logger()))
        if runtime is None:
            raise _cannot_start(f"{_backend(plan)} {module.__version__}", log)
        engine = runtime.deserialize_cuda_engine(plan.data)
    if engine is None:
        raise EngineError(
            f"TensorRT cannot load {plan.path}: {log.reason()}",
            hint="an engine is bound to its GPU and TensorRT version: build it again here",
        )
    _refit(module, plan, engine)
    return module, engine


def _cannot_start(what: str, log: CapturedLog) -> EngineError:
    return EngineError(
        f"{what} cannot start: {log.reason()}",
        hint="the driver may be too old, or GPU memory full: see clipdeploy doctor",
    )


def new_context(engine: trt.ICudaEngine, config: Any = None) -> trt.IExecutionContext:
    """Create an execution context, with the runtime configuration of TensorRT-RTX if given.

    Raises:
        EngineError: there is not enough GPU memory for the activations of the largest batch.
    """
    with capture_log() as log:
        context: trt.IExecutionContext | None = created(
            engine.create_execution_context
            if config is None
            else partial(engine.create_execution_context, config)
        )
    if context is None:
        raise EngineError(
            f"TensorRT cannot create an execution context: {log.reason()}",
            hint="free GPU memory, or build the engine with a smaller --max-batch",
        )
    return context


def enqueue(context: trt.IExecutionContext, stream: int) -> None:
    """Launch the engine on a CUDA stream, or record it if the stream is being captured.

    Raises:
        EngineError: TensorRT could not launch it.
    """
    if not context.execute_async_v3(stream):
        raise EngineError(
            "TensorRT failed to run the engine",
            hint="free GPU memory, or build the engine again on this machine",
        )


def layer_information(plan: Plan) -> str:
    """Return the JSON that TensorRT's engine inspector writes about an engine.

    Raises:
        EngineError: TensorRT refuses the engine.
    """
    module, engine = load_engine(plan)
    inspector: trt.EngineInspector = engine.create_engine_inspector()
    # Without a context that has the input shape, dynamic shapes are not listed.
    context = new_context(engine)
    name = engine.get_tensor_name(0)
    _, best, _ = engine.get_tensor_profile_shape(name, 0)
    _set_shape(context, name, best)
    inspector.execution_context = context
    return str(inspector.get_engine_information(module.LayerInformationFormat.JSON))


def _set_shape(context: trt.IExecutionContext, name: str, shape: Any) -> None:
    if not context.set_input_shape(name, shape):
        raise EngineError(
            f"the engine refuses a batch of {shape[0]} images",
            hint="build it with a --profile MIN,OPT,MAX that includes this batch",
        )


def _refit(module: Any, plan: Plan, engine: trt.ICudaEngine) -> None:
    """Load the weights of the graph next to a stripped engine into the engine."""
    if plan.passport is None or not plan.passport.settings.get("strip_weights"):
        return
    from clipdeploy.core.files import sha256_file
    from exporters.headers import check_weights

    graph = plan.path.with_suffix(".onnx")
    if not graph.exists() or sha256_file(graph) != plan.passport.hashes.graph:
        raise EngineError(
            f"{plan.path} has no weights, and its graph, {graph.name}, is missing or changed",
            hint=f"copy the graph next to it, or build it again: {plan.passport.rebuild}",
        )
    check_weights(graph)
    with capture_log() as log:
        fits = _refit_from(graph, module, engine)
    if not fits:
        raise EngineError(
            f"the weights of {graph} do not fit {plan.path}: {log.reason()}",
            hint=f"build it again: {plan.passport.rebuild}",
        )


def _refit_from(graph: Path, module: Any, engine: trt.ICudaEngine) -> bool:
    from polygraphy.backend.trt import get_trt_logger

    logger = get_trt_logger()
    refitter: trt.Refitter | None = created(lambda: module.Refitter(engine, logger))
    if refitter is None:
        return False
    parser: trt.OnnxParserRefitter | None = created(
        lambda: module.OnnxParserRefitter(refitter, logger)
    )
    if parser is None:
        return False
    return bool(parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine())


class Engine:
    """A loaded engine with its memory; see :class:`EngineRunner`, which splits larger batches.

    Raises:
        EngineError: there is no GPU, or the engine cannot run on this machine.
        ArtifactError: the engine's passport is missing or does not match its bytes.
    """

    def __init__(self, path: Path, *, trust: bool, cuda_graph: bool) -> None:
        plan = preflight(path, trust=trust)
        if not torch.cuda.is_available():
            raise EngineError(
                "PyTorch is built without CUDA, which engines need for their memory",
                hint="install the CUDA build of torch: pip install --force-reinstall torch",
            )
        self._engine: trt.ICudaEngine
        self._module, self._engine = load_engine(plan)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._config: Any = None
        self._kernels: KernelCache | None = None
        late = compiles_kernels_at_run_time(self._module)
        if late:
            self._config = runtime_config(self._module, self._engine, cuda_graph=cuda_graph)
            path = cache_file(plan.sha256, str(self._module.__version__), gpus()[0])
            self._kernels = KernelCache(self._config, path)
        # TensorRT-RTX records CUDA graphs itself, and no stream may be captured twice.
        self._records = cuda_graph and not late
        self.input, self.output = self._tensors()
        self.profiles = self._read_profiles()
        self.batches = (
            min(low for low, _, _ in self.profiles),
            max(high for _, _, high in self.profiles),
        )
        gpu = torch.cuda.get_device_name()
        self.name = f"{_backend(plan)} {self._module.__version__} on {gpu}"
        self._host_in, self._in = self._memory(self.input)
        self._host_out, self._out = self._memory(self.output)
        self._launchers: dict[tuple[int, int], _Launcher] = {}

    def _tensors(self) -> tuple[TensorSpec, TensorSpec]:
        engine, kind = self._engine, self._module.TensorIOMode
        found: dict[Any, list[TensorSpec]] = {kind.INPUT: [], kind.OUTPUT: []}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = np.dtype(self._module.nptype(engine.get_tensor_dtype(name))).name
            batch, *rest = engine.get_tensor_shape(name)
            shape = ("batch" if batch < 0 else int(batch), *(int(axis) for axis in rest))
            found[engine.get_tensor_mode(name)].append(TensorSpec(name, dtype, shape))
        if len(found[kind.INPUT]) != 1 or len(found[kind.OUTPUT]) != 1:
            raise EngineError(
                "the engine does not have one input and one output",
                hint="build an image classifier with clipdeploy build-engine",
            )
        return found[kind.INPUT][0], found[kind.OUTPUT][0]

    def _read_profiles(self) -> tuple[BatchProfile, ...]:
        engine, name = self._engine, self.input.name
        shapes = [
            engine.get_tensor_profile_shape(name, index)
            for index in range(engine.num_optimization_profiles)
        ]
        return tuple((int(low[0]), int(best[0]), int(high[0])) for low, best, high in shapes)

    def _memory(self, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate pinned and device memory for the largest batch of a tensor."""
        shape = (self.batches[1], *(int(axis) for axis in spec.shape[1:]))
        dtype = getattr(torch, spec.dtype)
        try:
            pinned = torch.empty(shape, dtype=dtype, pin_memory=True)
            return pinned, torch.empty(shape, dtype=dtype, device="cuda")
        except torch.cuda.OutOfMemoryError as error:
            raise EngineError(
                f"not enough GPU memory for a {spec.dtype} tensor of shape {shape}",
                hint="build the engine with a smaller --max-batch, or free GPU memory",
            ) from error

    def _launcher(self, batch: int, profile: int | None = None) -> _Launcher:
        if profile is None:
            profile = best_profile(self.profiles, batch)
        # A recorded CUDA graph has fixed shapes and needs a separate context.
        key = (profile, batch if self._records else 0)
        if key not in self._launchers:
            self._launchers[key] = _Launcher(self._context(profile))
        launcher = self._launchers[key]
        _set_shape(launcher.context, self.input.name, (batch, *self._in.shape[1:]))
        if self._records and launcher.graph is None:
            launcher.graph = self._record(launcher.context)
        return launcher

    def _context(self, profile: int) -> trt.IExecutionContext:
        """Create a context of ``profile`` that reads and writes the engine's memory."""
        context = new_context(self._engine, self._config)
        if not (
            context.set_optimization_profile_async(profile, self._stream.cuda_stream)
            and context.set_tensor_address(self.input.name, self._in.data_ptr())
            and context.set_tensor_address(self.output.name, self._out.data_ptr())
        ):
            raise EngineError(
                f"TensorRT refuses batch profile {profile} or the memory of the engine",
                hint="free GPU memory, or build the engine again on this machine",
            )
        return context

    def _record(self, context: trt.IExecutionContext) -> Any:
        # The first run may allocate memory, which is not allowed while recording.
        enqueue(context, self._stream.cuda_stream)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                enqueue(context, torch.cuda.current_stream().cuda_stream)
        # PyTorch's error, for a capture that the failed launch made invalid, hides the first one.
        except (EngineError, RuntimeError) as error:
            raise EngineError(
                f"the engine cannot be recorded as a CUDA graph: {first_line(error)}",
                hint="run it without a CUDA graph",
            ) from error
        return graph

    def _launch(self, launcher: _Launcher) -> None:
        if launcher.graph is not None:
            launcher.graph.replay()
        else:
            enqueue(launcher.context, self._stream.cuda_stream)

    def run(self, images: NDArray[Any], profile: int | None = None) -> NDArray[np.float32]:
        """Images (B, ...) -> logits (B, classes), in the given or else the best profile."""
        batch = len(images)
        with torch.cuda.stream(self._stream):
            launcher = self._launcher(batch, profile)
            self._host_in[:batch].copy_(torch.from_numpy(images))
            self._in[:batch].copy_(self._host_in[:batch], non_blocking=True)
            self._launch(launcher)
            self._host_out[:batch].copy_(self._out[:batch], non_blocking=True)
        self._stream.synchronize()
        logits: NDArray[np.float32] = self._host_out[:batch].float().numpy().copy()
        return logits

    def device_seconds(self, images: NDArray[Any]) -> float:
        """Seconds between two CUDA events around one launch; images (B, ...) are copied before."""
        batch = len(images)
        with torch.cuda.stream(self._stream):
            launcher = self._launcher(batch)
            self._in[:batch].copy_(torch.from_numpy(images))
            before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            before.record(self._stream)
            self._launch(launcher)
            after.record(self._stream)
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    def close(self) -> None:
        """Save the compiled kernels; free the contexts, the engine and its memory."""
        if self._kernels is not None:
            self._kernels.save()
        self._launchers.clear()
        self._kernels = self._config = None
        del self._engine, self._in, self._out, self._host_in, self._host_out


class EngineRunner(Closing):
    """Runs a TensorRT engine on the first GPU.

    Memory is allocated once, for the largest batch, and transfers go through pinned memory.
    ``cuda_graph`` records the launches of each batch size once and replays them.  ``trust`` loads
    the engine without comparing it with its passport.  The kernels that TensorRT-RTX compiles are
    kept in the cache folder, see :mod:`clipdeploy.runners.kernel_cache`.

    Raises:
        EngineError: there is no GPU, or the engine cannot run on this machine.
        ArtifactError: the engine's passport is missing or does not match its bytes.
    """

    def __init__(self, engine: Path, *, trust: bool = False, cuda_graph: bool = False) -> None:
        self._loaded = Engine(engine, trust=trust, cuda_graph=cuda_graph)
        self.name, self.input = self._loaded.name, self._loaded.input
        self.batches: tuple[int, int | None] = self._loaded.batches
        self.profiles = self._loaded.profiles

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`."""
        return in_parts(self._loaded.run, images, batch_ranges(self))

    def run_in(self, profile: int, images: Images) -> Logits:
        """See :class:`Runner`."""
        smallest, _, largest = self.profiles[profile]
        run = partial(self._loaded.run, profile=profile)
        return in_parts(run, images, [(smallest, largest)])

    def device_seconds(self, images: Images) -> float | None:
        """See :class:`Runner`; measured with two CUDA events around the launch."""
        return self._loaded.device_seconds(images)

    def close(self) -> None:
        """Free the engine's memory."""
        self._loaded.close()
