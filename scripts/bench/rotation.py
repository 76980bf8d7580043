"""Rotates the demo and its variants with outliers before INT8, and measures the effect.

    python scripts/bench/rotation.py [--variants FOLDER]

With the gain and the offset of each LayerNorm in the Linear behind it, what is left of it is

    LN(r) = (r - mean(r)) / sqrt(var(r) + eps),      mean(r) = r 1 / C

for a token r (1, C) of the residual stream.  An orthogonal Q with Q 1 = 1 keeps mean and variance,
and 1^T Q = 1^T, so that LN(r Q) = LN(r) Q.  The whole stream can be rotated, which spreads outlier
channels over all others:

    qkv, fc1, head     x = LN(r):    W' = Q^T diag(gamma) W,    b' = b + beta W
    proj, fc2          r + y:        W' = W Q,                  b' = b Q

(QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; SliceGPT, arXiv:2401.15024; both for RMSNorm, which
needs no Q 1 = 1).  The first r is the output of the pre-norm, whose gain does not commute with Q:
it needs a MatMul by Q.  V and proj can be rotated in each head by any orthogonal R, because
softmax(..) mixes tokens:

    V_h' = V_h R,    proj_h' = R^T proj_h .

Rotations:

    heads     R is the Hadamard matrix over sqrt(16); the stream is not rotated
    random    Q = U diag(1, P) U^T, U orthogonal with the first column 1 / sqrt(C), P random
    flat      Q = the Kronecker product of 2 J / n - I for factors n of C, J all ones.  For n = 4
              all entries are +-1/2: as flat as a Hadamard matrix, whose rows do not sum to one
    flat+heads

For each, the SQNR of the logits in dB on held-out digits: of the rotated FP32 graph, of ``fast``
without smoothing, of ``fast`` and of ``best``, all as ``quantize --cpu`` writes them.  The script
stops if a rotated FP32 graph does not compute the logits of the original.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import numpy as np
import onnx_ir as ir
from held_out import CALIBRATION, F32, decibels, demo_graphs, held_out_digits, logits
from numpy.typing import NDArray

from calibration.blocks import find_blocks
from calibration.config import QuantizeConfig
from calibration.policy import HEAD, LinearSite, find_linears, find_node
from calibration.scheme import SchemeConfig
from calibration.smoothing import Folding, Source, find_source, fold
from clipdeploy.models import cards
from clipdeploy.pipeline import calibrate_model, quantize_model
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph, save_graph
from exporters.headers import read_passport
from exporters.initializers import add_initializer, values_of, write_initializer

F64 = NDArray[np.float64]
Rotation = Callable[[ir.Model], None]
HEADS = cards.find(cards.DEMO).heads
# Float32 sums in another order: FP32 graphs of one function agree to 120 dB and more, and a stream
# whose channels reach 800 loses another 30 dB when it is spread over all channels.
SAME_DB = 80.0
CONFIGS = {
    "no smoothing": QuantizeConfig(
        scheme=SchemeConfig(smooth=False), remainder="fp32", min_sqnr=None
    ),
    "fast": QuantizeConfig(remainder="fp32", min_sqnr=None),
    "best": QuantizeConfig(remainder="fp32", min_sqnr=None, effort="best"),
}


def random_orthogonal(width: int, seed: int = 0) -> F64:
    """A random orthogonal matrix (width, width)."""
    values = np.random.default_rng(seed).normal(size=(width, width))
    return np.asarray(np.linalg.qr(values)[0])


def mean_keeping(width: int, seed: int = 0) -> F64:
    """A random orthogonal Q (width, width) with Q 1 = 1."""
    values = np.random.default_rng(seed).normal(size=(width, width))
    values[:, 0] = 1
    basis = np.linalg.qr(values)[0]
    inside = np.eye(width)
    inside[1:, 1:] = random_orthogonal(width - 1, seed + 1)
    return np.asarray(basis @ inside @ basis.T)


def flat(width: int) -> F64:
    """An orthogonal Q (width, width) with Q 1 = 1 and entries of nearly equal size."""
    factors = []
    while width % 4 == 0 and width != 8:
        factors.append(4)
        width //= 4
    if width > 1:
        # 2 J / 2 - I only exchanges two channels.
        factors = [*factors[:-1], 4 * width] if width == 2 and factors else [*factors, width]
    reflections = [2 / n * np.ones((n, n)) - np.eye(n) for n in factors]
    return np.asarray(reduce(np.kron, reflections, np.eye(1)))


def hadamard(width: int) -> F64:
    """Sylvester's Hadamard matrix over sqrt(width), a power of two."""
    matrix = np.eye(1)
    while len(matrix) < width:
        matrix = np.kron(matrix, [[1.0, 1.0], [1.0, -1.0]])
    return matrix / np.sqrt(width)


def rotate_stream(model: ir.Model, q: F64) -> None:
    """Rotate the residual stream by ``q`` (C, C); the outputs stay the same if Q 1 = 1."""
    sites = find_linears(model)
    for site in sites:
        if site.role in ("attn.qkv", "mlp.fc1"):
            _fold_norm(site)
            _multiply(site, left=q.T)
        else:
            _multiply(site, right=q)
    _rotate_head(model, q)
    start = find_blocks(model)[0].start
    assert isinstance(model.graph, ir.Graph)
    matrix = add_initializer(model.graph, "rotation.weight", q.astype(np.float32))
    node = ir.node("MatMul", [start, matrix], name="rotation/MatMul")
    node.outputs[0].name, node.outputs[0].type = "rotation", start.type
    node.outputs[0].shape = start.shape
    ir.convenience.replace_all_uses_with(start, node.outputs[0])
    node.replace_input_with(0, start)
    producer = start.producer()
    assert producer is not None
    model.graph.insert_after(producer, node)


def rotate_heads(model: ir.Model, r: F64, heads: int = HEADS) -> None:
    """Rotate V and proj in each head by ``r`` (C / heads, C / heads); the outputs stay the same."""
    inside = np.kron(np.eye(heads), r)
    sites = {site.name: site for site in find_linears(model)}
    for site in sites.values():
        if site.role == "attn.qkv":
            whole = np.eye(3 * len(inside))
            whole[-len(inside) :, -len(inside) :] = inside
            _multiply(site, right=whole)
        elif site.role == "attn.proj":
            _multiply(site, left=inside.T)


def _fold_norm(site: LinearSite) -> None:
    """Move the gain and the offset of a LayerNorm into the Linear behind it."""
    source = find_source(site, {})
    assert source is not None
    gain, offset = _gain_and_offset(source)
    fold(site, source, Folding(offset, gain))


def _gain_and_offset(source: Source) -> tuple[F64, F64]:
    gain, offset = (values_of(each).astype(np.float64) for each in (source.gain, source.offset))
    return gain, offset


def _multiply(site: LinearSite, left: F64 | None = None, right: F64 | None = None) -> None:
    """Multiply the weight (Cin, Cout) of a Linear by a matrix, from the right with its bias."""
    assert site.add is not None
    weight, bias = (values_of(each).astype(np.float64) for each in (site.weight, site.bias))
    if left is not None:
        weight = left @ weight
    if right is not None:
        weight, bias = weight @ right, bias @ right
    write_initializer(site.matmul, 1, weight.astype(np.float32))
    write_initializer(site.add, 1, bias.astype(np.float32))


def _rotate_head(model: ir.Model, q: F64) -> None:
    """Move the gain of the last LayerNorm into the head, and rotate the head's input back."""
    head = find_node(model, HEAD, "Gemm")
    assert head is not None
    value = head.inputs[0]
    norm = value.producer() if value is not None else None
    assert norm is not None
    gain, offset = _gain_and_offset(Source((norm, 1), (norm, 2)))
    turned = bool(head.attributes.get_int("transB", 0))
    weight, bias = (values_of(each).astype(np.float64) for each in head.inputs[1:3])
    inside = weight.T if turned else weight
    made = q.T @ (gain[:, None] * inside)
    write_initializer(norm, 1, np.ones_like(gain, np.float32))
    write_initializer(norm, 2, np.zeros_like(offset, np.float32))
    written = (made.T if turned else made).astype(np.float32)
    write_initializer(head, 1, np.ascontiguousarray(written))
    write_initializer(head, 2, (bias + offset @ inside).astype(np.float32))


def rotations(width: int) -> dict[str, Rotation]:
    """What to do with a graph, by name."""
    spread, inside = flat(width), hadamard(width // HEADS)

    def both(model: ir.Model) -> None:
        rotate_stream(model, spread)
        rotate_heads(model, inside)

    return {
        "none": lambda model: None,
        "heads": lambda model: rotate_heads(model, inside),
        "random": lambda model: rotate_stream(model, mean_keeping(width)),
        "flat": lambda model: rotate_stream(model, spread),
        "flat+heads": both,
    }


def rotated(source: Path, target: Path, rotation: Rotation) -> None:
    """Write the rotated graph of ``source`` to ``target``."""
    model = load_graph(source)
    rotation(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_graph(model, target, read_passport(source))


def measure(source: Path, folder: Path, rotation: Rotation, images: F32) -> list[float]:
    """The SQNR in dB of the rotated FP32 graph, and of INT8 with each of CONFIGS.

    Raises:
        SystemExit: the rotation changes the function.
    """
    workspace, reference = Workspace(folder), logits(source, images)
    graph = workspace.graph(cards.DEMO, "fp32")
    rotated(source, graph, rotation)
    found = [decibels(reference, logits(graph, images))]
    if found[0] < SAME_DB:
        raise SystemExit(f"the rotated FP32 graph is only {found[0]:.1f} dB from the original")
    calibrate_model(workspace, cards.DEMO, CALIBRATION)
    for config in CONFIGS.values():
        made = quantize_model(workspace, cards.DEMO, config, force=True).artifact.path
        found.append(decibels(reference, logits(made, images)))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", type=Path)
    chosen = parser.parse_args()
    images, width = held_out_digits(), cards.find(cards.DEMO).width
    print(f"{'':10}{'rotation':12}{'FP32':>8}" + "".join(f"{name:>14}" for name in CONFIGS))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, graph in demo_graphs(chosen.variants, folder):
            for title, rotation in rotations(width).items():
                row = measure(graph, folder / name / title, rotation, images)
                cells = f"{row[0]:8.1f}" + "".join(f"{db:14.1f}" for db in row[1:])
                print(f"{name:10}{title:12}{cells}", flush=True)


if __name__ == "__main__":
    main()
