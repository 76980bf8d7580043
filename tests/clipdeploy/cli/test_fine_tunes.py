"""``export --checkpoint FILE`` alone: the model is inferred, and what was chosen is printed."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from clipdeploy.cli.main import main
from clipdeploy.models import cards
from exporters.headers import read_passport

NAMES = list("abcde")


def fine_tune(path: Path) -> Path:
    """A checkpoint of five classes, as timm's saver writes it, and a probe of it."""
    weights = load_file(cards.demo_file("weights.safetensors"))
    weights |= {name: weights[name][:5].clone() for name in ("head.weight", "head.bias")}
    raw = weights | {"head.bias": weights["head.bias"] + 1}
    content = {"state_dict": raw, "state_dict_ema": weights, "args": argparse.Namespace(lr=1)}
    torch.save(content | {"class_names": NAMES}, path)
    return path


def test_a_checkpoint_alone_is_exported(tmp_path: Path, demo_model: object) -> None:
    checkpoint = fine_tune(tmp_path / "model_best.pth.tar")
    inputs = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        logits = demo_model.module(torch.from_numpy(inputs)).numpy()[:, :5]  # type: ignore[attr-defined]
    np.savez(tmp_path / "probe.npz", inputs=inputs, logits=logits)
    words = ["export", "--checkpoint", str(checkpoint), "--workspace", str(tmp_path / "a")]
    probe = ["--probe", str(tmp_path / "probe.npz")]
    wrong = CliRunner().invoke(main, [*words, *probe, "--no-ema"])
    assert wrong.exit_code == 1
    assert "with the averaged weights they agree" in wrong.stderr
    assert "--ema" in wrong.stderr
    done = CliRunner().invoke(main, [*words, *probe])
    assert done.exit_code == 0, done.stderr
    assert f"model: {cards.DEMO} (inferred from" in done.stderr
    assert "averaged (EMA) weights of state_dict_ema" in done.stderr
    assert "2 inputs agree" in done.stderr
    passport = read_passport(tmp_path / "a" / cards.DEMO / "fp32.onnx")
    assert passport.class_names == tuple(NAMES)
    assert passport.weights.choices.averaged is True
    assert passport.weights.probed
