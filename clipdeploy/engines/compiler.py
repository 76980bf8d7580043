"""Compiles a graph to a plan with one TensorRT backend."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import BuildError
from clipdeploy.core.files import check_writable
from clipdeploy.core.interrupts import interrupts
from clipdeploy.core.passport import Precision, TensorSpec
from clipdeploy.engines.backends import (
    Backend,
    capture_log,
    created,
    default_capabilities,
    machine_name,
    targets_capabilities,
)
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.build_monitor import build_monitor
from clipdeploy.engines.plan_writer import Piece, StreamingBuilder

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Compiler", "computes"]

# The lowest compute capability with matrix units for a type (NVIDIA's support matrix).
_NEEDS = {"BF16": (8, 0), "FP8": (8, 9)}
_HARDWARE = {"ampere-plus": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}
_PROBED = {
    "--strip-weights": BuildConfig(strip_weights=True),
    "--refittable": BuildConfig(refittable=True),
}
_PROBE_INPUT = TensorSpec("image", "float32", ("batch", 16, 16))


def _probe_graph() -> bytes:
    """Serialise a MatMul and a Softmax: the smallest graph with weights and a GEMM."""
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
    # TensorRT's code generator writes to the file descriptor and bypasses every logger.
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def computes(kind: str, capability: tuple[int, ...]) -> bool:
    """Whether a compute capability such as (8, 9) has matrix units for a type such as ``fp8``."""
    return capability >= _NEEDS.get(kind.upper(), (0, 0))


class Compiler:
    """The compiler of ``backend``; ``module`` is the result of ``backends.tensorrt_module``."""

    def __init__(self, backend: Backend, module: ModuleType) -> None:
        self.backend = backend
        self.module = module
        self.version = str(module.__version__)

    def capabilities(self, asked: Sequence[str]) -> tuple[str, ...]:
        """The compute capabilities that an engine will run on."""
        if targets_capabilities(self.module):
            return tuple(asked) or default_capabilities(self.module)
        return tuple(gpu.capability for gpu in gpus()[:1])

    def targets(self, config: BuildConfig, precision: Precision) -> tuple[str, ...]:
        """The targets of ``config``, or by default those that can compute ``precision``."""
        if config.compute_capability or not targets_capabilities(self.module):
            return config.compute_capability
        able = default_capabilities(self.module)
        if precision == "fp8":
            able = tuple(each for each in able if computes(precision, _numbers(each)))
        # The default of most graphs stays unset, as it was when their engines were built.
        return able if able != default_capabilities(self.module) else ()

    def check_flags(self, config: BuildConfig) -> None:
        """Try the options that some backends or machines lack, on a graph of one MatMul.

        Raises:
            BuildError: this backend does not support one of them on this machine.
        """
        asked = {"--strip-weights": config.strip_weights, "--refittable": config.refittable}
        for option, alone in _PROBED.items():
            if not asked[option]:
                continue
            try:
                with _silent_stderr():
                    self.compile(_probe_graph(), _PROBE_INPUT, alone, None, lambda piece: None)
            except BuildError as error:
                where = "on this GPU" if gpus() else "on a machine without a GPU"
                raise BuildError(
                    f"{self.backend} {self.version} has no {option} {where}",
                    hint=f"leave it out, or build with --backend tensorrt on a GPU; {error.hint}",
                ) from error

    def _check_types(self, network: trt.INetworkDefinition, capabilities: Sequence[str]) -> None:
        """Check that every target can compute the tensor types of the network.

        Raises:
            BuildError: a target lacks units for a type, such as FP8 on Ampere.
        """
        types = set()
        for index in range(network.num_layers):
            layer: trt.ILayer = network.get_layer(index)
            types |= {layer.get_output_type(output).name for output in range(layer.num_outputs)}
        for kind in sorted(_NEEDS.keys() & types):
            for capability in capabilities:
                if not computes(kind, _numbers(capability)):
                    raise BuildError(
                        f"the graph uses {kind.lower()}, which SM {capability} cannot compute",
                        hint="build --fp16 or --int8, or for SM {}.{} and newer".format(
                            *_NEEDS[kind]
                        ),
                    )

    def timing_cache(self, config: BuildConfig, folder: Path) -> Path | None:
        """The timing cache file for this backend, version and GPU; None if it is not used.

        TensorRT-RTX chooses kernels at load time and measures none during a build.

        Raises:
            FileError: the cache folder cannot be written.
        """
        if not config.timing_cache or targets_capabilities(self.module):
            return None
        name = machine_name(self.backend, self.version, gpus()[0])
        path = folder / "timing" / f"{name}.cache"
        check_writable(path)
        return path

    def _config(
        self, spec: TensorSpec, config: BuildConfig, **more: Any
    ) -> Callable[[Any, trt.INetworkDefinition], trt.IBuilderConfig]:
        """Make a function that creates TensorRT's configuration for a builder and a network."""
        create = self._loader(spec, config, **more)

        def configured(builder: Any, network: trt.INetworkDefinition) -> trt.IBuilderConfig:
            made: trt.IBuilderConfig = create(builder, network)
            flags = self.module.BuilderFlag
            # TensorRT allows TF32 by default, and Polygraphy leaves it on for TensorRT-RTX.  FP32
            # engines would then multiply with 10 bits of mantissa instead of 23.
            made.clear_flag(flags.TF32)
            if config.strip_weights and not config.refittable:
                # The graph's own weights come back.  Newer releases choose this flag themselves.
                made.set_flag(flags.REFIT_IDENTICAL)
            return made

        return configured

    def _loader(self, spec: TensorSpec, config: BuildConfig, **more: Any) -> Any:
        from polygraphy.backend.trt import CreateConfig, Profile

        shape = tuple(axis for axis in spec.shape[1:] if isinstance(axis, int))
        profiles = [
            Profile().add(spec.name, min=(low, *shape), opt=(best, *shape), max=(high, *shape))
            for low, best, high in config.profiles
        ]
        more |= {
            "profiles": profiles,
            "refittable": config.refittable,
            # The build log and the inspector then list the type of every tensor of every layer.
            "profiling_verbosity": self.module.ProfilingVerbosity.DETAILED,
            "strip_plan": config.strip_weights,
            "version_compatible": config.version_compatible,
            # A plan that includes a lean runtime contains host code, which is never enabled.
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
        """Compile ``graph`` with the input ``spec``, and return the lines of the build log.

        ``write`` receives the plan piece by piece, and ``advance`` whole percents, 100 in total.
        An exception in either cancels the build and is raised again.

        Raises:
            BuildError: TensorRT cannot start or refuses the graph (the message quotes its first
                error), or a target cannot compute a tensor type of the graph.
            KeyboardInterrupt: Ctrl-C cancelled the build.
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
            loaded = created(load)
            if loaded is None:
                raise self._no_builder(log.reason())
            builder, definition, *rest = loaded
            self._check_types(definition, self.capabilities(config.compute_capability))
            return StreamingBuilder(self.module, builder, write, stop), definition, *rest

        with interrupts(stop), capture_log() as log, warnings.catch_warnings():
            # Polygraphy also sets an empty timing cache where that is a deprecated no-op.
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
                raise self._refusal(graph, log.reason(error)) from error
        if stop:
            raise stop[0]
        return tuple(log.messages)

    def _no_builder(self, reason: str) -> BuildError:
        return BuildError(
            f"{self.backend} {self.version} cannot start: {reason}",
            hint="the driver may be too old, or GPU memory full: see clipdeploy doctor",
        )

    def _refusal(self, graph: Path | bytes, reason: str) -> BuildError:
        name = graph if isinstance(graph, Path) else "the graph"
        return BuildError(
            f"{self.backend} cannot compile {name}: {reason}",
            hint="run again with --debug to see TensorRT's warnings and errors",
        )
