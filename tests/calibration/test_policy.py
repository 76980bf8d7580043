from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from calibration.policy import (
    HEAD,
    PATCH,
    LinearSite,
    Scope,
    find_linears,
    find_node,
    find_products,
    observed_tensors,
    place,
    qkv_output,
)
from clipdeploy.core.errors import GraphError
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph

ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ALL = [f"blocks.{block}.{role}" for block in range(6) for role in ROLES]


PRODUCTS = [f"blocks.{b}.attn.{role}" for b in range(6) for role in ("scores", "mix")]
LAST_PRODUCTS = PRODUCTS[10:]
EVERYTHING = [PATCH, *ALL, *PRODUCTS, HEAD]


@pytest.fixture(scope="module")
def model(source: Path) -> ir.Model:
    return load_graph(source)


@pytest.fixture(scope="module")
def sites(model: ir.Model) -> list[LinearSite]:
    return find_linears(model)


def test_every_linear_of_the_blocks_is_found(sites: list[LinearSite]) -> None:
    assert [site.name for site in sites] == ALL
    assert [(site.block, site.role) for site in sites] == [(b, r) for b in range(6) for r in ROLES]


def test_site_knows_its_tensors(sites: list[LinearSite]) -> None:
    widths = {"attn.qkv": (96, 288), "attn.proj": (96, 96), "mlp.fc1": (96, 384), "mlp.fc2": None}
    widths["mlp.fc2"] = (384, 96)
    for site in sites:
        assert site.matmul.name == f"{site.name}/MatMul"
        assert site.matmul.inputs[0] is site.activation
        assert site.weight.name == f"{site.name}.weight"
        assert tuple(site.weight.const_value.shape) == widths[site.role]
        assert site.bias is not None
        assert site.bias.name == f"{site.name}.bias"


def test_patch_embedding_head_and_attention_products_are_not_linears(
    demo_workspace: Workspace, sites: list[LinearSite]
) -> None:
    graph = load_graph(demo_workspace.graph(cards.DEMO, "fp32")).graph
    operators = Counter(node.op_type for node in graph)
    # Two products of attention in each block, without a weight.
    assert operators["MatMul"] - len(sites) == 12
    assert {"head", "patch_embed"}.isdisjoint(site.name for site in sites)


def test_products_are_found_by_role(model: ir.Model) -> None:
    products = find_products(model)
    assert [p.name for p in products] == PRODUCTS
    for product in products:
        assert product.node.op_type == "MatMul"
        maker = product.node.inputs[0].producer()
        assert (maker.op_type == "Softmax") == (product.role == "attn.mix")


def test_observed_tensors_are_what_any_scope_needs(model: ir.Model) -> None:
    tensors = dict(observed_tensors(model))
    outputs = {qkv_output(f"blocks.{block}.attn.qkv") for block in range(6)}
    assert set(tensors) == {*ALL, *outputs, HEAD}
    assert len(observed_tensors(model)) == len(tensors)
    for site in find_linears(model):
        assert tensors[site.name] is site.activation
        if site.role == "attn.qkv":
            made = tensors[qkv_output(site.name)].producer()
            assert made.op_type == "Add"
            assert made.inputs[0] is site.matmul.outputs[0]
    assert tensors[HEAD] is find_node(model, HEAD, "Gemm").inputs[0]


def test_unknown_node_is_not_found(model: ir.Model) -> None:
    assert find_node(model, PATCH, "Conv").op_type == "Conv"
    assert find_node(model, PATCH, "Gemm") is None
    assert find_node(model, "neck", "Gemm") is None


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_scope_decides(model: ir.Model, attention: bool, head: bool, patch: bool) -> None:
    placement = place(model, scope=Scope(attention=attention, head=head, patch=patch))
    assert [entry.name for entry in placement.entries] == EVERYTHING
    inner = [name for name in PRODUCTS if name not in LAST_PRODUCTS]
    expected = {*ALL, *(inner * attention), *([HEAD] * head), *([PATCH] * patch)}
    assert set(placement.quantized) == expected
    for entry in placement.entries:
        option = {HEAD: "head", PATCH: "patch"}.get(entry.name, "attention")
        reason = f"not requested with --quantize-{option}"
        if attention and entry.name in LAST_PRODUCTS:
            reason = "only the class token leaves the last block"
        assert entry.reason == ("" if entry.name in expected else reason)


@pytest.mark.parametrize(
    ("patterns", "excluded"),
    [
        (("blocks.0.*",), [*ALL[:4], *PRODUCTS[:2]]),
        (("blocks.0.mlp.fc1",), ["blocks.0.mlp.fc1"]),
        (("*.mlp.fc2",), [name for name in ALL if name.endswith("fc2")]),
        (("blocks.[05].attn.*",), [*ALL[:2], *ALL[20:22], *PRODUCTS[:2], *PRODUCTS[10:]]),
        (("head", "*.attn.scores"), [*PRODUCTS[::2], HEAD]),
        (("patch_embed",), [PATCH]),
        (("*",), EVERYTHING),
    ],
)
def test_patterns_exclude_what_they_match(
    model: ir.Model, patterns: tuple[str, ...], excluded: list[str]
) -> None:
    placement = place(model, patterns, Scope(attention=True, head=True, patch=True))
    assert [entry.name for entry in placement.entries] == EVERYTHING
    left_out = {*excluded, *LAST_PRODUCTS}
    assert list(placement.quantized) == [name for name in EVERYTHING if name not in left_out]
    reasons = {f"excluded by {pattern!r}" for pattern in patterns}
    for entry in placement.entries:
        assert entry.quantized == (entry.reason == "")
        assert (entry.reason in reasons) == (entry.name in excluded)


@pytest.mark.parametrize("pattern", ["blocks.6.*", "blocks.0", "BLOCKS.0.*", "neck", ""])
def test_pattern_that_matches_nothing_is_refused(model: ir.Model, pattern: str) -> None:
    with pytest.raises(GraphError, match="matches no Linear") as found:
        place(model, ("blocks.0.*", pattern))
    assert "use names like blocks.0.attn.qkv" in found.value.hint


def test_foreign_graph_is_refused() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""
            <ir_version: 10, opset_import: ["" : 20]>
            g (float[batch, 3, 4] x) => (float[batch, 3, 4] y)
            <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>
            { y = MatMul(x, w) }
        """)
    )
    with pytest.raises(GraphError, match="has no Linear named") as found:
        find_linears(model)
    assert "clipdeploy export" in found.value.hint


def test_quantised_graph_is_refused(demo_workspace: Workspace) -> None:
    path: Path = demo_workspace.graph(cards.DEMO, "int8")
    with pytest.raises(GraphError, match="has no Linear named"):
        find_linears(load_graph(path))
