"""One TensorRT flavour as a compiler: a graph and a configuration in, a plan out."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import BuildError, first_line
from clipdeploy.core.files import check_writable
from clipdeploy.core.interrupts import interrupts
from clipdeploy.core.passport import TensorSpec
from clipdeploy.engines.backends import Backend, default_capabilities, hears, targets_capabilities
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.build_monitor import build_monitor
from clipdeploy.engines.plan_writer import Piece, StreamingBuilder

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Compiler"]

# The smallest compute capability with matrix units for a type (NVIDIA's support matrix).
_NEEDS = {"BF16": (8, 0), "FP8": (8, 9)}
_HARDWARE = {"ampere-plus": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}
_PROBED = {
    "--strip-weights": BuildConfig(strip_weights=True),
    "--refittable": BuildConfig(refittable=True),
}
_PROBE_INPUT = TensorSpec("image", "float32", ("batch", 16, 16))


def _probe_graph() -> bytes:
    """One Linear with a softmax behind it: the smallest graph that has weights and a GEMM."""
    import numpy as np
    import onnx

    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.ones((16, 16), np.float32), "weight")
    nodes = [
        helper.make_node("MatMul", ["image", "weight"], ["product"]),
        helper.make_node("Softmax", ["product"], ["logits"]),
    ]
    shape = _PROBE_INPUT.shape
    inputs = [helper.make_tensor_value_info("image", float32, shape)]
    outputs = [helper.make_tensor_value_info("logits", float32, shape)]
    graph = helper.make_graph(nodes, "probe", inputs, outputs, [weight])
    opset = helper.make_opsetid("", 20)
    probe: bytes = helper.make_model(
        graph, opset_imports=[opset], ir_version=10
    ).SerializeToString()
    return probe


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    # TensorRT's code generator writes to the file descriptor, past every logger.
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class Compiler:
    """``module`` is that of ``backend``, as ``backends.tensorrt_module`` gives it."""

    def __init__(self, backend: Backend, module: ModuleType) -> None:
        self.backend = backend
        self.module = module
        self.version = str(module.__version__)

    def capabilities(self, asked: Sequence[str]) -> tuple[str, ...]:
        """The compute capabilities that an engine will run on."""
        if targets_capabilities(self.module):
            return tuple(asked) or default_capabilities(self.module)
        return tuple(gpu.capability for gpu in gpus()[:1])

    def check_flags(self, config: BuildConfig) -> None:
        """Try the options that not every flavour and machine can do on a one-Linear graph.

        Raises:
            BuildError: one of them cannot be done here; it says which.
        """
        asked = {"--strip-weights": config.strip_weights, "--refittable": config.refittable}
        for option, alone in _PROBED.items():
            if not asked[option]:
                continue
            try:
                with _silent_stderr():
                    self.compile(_probe_graph(), _PROBE_INPUT, alone, None, lambda piece: None)
            except BuildError as error:
                where = "here" if gpus() else "on a machine without a GPU"
                raise BuildError(
                    f"{self.backend} {self.version} has no {option} {where}",
                    hint=f"leave it out, or build with --backend tensorrt on a GPU; {error.hint}",
                ) from error

    def _check_types(self, network: trt.INetworkDefinition, capabilities: Sequence[str]) -> None:
        """Refuse a type of tensor that a target has no units for, such as FP8 on Ampere.

        Raises:
            BuildError: the network has one.
        """
        types = set()
        for index in range(network.num_layers):
            layer: trt.ILayer = network.get_layer(index)
            types |= {layer.get_output_type(output).name for output in range(layer.num_outputs)}
        for kind in sorted(_NEEDS.keys() & types):
            for capability in capabilities:
                if tuple(int(part) for part in capability.split(".")) < _NEEDS[kind]:
                    raise BuildError(
                        f"the graph asks for {kind.lower()}, which SM {capability} cannot compute",
                        hint="build --fp16 or --int8, or for SM {}.{} and newer".format(
                            *_NEEDS[kind]
                        ),
                    )

    def timing_cache(self, config: BuildConfig, folder: Path) -> Path | None:
        """The file of measured kernel times, a flavour, version and GPU each; None if unused.

        TensorRT-RTX chooses kernels when the engine is loaded and times nothing at build.

        Raises:
            FileError: the cache folder cannot be written.
        """
        if not config.timing_cache or targets_capabilities(self.module):
            return None
        gpu = gpus()[0]
        name = f"{self.backend}-{self.version}-sm{gpu.capability}-{gpu.name.replace(' ', '-')}"
        path = folder / "timing" / f"{name}.cache"
        check_writable(path)
        return path

    def _config(self, spec: TensorSpec, config: BuildConfig, **more: Any) -> Any:
        from polygraphy.backend.trt import CreateConfig, Profile

        shape = tuple(axis for axis in spec.shape[1:] if isinstance(axis, int))
        profiles = [
            Profile().add(spec.name, min=(low, *shape), opt=(best, *shape), max=(high, *shape))
            for low, best, high in config.profiles
        ]
        more |= {
            "profiles": profiles,
            "refittable": config.refittable,
            # The compiler and the inspector then tell the type of every tensor of every layer.
            "profiling_verbosity": self.module.ProfilingVerbosity.DETAILED,
            "strip_plan": config.strip_weights,
            "version_compatible": config.version_compatible,
            # A plan with a lean runtime inside carries host code, which is never enabled.
            "exclude_lean_runtime": config.version_compatible,
            "builder_optimization_level": config.optimization_level,
        }
        if config.memory_pool_mib is not None:
            pool = self.module.MemoryPoolType.WORKSPACE
            more["memory_pool_limits"] = {pool: config.memory_pool_mib << 20}
        if config.hardware_compatible != "none":
            levels = self.module.HardwareCompatibilityLevel
            more["hardware_compatibility_level"] = getattr(
                levels, _HARDWARE[config.hardware_compatible]
            )
        if not targets_capabilities(self.module):
            return CreateConfig(**more)
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        names = self.capabilities(config.compute_capability)
        pairs = [tuple(map(int, name.split("."))) for name in names]
        return CreateConfigRTX(compute_capabilities=pairs, **more)

    def compile(
        self,
        graph: Path | bytes,
        spec: TensorSpec,
        config: BuildConfig,
        cache: Path | None,
        write: Callable[[Piece], object],
        advance: Callable[[int], None] = lambda percent: None,
    ) -> tuple[str, ...]:
        """Compile ``graph``, whose input is ``spec``; the lines that the compiler said of it.

        ``write`` is called with the plan, a piece at a time, and ``advance`` with whole percents,
        100 in all.  What they raise cancels the build, and is raised again.

        Raises:
            BuildError: TensorRT refuses, and the message is its own first error; or the graph has
                tensors of a type that a target cannot compute with.
            KeyboardInterrupt: Ctrl-C; the build was cancelled.
        """
        from polygraphy.backend.trt import (
            EngineBytesFromNetwork,
            NetworkFromOnnxBytes,
            NetworkFromOnnxPath,
        )
        from polygraphy.exception import PolygraphyException

        load = (
            NetworkFromOnnxBytes(graph, strongly_typed=True)
            if isinstance(graph, bytes)
            else NetworkFromOnnxPath(str(graph), strongly_typed=True)
        )
        stop: list[BaseException] = []

        def network() -> tuple[Any, ...]:
            builder, definition, *rest = load()
            self._check_types(definition, self.capabilities(config.compute_capability))
            return StreamingBuilder(self.module, builder, write, stop), definition, *rest

        with interrupts(stop), hears() as heard, warnings.catch_warnings():
            # Polygraphy sets an empty timing cache also where it does nothing.
            warnings.simplefilter("ignore", DeprecationWarning)
            monitor: trt.IProgressMonitor = build_monitor(self.module, advance, stop)
            create = self._config(
                spec,
                config,
                progress_monitor=monitor,
                load_timing_cache=str(cache) if cache and cache.exists() else None,
            )
            build = EngineBytesFromNetwork(
                network, config=create, save_timing_cache=str(cache) if cache else None
            )
            try:
                build()
            except PolygraphyException as error:
                if stop:
                    raise stop[0] from error
                raise self._refusal(graph, heard.errors, error) from error
        if stop:
            raise stop[0]
        return tuple(heard.log)

    def _refusal(self, graph: Path | bytes, errors: Sequence[str], error: Exception) -> BuildError:
        name = graph if isinstance(graph, Path) else "the graph"
        reason = first_line(errors[0] if errors else error)
        return BuildError(
            f"{self.backend} cannot compile {name}: {reason}",
            hint="TensorRT's warnings and errors: --debug",
        )
