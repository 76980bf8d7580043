"""Reads which kernels a TensorRT-RTX plan runs, from the text that the plan contains.

TensorRT-RTX (1.5 to 1.7) stores its compiled network as text: declarations of tensors, and a
``main`` whose entries are the kernels, in order.

    tensor={ ... name="__mye57030_dconst" ... type=int8 }
    main {
      function={ ... layers="[ONNX Layer: blocks.0.norm1/LayerNormalization]..." }
      fully_connected={ name="blocks.0.attn.qkv/MatMul" output={"a" } input={"b" "c" } ...
                        alpha=38EC3A90 ... layers="[ONNX Layer: blocks.0.attn.qkv/MatMul]" }

``alpha`` is the float32 factor, in hex, that the kernel multiplies its sums by before it writes
them.  A matrix product of int8 operands whose alpha is 1 and whose output is float16 writes its
int32 sums as float16, which overflow at 65504: the engine's answers are NaN or noise.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from exporters.blocks import block_of

__all__ = [
    "PlanKernel",
    "checked_products",
    "kernels_by_block",
    "overflowing",
    "read_programs",
]

_MAIN = b"main {"
_ENTRY = re.compile(rb"(\w+)=\{|[{}]")
# Entries that run on the GPU; the others compute shapes or set memory.
_KERNELS = frozenset(
    (b"function", b"fully_connected", b"corrltn", b"runtime_fusion", b"batched_matmul", b"gemm")
)
_TENSOR = re.compile(rb'(?:sub_)?tensor=\{(?:[^{}"]|"[^"]*"|\{[^{}]*\})*\}')
_NAME = re.compile(rb'\bname="([^"]*)"')
_TYPE = re.compile(rb"\btype=(\w+)")
_LAYER = re.compile(rb"\[ONNX Layer: ([^\]]+)\]")
_LIST = {key: re.compile(rb"\b" + key + rb"=\{([^{}]*)\}") for key in (b"input", b"output")}
_QUOTED = re.compile(rb'"([^"]*)"')
_ALPHA = re.compile(rb"\balpha=([0-9A-F]{8})")
_FROM_OPERAND = b"scalar_alpha_from_opnd=true"
# Products of two activations have no scales of weights.
_ATTENTION = re.compile(r"blocks\.\d+\.attn/")
_EIGHT_BITS = ("int8", "fp8", "f8")


@dataclass(frozen=True)
class PlanKernel:
    """A kernel: what it is, the graph's nodes in it, and of a product its operands.

    ``operands`` and ``output`` are types as the plan writes them (``int8``, ``half``, ``float``),
    ``alpha`` the factor of its sums; all three are empty or None for other kernels.
    """

    kind: str
    layers: tuple[str, ...]
    operands: tuple[str, ...] = ()
    output: str | None = None
    alpha: float | None = None


def read_programs(plan: BinaryIO) -> tuple[tuple[PlanKernel, ...], ...]:
    """The kernels of a plan, in order, for each of its profiles; () if it has no such text.

    One program serves all GPUs that the plan is built for.
    """
    if plan.seek(0, 2) == 0:
        return ()
    with mmap.mmap(plan.fileno(), 0, access=mmap.ACCESS_READ) as data:
        programs = (tuple(_program(text)) for text in _texts(data))
        return tuple(program for program in programs if program)


def _texts(data: mmap.mmap) -> Iterator[bytes]:
    """Each piece of text that holds a ``main``; weights and machine code are skipped."""
    end = 0
    while (at := data.find(_MAIN, end)) >= 0:
        begin = data.rfind(b"\0", end, at) + 1
        end = data.find(b"\0", at)
        end = len(data) if end < 0 else end
        yield data[max(begin, 0) : end]


def _program(text: bytes) -> Iterator[PlanKernel]:
    entries = list(_entries(text, text.index(_MAIN) + len(_MAIN)))
    # A runtime fusion has a main of its own, whose entries are parts of one kernel.
    if any(kind == b"function" for kind, _ in entries):
        types = _types(text)
        yield from (_kernel(kind, body, types) for kind, body in entries)


def _types(text: bytes) -> Mapping[bytes, str]:
    found = {}
    for match in _TENSOR.finditer(text):
        name, kind = _NAME.search(match[0]), _TYPE.search(match[0])
        if name and kind:
            found[name[1]] = kind[1].decode()
    return found


def _entries(text: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
    """Each kernel of the ``main`` whose entries begin at ``start``: its kind and its text."""
    depth, kind, begin = 1, b"", start
    for match in _ENTRY.finditer(text, start):
        if match[0] != b"}":
            depth += 1
            if depth == 2:
                kind, begin = match[1] or b"", match.end()
            continue
        depth -= 1
        if depth == 1 and kind in _KERNELS:
            yield kind, text[begin : match.start()]
        if depth == 0:
            return


def _kernel(kind: bytes, text: bytes, types: Mapping[bytes, str]) -> PlanKernel:
    layers = tuple(dict.fromkeys(name.decode() for name in _LAYER.findall(text)))
    alpha = _ALPHA.search(text)
    if alpha is None or _FROM_OPERAND in text:
        return PlanKernel(kind.decode(), layers)
    operands, outputs = (
        tuple(types.get(name, "") for name in _QUOTED.findall(found[1])) if found else ()
        for found in (_LIST[key].search(text) for key in (b"input", b"output"))
    )
    factor = struct.unpack(">f", bytes.fromhex(alpha[1].decode()))[0]
    return PlanKernel(
        kind.decode(), layers, operands[:2], outputs[0] if outputs else None, float(factor)
    )


def _is_8_bit(kernel: PlanKernel) -> bool:
    return bool(kernel.operands) and all(k.startswith(_EIGHT_BITS) for k in kernel.operands)


def overflowing(kernels: Iterable[PlanKernel]) -> tuple[str, ...]:
    """The graph's nodes whose 8-bit products write their raw sums as float16."""
    return tuple(
        dict.fromkeys(
            kernel.layers[0]
            for kernel in kernels
            if _is_8_bit(kernel)
            and kernel.layers
            and kernel.output == "half"
            and kernel.alpha == 1.0
        )
    )


def checked_products(kernels: Iterable[PlanKernel]) -> int:
    """How many 8-bit products with a weight :func:`overflowing` could look at."""
    layers = {k.layers[0] for k in kernels if _is_8_bit(k) and k.layers and k.output}
    return sum(1 for name in layers if not _ATTENTION.match(name))


def kernels_by_block(kernels: Iterable[PlanKernel]) -> dict[str, int]:
    """How many kernels belong to each block; one of several blocks counts for the last."""
    counts: Counter[str] = Counter()
    for kernel in kernels:
        blocks = [block_of(name) for name in kernel.layers]
        counts[blocks[-1] if blocks else "other"] += 1
    return dict(counts)
