"""Checkpoints in shards on the Hugging Face hub, from a local server that fails in several ways."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bad_server import serve
from command_server import CommandProgram
from safetensors.torch import load_file, save_file

from clipdeploy.core.errors import CheckpointError, FileError, UsageError
from clipdeploy.models import cards
from clipdeploy.models.checkpoints import read_checkpoint
from clipdeploy.models.download import fetch_hub, is_hub_cached
from clipdeploy.models.hub import hub_parts
from clipdeploy.models.shards import read_index, shard_names

INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-0000{part}-of-00002.safetensors" for part in (1, 2))


def write_shards(folder: Path, padding: int = 0) -> Path:
    """Write the demo's weights as two shards and their index; return the index.

    Each shard gets ``padding`` bytes more, in a tensor that the index does not name.
    """
    tensors = load_file(cards.demo_file("weights.safetensors"))
    more = {"padding": torch.zeros(padding, dtype=torch.uint8)} if padding else {}
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in half} | more, folder / shard)
    places = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / INDEX


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The server's files: the demo's weights in two shards."""
    (tmp_path / "served").mkdir()
    return write_shards(tmp_path / "served").parent


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("CLIPDEPLOY_OFFLINE")
    with serve(folder) as (address, log):
        yield address, log


Export = Callable[..., str]


@pytest.fixture
def environment(served: tuple[str, list[str]], tmp_path: Path) -> dict[str, str]:
    # huggingface_hub reads its server's address when it is imported: another process.
    hub = {"HF_ENDPOINT": served[0], "CLIPDEPLOY_HOME": str(tmp_path / "home")}
    return {**os.environ, **hub, "HF_HUB_OFFLINE": "0"}


def words(program: CommandProgram, tmp_path: Path, reference: str, *more: str) -> list[str]:
    at = ["--workspace", str(tmp_path / "a"), "--model", "demo", "--checkpoint", reference]
    return [*program.words, "export", "--quiet", *at, *more]


@pytest.fixture
def export(program: CommandProgram, environment: dict[str, str], tmp_path: Path) -> Export:
    """Export a reference of the hub in a process of its own; return what it printed."""

    def run(reference: str, *more: str) -> str:
        done = subprocess.run(
            words(program, tmp_path, reference, *more),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        return done.stdout + done.stderr

    return run


def one_line(said: str) -> str:
    assert said.startswith("error: "), said
    assert len(said.strip().splitlines()) == 1
    return said


def cached(tmp_path: Path, owner: str) -> Path:
    return tmp_path / "home" / "hub" / f"models--{owner}--demo"


def downloads(log: list[str], name: str) -> list[str]:
    return [request for request in log if request.startswith("GET") and name in request]


@pytest.mark.parametrize("reference", [f"hf://whole/demo/{INDEX}", "hf://whole/demo"])
def test_an_index_is_downloaded_with_its_shards(
    reference: str, export: Export, tmp_path: Path, served: tuple[str, list[str]], folder: Path
) -> None:
    said = export(reference)
    assert "timm (flat sharded safetensors)" in said
    assert read_checkpoint(folder / INDEX).sha256[:8] in said
    assert all(len(downloads(served[1], shard)) == 1 for shard in SHARDS)
    before = len(served[1])
    assert "(unchanged)" in export(reference, "--offline")
    assert len(served[1]) == before


def test_a_card_may_name_an_index(
    program: CommandProgram, environment: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    table = tmp_path / "cards.csv"
    environment["CLIPDEPLOY_CARDS"] = str(table)
    digest = read_checkpoint(folder / INDEX).sha256
    for prefix, said in ((digest[:8], "SHA-256 " + digest[:8]), ("0" * 8, "is not the published")):
        table.write_text(
            "name,patch,image_size,width,depth,heads,file,sha256_prefix\n"
            f"acme,4,32,96,6,6,hf://whole/demo/{INDEX},{prefix}\n"
        )
        at = ["--workspace", str(tmp_path / prefix), "--model", "acme"]
        done = subprocess.run(
            [*program.words, "export", "--quiet", *at],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert said in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_a_name_that_leads_elsewhere_is_refused(
    name: str, export: Export, folder: Path, served: tuple[str, list[str]]
) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    hostile = {"weight_map": places | {"head.bias": name}}
    (folder / INDEX).write_text(json.dumps(hostile))
    said = one_line(export(f"hf://whole/demo/{INDEX}"))
    assert "names a file outside its folder" in said
    assert not any("safetensors " in f"{request} " for request in served[1])


def test_a_missing_shard_is_named(export: Export, folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    said = one_line(export(f"hf://whole/demo/{INDEX}"))
    assert f"the shard {SHARDS[1]} that {INDEX} names does not exist" in said


def test_a_missing_index_is_named(export: Export) -> None:
    said = one_line(export(f"hf://gone/demo/{INDEX}"))
    assert f"none of {INDEX} exists" in said


def test_a_shard_of_another_hash_is_refused_and_removed(
    export: Export, tmp_path: Path, served: tuple[str, list[str]]
) -> None:
    said = one_line(export(f"hf://wrong-00002-of/demo/{INDEX}"))
    assert f"{SHARDS[1]} differs from the hub's file, whose SHA-256 starts with" in said
    kept = {path.name for path in (cached(tmp_path, "wrong-00002-of") / "snapshots").glob("*/*")}
    assert kept == {INDEX, SHARDS[0]}


def test_a_shard_of_another_size_is_refused(export: Export, tmp_path: Path) -> None:
    said = one_line(export(f"hf://short-00002-of/demo/{INDEX}"))
    assert f"cannot download hf://short-00002-of/demo/{INDEX}: Consistency check failed" in said
    kept = {path.name for path in (cached(tmp_path, "short-00002-of") / "snapshots").glob("*/*")}
    assert SHARDS[1] not in kept


def test_a_shard_damaged_in_the_cache_is_downloaded_again(export: Export, tmp_path: Path) -> None:
    reference = f"hf://whole/demo/{INDEX}"
    export(reference)
    (shard,) = cached(tmp_path, "whole").glob(f"snapshots/*/{SHARDS[0]}")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert "differs from the hub's file" in one_line(export(reference))
    assert "(unchanged)" in export(reference)


def test_a_broken_connection_resumes_where_it_broke(
    export: Export, served: tuple[str, list[str]], folder: Path
) -> None:
    # huggingface_hub keeps whole pieces of 10 MiB.
    write_shards(folder, 24 << 20)
    assert "timm (flat sharded safetensors)" in export(f"hf://cut-00002-of/demo/{INDEX}")
    first, second = downloads(served[1], SHARDS[1])
    assert " from " not in first
    assert second.endswith(f" from {10 << 20}")


def test_a_connection_that_always_breaks_is_an_error(export: Export) -> None:
    said = one_line(export(f"hf://cut-00002-of/demo/{INDEX}"))
    assert f"cannot download hf://cut-00002-of/demo/{INDEX}: " in said


def test_a_killed_download_continues_with_the_missing_shard(
    program: CommandProgram,
    environment: dict[str, str],
    export: Export,
    served: tuple[str, list[str]],
    tmp_path: Path,
) -> None:
    reference = f"hf://stall-00002-of/demo/{INDEX}"
    process = subprocess.Popen(
        words(program, tmp_path, reference),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not downloads(served[1], SHARDS[1]):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    blobs = cached(tmp_path, "stall-00002-of") / "blobs"
    left = list(blobs.glob("*.incomplete"))
    for unfinished in left:
        os.utime(unfinished, (0, 0))
    # The server's address is its failure: the finished shard is that of the same repository.
    cached(tmp_path, "stall-00002-of").rename(cached(tmp_path, "whole"))
    assert "timm (flat sharded safetensors)" in export(f"hf://whole/demo/{INDEX}")
    assert len(downloads(served[1], SHARDS[0])) == 1
    assert not list((cached(tmp_path, "whole") / "blobs").glob("*.incomplete"))


def test_weights_without_a_part_are_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDEPLOY_HOME", str(tmp_path / "home"))
    snapshot = cached(tmp_path, "acme") / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    write_shards(snapshot)
    assert is_hub_cached("models--acme--demo")
    (snapshot / SHARDS[0]).unlink()
    assert not is_hub_cached("models--acme--demo")
    (snapshot / INDEX).write_text("{")
    assert not is_hub_cached("models--acme--demo")


def test_a_reference_to_an_index() -> None:
    assert hub_parts("hf://a/b") == ("a/b", "")
    assert hub_parts(f"hf://a/b/{INDEX}") == ("a/b", INDEX)
    bad = "hf://a", "hf://a/b/c", f"hf://a/b/../{INDEX}", f"hf://a/{INDEX}/b", f"hf://a/b/.{INDEX}"
    for reference in bad:
        with pytest.raises(ValueError, match="nor an index of shards"):
            hub_parts(reference)
        with pytest.raises(UsageError, match="is not a Hugging Face repository"):
            fetch_hub(reference)


def test_an_index_is_read_without_its_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    assert shard_names(index) == list(SHARDS)
    assert read_index(index)["head.bias"] in SHARDS
    for content in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'):
        index.write_text(content)
        with pytest.raises(CheckpointError, match="has no weight_map"):
            read_index(index)
    index.unlink()
    with pytest.raises(FileError, match="cannot read"):
        read_index(index)
