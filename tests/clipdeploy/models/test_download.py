"""Downloads from a local server that works or fails in several ways."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from bad_server import serve
from clip_files import write_clip
from command_server import CommandProgram
from safetensors.torch import load_file

from clipdeploy.core.cache import cache_folder
from clipdeploy.core.errors import CheckpointError, FileError, UsageError
from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards, download
from clipdeploy.models.download import cached_file, fetch, fetch_hub, is_cached
from clipdeploy.models.load import WeightsChoice, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's files: the demo weights as a .pth and in the hub's layout."""
    root = tmp_path_factory.mktemp("served")
    tensors = load_file(cards.demo_file("weights.safetensors"))
    torch.save(tensors, root / "demo.pth")
    (root / "model.safetensors").write_bytes(cards.demo_file("weights.safetensors").read_bytes())
    return root


@pytest.fixture
def card(folder: Path) -> cards.ModelCard:
    """The demo card with weights that have to be downloaded."""
    digest = hashlib.sha256((folder / "demo.pth").read_bytes()).hexdigest()
    return replace(
        cards.find(cards.DEMO), name="clip-vit-fetched", file="demo.pth", sha256_prefix=digest[:8]
    )


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("CLIPDEPLOY_OFFLINE")
    with serve(folder) as (address, _):
        yield address


def from_mirror(monkeypatch: pytest.MonkeyPatch, server: str, manner: str) -> None:
    monkeypatch.setenv("CLIPDEPLOY_MIRROR", f"{server}/{manner}/")


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_download_is_cached(
    card: cards.ModelCard, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_mirror(monkeypatch, server, "whole")
    assert not is_cached(card)
    path = fetch(card, progress=False)
    assert path == cached_file(card)
    assert is_cached(card)
    from_mirror(monkeypatch, server, "gone")
    assert fetch(card, progress=False) == path
    model = load_model(card, WeightsChoice(), Recipe())
    assert model.weights.sha256.startswith(card.sha256_prefix)


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("cut", "sent a file that differs from the published one|cannot download"),
        ("wrong", "sent a file that differs from the published one"),
        ("gone", "cannot download .* Not Found"),
    ],
)
def test_a_bad_answer_is_an_error_and_leaves_no_file(
    manner: str,
    words: str,
    card: cards.ModelCard,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_mirror(monkeypatch, server, manner)
    with pytest.raises(CheckpointError, match=words) as caught:
        fetch(card, progress=False)
    assert "--checkpoint demo.pth" in caught.value.hint
    assert files_under(cache_folder()) == []
    from_mirror(monkeypatch, server, "whole")
    assert fetch(card, progress=False).is_file()


def test_a_stalled_server_is_an_error(
    card: cards.ModelCard, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_mirror(monkeypatch, server, "stall")
    monkeypatch.setattr(download, "_STALL", 0.5)
    with pytest.raises(CheckpointError, match="timed out"):
        fetch(card, progress=False)
    assert files_under(cache_folder()) == []


def test_no_server_is_an_error(
    card: cards.ModelCard, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDEPLOY_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot download"):
        fetch(card, progress=False)


@pytest.mark.parametrize("asked", [True, False])
def test_offline_sends_no_request(
    asked: bool, card: cards.ModelCard, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked:
        monkeypatch.delenv("CLIPDEPLOY_OFFLINE")
    with serve(folder) as (address, log):
        from_mirror(monkeypatch, address, "whole")
        with pytest.raises(CheckpointError, match="not in the cache and downloads are off"):
            fetch(card, offline=asked, progress=False)
        assert log == []


def test_a_file_damaged_in_the_cache_is_refused(
    card: cards.ModelCard, server: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    from_mirror(monkeypatch, server, "whole")
    path = fetch(card, progress=False)
    tensors = torch.load(path, weights_only=True)
    tensors["head.bias"] += 1
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match="is not the published file"):
        load_model(card, WeightsChoice(), Recipe())


def test_a_cache_that_cannot_be_written(
    card: cards.ModelCard, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLIPDEPLOY_HOME", str(tmp_path / "file" / "home"))
    from_mirror(monkeypatch, server, "whole")
    with pytest.raises(FileError, match="cannot write"):
        fetch(card, progress=False)


@pytest.mark.parametrize("reference", ["hf://timm", "hf://", "hf://a/b/c", "hf:///x"])
def test_a_hub_reference_has_owner_and_name(reference: str) -> None:
    with pytest.raises(UsageError, match="is not a Hugging Face repository"):
        fetch_hub(reference)


DEMO = ("--model", "demo", "--checkpoint")


def export_on_hub(program: CommandProgram, server: str, tmp_path: Path, *more: str) -> str:
    # huggingface_hub reads its server's address when it is imported: another process.
    hub = {"HF_ENDPOINT": server, "CLIPDEPLOY_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    words = [*program.words, "export", "--quiet", "--workspace", str(tmp_path / "a"), *more]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, **hub}
    )
    return done.stdout + done.stderr


def test_hub_weights_export_and_are_cached(
    program: CommandProgram, server: str, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    said = export_on_hub(program, server, tmp_path, *DEMO, "hf://timm/vit_demo")
    assert "timm (flat safetensors)" in said
    again = export_on_hub(
        program, "http://127.0.0.1:9", tmp_path, *DEMO, "hf://timm/vit_demo", "--offline"
    )
    assert "timm (flat safetensors)" in again


def test_a_clip_of_the_hub_becomes_a_zero_shot_classifier(
    program: CommandProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("CLIPDEPLOY_OFFLINE")
    clip = cards.demo_file("clip")
    texts = ["--zero-shot", str(clip / "digits.txt")]
    with serve(clip) as (address, _):
        said = export_on_hub(program, address, tmp_path, "--model", "owner/clip-demo", *texts)
        assert "zero-shot classifier of" in said
        assert "owner--clip-demo" in said
        refused = export_on_hub(program, address, tmp_path, "--model", "demo", *texts)
    assert "needs the checkpoint of a CLIP" in refused


def test_open_clips_files_on_the_hub(
    program: CommandProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("CLIPDEPLOY_OFFLINE")
    write_clip("open_clip", tmp_path).rename(tmp_path / "open_clip_pytorch_model.bin")
    # As in timm's repositories of CLIPs: an image tower alone, here a classifier.
    shutil.copy(cards.demo_file("weights.safetensors"), tmp_path / "model.safetensors")
    config = {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    texts = ["--zero-shot", str(cards.demo_file("clip") / "digits.txt"), "--templates", "simple"]
    with serve(tmp_path) as (address, log):
        # Without its configuration, the file does not tell its GELU.
        said = export_on_hub(program, address, tmp_path, "--model", "laion/clip", *texts)
    assert "zero-shot classifier of" in said
    assert "open_clip_pytorch_model.bin" in said
    assert any("open_clip_config.json" in request for request in log)


def test_hub_errors_are_one_line(program: CommandProgram, server: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    said = export_on_hub(program, server, tmp_path, *DEMO, "hf://gone/vit_demo")
    assert said.startswith("error: hf://gone/vit_demo: none of model.safetensors, ")
    assert len(said.strip().splitlines()) == 1
    said = export_on_hub(program, server, tmp_path, *DEMO, "hf://timm/vit_demo", "--offline")
    assert "is in the cache, and downloads are off" in said


def test_old_files_of_killed_downloads_are_removed(
    card: cards.ModelCard, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = cached_file(card)
    kept.parent.mkdir(parents=True)
    # Named as torch.hub names them: see the next test.
    alive, dead = (kept.with_name(f"{kept.name}.{letter * 32}.partial") for letter in "ad")
    other = kept.with_name(f"other.pth.{'d' * 32}.partial")
    for unfinished in (alive, dead, other):
        unfinished.write_bytes(b"half of it")
    for unfinished in (dead, other):
        os.utime(unfinished, (0, 0))
    from_mirror(monkeypatch, server, "whole")
    fetch(card, progress=False)
    assert sorted(files_under(kept.parent)) == sorted([kept, alive, other])


def test_torch_names_unfinished_downloads_as_expected(
    card: cards.ModelCard, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    moved = shutil.move

    def move(source: str, target: str) -> object:
        seen.append(source)
        return moved(source, target)

    monkeypatch.setattr(shutil, "move", move)
    from_mirror(monkeypatch, server, "whole")
    path = fetch(card, progress=False)
    assert [fnmatch(name, str(path) + download._UNFINISHED) for name in seen] == [True]
