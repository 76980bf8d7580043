"""A server with Triton's gRPC protocol that runs one packaged graph with ONNX Runtime.

It reads the model's ``config.pbtxt`` like Triton and rejects requests that violate it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from exporters.session import OnnxSession

NUMPY = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8, "INT32": np.int32}


def read_config(folder: Path) -> Any:
    """Parse ``config.pbtxt`` with Triton's protobuf; an unknown field is an error."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


class _Model(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.session = OnnxSession(folder / "1" / "model.onnx")
        self.batches: list[int] = []

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        [tensor], [spec], [out] = request.inputs, self.config.input, self.config.output
        kind = model_config_pb2.DataType.Name(spec.data_type).removeprefix("TYPE_")
        most = self.config.max_batch_size
        shape = list(tensor.shape)
        batched = [shape[0], *spec.dims] if most and 1 <= shape[0] <= most else list(spec.dims)
        found = (request.model_name, tensor.name, tensor.datatype, shape)
        if found != (self.config.name, spec.name, kind, batched):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"unexpected request: {found}")
        self.batches.append(shape[0])
        images = np.frombuffer(request.raw_input_contents[0], NUMPY[kind]).reshape(shape)
        [logits] = self.session.run(images)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        name = {"float32": "FP32", "float16": "FP16"}[str(logits.dtype)]
        answer.outputs.add(name=out.name, datatype=name, shape=logits.shape)
        answer.raw_output_contents.append(np.ascontiguousarray(logits).tobytes())
        return answer


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Serve a model; yield the address and the list of batch sizes of the requests."""
    server, model = grpc.server(ThreadPoolExecutor(1)), _Model(folder)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", model.batches
    finally:
        server.stop(None)
