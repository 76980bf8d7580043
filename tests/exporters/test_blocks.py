from __future__ import annotations

import pytest

from exporters.blocks import block_of


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.11.mlp.fc2/MatMul", "blocks.11"),
        ("blocks_3_attn_qkv/MatMul", "blocks.3"),
        ("patch_embed/Conv", "patch_embed"),
        ("head/Gemm", "head"),
        ("/encoder/layer.0/q/MatMul", "encoder"),
        ("blocks.x/MatMul", "blocks.x"),
        ("node_MatMul_92", "graph"),
        ("/MatMul", "graph"),
        ("", "graph"),
    ],
)
def test_the_block_is_stated_by_the_name(name: str, block: str) -> None:
    assert block_of(name) == block
