"""Writes ``config.pbtxt``, which configures how Triton serves a model.

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

__all__ = ["TritonConfig", "batching", "check_batch", "triton_config", "warmup_file"]

_GRAPH_BATCH = 32
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}


@dataclass(frozen=True)
class TritonConfig:
    """How Triton serves a model.

    ``name`` is the model's name on the server, MODEL-PRECISION if None.  ``max_batch`` is the
    largest batch; None means that of the engine, or 32 for a graph.  ``queue_delay`` is the time in
    microseconds that a request waits for others to share its batch; the default is a third of the
    latency of a ViT-B in FP16 for one image on an A100 (1.5 ms).  ``instances`` run on each GPU.

    Raises:
        UsageError: Triton does not accept the name, or a number is out of range.
    """

    name: str | None = None
    max_batch: int | None = None
    queue_delay: int = 500
    instances: int = 1

    def __post_init__(self) -> None:
        if self.name is not None and not is_name(self.name):
            raise UsageError(
                f"{self.name!r} is not a valid model name", hint="use letters, digits, - and _"
            )
        check_numbers(self, max_batch=BATCH.or_none, queue_delay=QUEUE_DELAY, instances=INSTANCES)


def warmup_file(source: Packable) -> str:
    """The name of the warm-up sample, in the folder where Triton expects it."""
    return f"{source.graph.tower}.raw"


def check_batch(source: Packable, config: TritonConfig) -> None:
    """Check that the artifact accepts the maximum batch.

    Raises:
        UsageError: the artifact does not accept it.
    """
    limit = source.fixed_batch or (source.engine.batches[1] if source.engine else None)
    if config.max_batch is None or limit is None:
        return
    if source.fixed_batch is not None:
        wrong = f"{source.path} has a fixed batch of {limit} images"
        raise UsageError(wrong, hint="leave out --max-batch")
    if config.max_batch > limit:
        wrong = f"--max-batch {config.max_batch}: {source.path} accepts at most {limit} images"
        raise UsageError(wrong, hint=f"use {limit} or less, or build with a larger --max-batch")


def batching(source: Packable, config: TritonConfig) -> tuple[int, tuple[int, ...]]:
    """The largest batch, 0 if it is fixed, and the preferred batches."""
    if source.fixed_batch is not None:
        return 0, ()
    if source.engine is None:
        most, tuned = config.max_batch or _GRAPH_BATCH, {8}
    else:
        most = config.max_batch or source.engine.batches[1]
        tuned = {best for _, best, _ in source.engine.profiles}
    return most, tuple(sorted(size for size in tuned | {most} if 1 < size <= most))


def triton_config(source: Packable, name: str, config: TritonConfig) -> str:
    """Return the text of ``config.pbtxt``."""
    most, preferred = batching(source, config)
    labels: dict[str, Field] = {} if source.graph.embeds else {"label_filename": "labels.txt"}
    message: dict[str, Field] = {
        "name": name,
        "backend": "tensorrt" if source.engine else "onnxruntime",
        "max_batch_size": most,
        "input": _tensor(source.graph.input, whole=not most),
        "output": _tensor(source.graph.output, whole=not most) | labels,
        "instance_group": _instances(source, config),
        "model_warmup": [_warmup(source, batch) for batch in (1, *preferred)],
    }
    if most > 1:
        message["dynamic_batching"] = {
            "preferred_batch_size": list(preferred),
            "max_queue_delay_microseconds": config.queue_delay,
        }
    return text_format(message)


def _tensor(spec: TensorSpec, *, whole: bool) -> dict[str, Field]:
    """Describe a tensor without its batch axis; ``whole`` includes it, for a fixed batch."""
    dims = [int(axis) for axis in spec.shape[0 if whole else 1 :]]
    return {"name": spec.name, "data_type": Enum(_TYPES[spec.dtype]), "dims": dims}


def _warmup(source: Packable, batch: int) -> dict[str, Field]:
    spec = source.graph.input
    tensor = _tensor(spec, whole=isinstance(spec.shape[0], int))
    del tensor["name"]
    return {
        "name": f"a real {source.graph.tower}, batch {batch}",
        "batch_size": batch,
        "inputs": {"key": spec.name, "value": {**tensor, "input_data_file": warmup_file(source)}},
    }


def _instances(source: Packable, config: TritonConfig) -> dict[str, Field]:
    kind = "KIND_AUTO"
    if source.engine:
        kind = "KIND_GPU"
    elif source.graph.precision == "int8-cpu":
        kind = "KIND_CPU"
    group: dict[str, Field] = {"count": config.instances, "kind": Enum(kind)}
    if source.engine:
        # Without this field Triton uses only the first profile.
        group["profile"] = [str(index) for index in range(len(source.engine.profiles))]
    return group
