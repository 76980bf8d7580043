"""With all switches on the chain computes the candidate, with all off the reference.

Covers: clipdeploy/tuning/coordinates.py, clipdeploy/tuning/segments.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from calibration.config import QuantizeConfig
from calibration.policy import Scope, find_linears
from calibration.qdq import quantize
from clipdeploy.core.errors import GraphError
from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.pipeline import Workspace, sample_images
from clipdeploy.tuning.chain import Chain
from exporters.graphs import load_graph
from exporters.session import OnnxSession

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def cpu_graph(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's INT8 graph with an FP32 remainder, smoothed and shifted."""

    target = tmp_path_factory.mktemp("cpu") / "int8-cpu.onnx"
    samples = sample_images(cards.find(cards.DEMO).preprocess(Recipe()), 3)
    source = demo_workspace.graph(cards.DEMO, "fp32")
    table = demo_workspace.calibration(cards.DEMO)
    quantize(source, table, target, samples, QuantizeConfig(remainder="fp32"))
    return target


def with_output(graph: Path, tensor: str) -> OnnxSession:
    """A session with a tensor inside the graph as a further output."""
    model = onnx.load(graph)
    value = onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
    model.graph.output.append(value)
    del model.graph.value_info[:]
    return OnnxSession(model.SerializeToString(), threads=1)


def decibels(reference: Array, found: Array) -> float:
    error = float(((found - reference) ** 2).sum())
    return 10 * math.log10(float((reference**2).sum()) / error) if error else math.inf


def test_off_is_the_reference_and_on_the_candidate(
    demo_workspace: Workspace, cpu_graph: Path, demo_images: Array
) -> None:
    source = demo_workspace.graph(cards.DEMO, "fp32")
    # Without optimisation: ONNX Runtime's fusions sum in other orders, which rounds differently.
    chain = Chain(source, cpu_graph, optimise=False, threads=1)
    expected = OnnxSession(source, optimise=False).run(demo_images)[0]
    assert np.array_equal(chain.run(demo_images, ())[-1], expected)
    candidate = OnnxSession(cpu_graph, optimise=False, exact_int8=True).run(demo_images)[0]
    apart = decibels(candidate, chain.run(demo_images, chain.everything)[-1])
    # V is converted to the candidate's coordinates and back in float32: a few values round to
    # another int8 level.  The candidate itself has 41 dB.
    assert apart > 60


def test_weights_may_be_in_another_file(
    demo_workspace: Workspace, demo_images: Array, tmp_path: Path
) -> None:
    source, path = demo_workspace.graph(cards.DEMO, "fp32"), tmp_path / "g.onnx"
    model = onnx.load(demo_workspace.graph(cards.DEMO, "fp16"))
    onnx.save(model, path, save_as_external_data=True, location="g.data", size_threshold=64)
    both = (demo_workspace.graph(cards.DEMO, "fp16"), path)
    chains = [Chain(source, each, threads=1) for each in both]
    inside, outside = (chain.run(demo_images, chain.everything)[-1] for chain in chains)
    assert np.array_equal(inside, outside)


def test_half_precision_goes_through_the_borders(
    demo_workspace: Workspace, demo_images: Array
) -> None:
    source = demo_workspace.graph(cards.DEMO, "fp32")
    graph = demo_workspace.graph(cards.DEMO, "int8")
    chain = Chain(source, graph, threads=1)
    candidate = OnnxSession(graph).run(demo_images)[0]
    on = chain.run(demo_images, chain.everything)[-1]
    assert on.dtype == np.float32
    # ONNX Runtime computes runs of FP16 nodes in FP32 and chooses where to round: the two round
    # differently, also to int8.  The candidate itself has 41 dB.
    assert decibels(candidate, on) > 48


def test_a_linear_alone_is_the_graph_that_quantises_it_alone(
    demo_workspace: Workspace, demo_images: Array, tmp_path: Path, cpu_graph: Path
) -> None:

    source = demo_workspace.graph(cards.DEMO, "fp32")
    names = [site.name for site in find_linears(load_graph(source))]
    samples = sample_images(cards.find(cards.DEMO).preprocess(Recipe()), 3)
    chain = Chain(source, cpu_graph, threads=1)
    for chosen in ("blocks.1.attn.proj", "blocks.2.mlp.fc2", "blocks.4.mlp.fc1"):
        others = tuple(name for name in names if name != chosen)
        target = tmp_path / f"{chosen}.onnx"
        config = QuantizeConfig(others, remainder="fp32")
        quantize(source, demo_workspace.calibration(cards.DEMO), target, samples, config)
        reference = with_output(source, chosen).run(demo_images, outputs=[chosen])[0]
        real = with_output(target, chosen).run(demo_images, outputs=[chosen])[0]
        index = next(i for i, s in enumerate(chain.segments) if chosen in s.switches)
        x = chain.run(demo_images, ())[index - 1]
        found = chain.parts(index, x, {chosen}, [chosen])[0]
        # Errors of equal power, not equal errors: V's scales are found to a part in a thousand,
        # which changes roundings.  A folding that is not undone costs at least 20 dB.
        assert abs(decibels(reference, real) - decibels(reference, found)) < 1.0


def test_attention_has_a_switch_if_it_is_quantised(
    demo_workspace: Workspace, demo_images: Array, tmp_path: Path, cpu_graph: Path
) -> None:
    source = demo_workspace.graph(cards.DEMO, "fp32")
    samples = sample_images(cards.find(cards.DEMO).preprocess(Recipe()), 3)

    def quantised(name: str, exclude: tuple[str, ...]) -> Path:
        target = tmp_path / name
        config = QuantizeConfig(exclude, remainder="fp32", scope=Scope(attention=True))
        quantize(source, demo_workspace.calibration(cards.DEMO), target, samples, config)
        return target

    chain = Chain(source, quantised("all.onnx", ()), threads=1)
    assert len(chain.linears) == 24
    assert not any(s.endswith(".attn") for s in Chain(source, cpu_graph, threads=1).everything)
    others = tuple(f"blocks.{n}.attn.[sm]*" for n in range(5) if n != 2)
    alone = quantised("alone.onnx", ("*.mlp.*", "*.qkv", "*.proj", *others))
    reference = OnnxSession(source, threads=1).run(demo_images)[0]
    real = OnnxSession(alone, exact_int8=True, threads=1).run(demo_images)[0]
    found, other = (chain.run(demo_images, {f"blocks.{n}.attn"})[-1] for n in (2, 4))
    # Errors of equal power, as above, and not those of another block.
    assert abs(decibels(reference, real) - decibels(reference, found)) < 1.0
    assert abs(decibels(reference, real) - decibels(reference, other)) > 1.0


def test_another_model_is_refused(demo_workspace: Workspace, tmp_path: Path) -> None:
    source = demo_workspace.graph(cards.DEMO, "fp32")
    model = onnx.load(demo_workspace.graph(cards.DEMO, "int8"))
    for node in model.graph.node:
        node.input[:] = [name.replace("blocks.3", "layers.3") for name in node.input]
        node.output[:] = [name.replace("blocks.3", "layers.3") for name in node.output]
    renamed = tmp_path / "renamed.onnx"
    onnx.save(model, renamed)
    with pytest.raises(GraphError, match=r"no tensor blocks\.3"):
        Chain(source, renamed)
