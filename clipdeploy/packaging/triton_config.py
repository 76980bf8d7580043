"""``config.pbtxt``: how Triton serves a model.

Sources: docs/user_guide/model_configuration.md of triton-inference-server/server, and
model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import TensorSpec
from clipdeploy.core.spans import BATCH, INSTANCES, QUEUE_DELAY, check_numbers
from clipdeploy.core.values import is_name
from clipdeploy.packaging.artifact import Packable
from clipdeploy.packaging.pbtxt import Enum, Field, text_format

__all__ = ["WARMUP", "TritonConfig", "batching", "check_batch", "triton_config"]

# The file of the warm-up's image, in the folder that Triton looks for it.
WARMUP = "image.raw"
_GRAPH_BATCH = 32
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}


@dataclass(frozen=True)
class TritonConfig:
    """How a model is served.

    ``name`` is the model's name on the server, MODEL-PRECISION if None.  ``max_batch`` is the
    largest batch; None is the engine's own, and 32 for a graph.  ``queue_delay`` are the
    microseconds that a request waits for others to share its batch: the default is a third of what
    a ViT-B in FP16 takes for one image on an A100 (1.5 ms).  ``instances`` run on each GPU.

    Raises:
        UsageError: a name that Triton does not take, or a number that cannot be.
    """

    name: str | None = None
    max_batch: int | None = None
    queue_delay: int = 500
    instances: int = 1

    def __post_init__(self) -> None:
        if self.name is not None and not is_name(self.name):
            raise UsageError(
                f"{self.name!r} is no name of a model", hint="letters, digits, - and _"
            )
        check_numbers(self, max_batch=BATCH.or_none, queue_delay=QUEUE_DELAY, instances=INSTANCES)


def check_batch(source: Packable, config: TritonConfig) -> None:
    """Hold the batch that was asked for against what the artifact takes.

    Raises:
        UsageError: it takes no such batch.
    """
    takes = source.fixed_batch or (source.engine.batches[1] if source.engine else None)
    if config.max_batch is None or takes is None:
        return
    if source.fixed_batch is not None:
        wrong = f"{source.path} takes {takes} images at once, no more and no less"
        raise UsageError(wrong, hint="leave out --max-batch")
    if config.max_batch > takes:
        wrong = f"--max-batch {config.max_batch}: {source.path} takes {takes} images at most"
        raise UsageError(wrong, hint=f"{takes} or less, or build it with another --max-batch")


def batching(source: Packable, config: TritonConfig) -> tuple[int, tuple[int, ...]]:
    """The largest batch, 0 if it is fixed, and the batches worth waiting for."""
    if source.fixed_batch is not None:
        return 0, ()
    if source.engine is None:
        most, tuned = config.max_batch or _GRAPH_BATCH, {8}
    else:
        most = config.max_batch or source.engine.batches[1]
        tuned = {best for _, best, _ in source.engine.profiles}
    return most, tuple(sorted(size for size in tuned | {most} if 1 < size <= most))


def triton_config(source: Packable, name: str, config: TritonConfig) -> str:
    """The text of ``config.pbtxt``."""
    most, preferred = batching(source, config)
    message: dict[str, Field] = {
        "name": name,
        "backend": "tensorrt" if source.engine else "onnxruntime",
        "max_batch_size": most,
        "input": _tensor(source.graph.input, whole=not most),
        "output": _tensor(source.graph.output, whole=not most) | {"label_filename": "labels.txt"},
        "instance_group": _instances(source, config),
        "model_warmup": [_warmup(source.graph.input, batch) for batch in (1, *preferred)],
    }
    if most > 1:
        message["dynamic_batching"] = {
            "preferred_batch_size": list(preferred),
            "max_queue_delay_microseconds": config.queue_delay,
        }
    return text_format(message)


def _tensor(spec: TensorSpec, *, whole: bool) -> dict[str, Field]:
    """A tensor without its batch axis, or ``whole`` where the batch is fixed."""
    dims = [int(axis) for axis in spec.shape[0 if whole else 1 :]]
    return {"name": spec.name, "data_type": Enum(_TYPES[spec.dtype]), "dims": dims}


def _warmup(spec: TensorSpec, batch: int) -> dict[str, Field]:
    tensor = _tensor(spec, whole=isinstance(spec.shape[0], int))
    del tensor["name"]
    return {
        "name": f"a real image, batch {batch}",
        "batch_size": batch,
        "inputs": {"key": spec.name, "value": {**tensor, "input_data_file": WARMUP}},
    }


def _instances(source: Packable, config: TritonConfig) -> dict[str, Field]:
    kind = "KIND_AUTO"
    if source.engine:
        kind = "KIND_GPU"
    elif source.graph.precision == "int8-cpu":
        kind = "KIND_CPU"
    group: dict[str, Field] = {"count": config.instances, "kind": Enum(kind)}
    if source.engine:
        # Left out, only the first profile would ever be used.
        group["profile"] = [str(index) for index in range(len(source.engine.profiles))]
    return group
