from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from calibration.policy import LinearSite, find_linears, place
from clipdeploy import zoo
from clipdeploy.workspace import Workspace
from exporters.errors import GraphError
from exporters.graphs import load_graph

ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ALL = [f"blocks.{block}.{role}" for block in range(6) for role in ROLES]


@pytest.fixture(scope="module")
def sites(demo_workspace: Workspace) -> list[LinearSite]:
    return find_linears(load_graph(demo_workspace.graph(zoo.DEMO, "fp32")))


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
    graph = load_graph(demo_workspace.graph(zoo.DEMO, "fp32")).graph
    operators = Counter(node.op_type for node in graph)
    # Two products of attention in each block, without a weight.
    assert operators["MatMul"] - len(sites) == 12
    assert {"head", "patch_embed"}.isdisjoint(site.name for site in sites)


def test_without_exclusion_all_are_int8(sites: list[LinearSite]) -> None:
    placement = place(sites)
    assert list(placement.quantized) == ALL
    assert all(not entry.reason for entry in placement.entries)


@pytest.mark.parametrize(
    ("patterns", "excluded"),
    [
        (("blocks.0.*",), ALL[:4]),
        (("blocks.0.mlp.fc1",), ["blocks.0.mlp.fc1"]),
        (("*.mlp.fc2",), [name for name in ALL if name.endswith("fc2")]),
        (("blocks.[05].attn.*",), [*ALL[:2], *ALL[20:22]]),
        (("blocks.1.*", "*.attn.qkv"), [n for n in ALL if "s.1." in n or n.endswith("qkv")]),
        (("*",), ALL),
    ],
)
def test_patterns_exclude_what_they_match(
    sites: list[LinearSite], patterns: tuple[str, ...], excluded: list[str]
) -> None:
    placement = place(sites, patterns)
    assert [entry.name for entry in placement.entries] == ALL
    assert [entry.name for entry in placement.entries if not entry.int8] == excluded
    assert list(placement.quantized) == [name for name in ALL if name not in excluded]
    for entry in placement.entries:
        assert entry.int8 == (entry.reason == "")
        assert entry.int8 or entry.reason in {f"excluded by {p!r}" for p in patterns}


@pytest.mark.parametrize("pattern", ["blocks.6.*", "blocks.0", "BLOCKS.0.*", "head", ""])
def test_pattern_that_matches_nothing_is_refused(sites: list[LinearSite], pattern: str) -> None:
    with pytest.raises(GraphError, match="matches no Linear") as found:
        place(sites, ("blocks.0.*", pattern))
    assert "names look like blocks.0.attn.qkv" in found.value.hint


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
    path: Path = demo_workspace.graph(zoo.DEMO, "int8")
    with pytest.raises(GraphError, match="has no Linear named"):
        find_linears(load_graph(path))
