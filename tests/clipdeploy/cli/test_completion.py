"""Completion as the shells ask for it: through click's protocol, and in a real shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from clipdeploy.cli.completion import COMPLETE_VARIABLE, SHELLS
from clipdeploy.cli.main import main
from clipdeploy.models import cards

PROGRAM = "import sys\nfrom clipdeploy.cli.main import main\nmain(prog_name='clipdeploy')\n"


def ask(shell: str, *words: str, here: Path | None = None) -> list[str]:
    """The values that the program offers for the last of ``words``, asked as ``shell`` asks."""
    line = " ".join(("clipdeploy", *words))
    at = words[-1] if shell == "fish" else str(len(words))
    asked = {COMPLETE_VARIABLE: f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": at}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **asked},
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return _values(shell, done.stdout.splitlines())


def _values(shell: str, lines: list[str]) -> list[str]:
    if shell == "bash":
        return [line.partition(",")[2] for line in lines if line]
    if shell == "fish":
        return [line.partition(",")[2].partition("\t")[0] for line in lines if line]
    return lines[1::3]


def script(shell: str) -> str:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_asks_the_program(shell: str) -> None:
    assert f"{COMPLETE_VARIABLE}={shell}_complete" in script(shell)
    assert "clipdeploy" in script(shell)
    completed = CliRunner().invoke(main, ["completion", shell, "--json"])
    assert json.loads(completed.stdout) == {
        "shell": shell,
        "script": script(shell).removesuffix("\n"),
    }


def test_an_unknown_shell_is_refused() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_model_names(shell: str) -> None:
    offered = ask(shell, "export", "--model", "clip-vit-base-p16")
    assert offered == [
        name
        for card in cards.all_cards()
        for name in (card.name, *card.aliases)
        if name.startswith("clip-vit-base-p16")
    ]
    assert "clip-vit-base-p16" in offered
    assert ask(shell, "export", "--model", "clip-vit-giant") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_options_and_choices(shell: str) -> None:
    assert ask(shell, "ver") == ["verify"]
    assert ask(shell, "build-engine", "--back") == ["--backend"]
    assert ask(shell, "build-engine", "--backend", "tensorrt-") == ["tensorrt-rtx"]
    assert ask(shell, "verify", "--max-d") == ["--max-drop"]
    assert ask(shell, "verify", "me") == ["merge"]


def test_names_of_other_projects_come_where_only_they_fit() -> None:
    result = ask("bash", "zoo", "show", "vit_base")
    names = [card.timm_name for card in cards.all_cards()]
    assert result == [name for name in names if name.startswith("vit_base")]
    assert all(
        name.startswith("clip-vit") or name == "demo" for name in ask("bash", "zoo", "show", "")
    )


def test_zsh_and_fish_tell_the_accuracy() -> None:
    asked = {COMPLETE_VARIABLE: "zsh_complete", "COMP_WORDS": "clipdeploy export --model demo"}
    completed = CliRunner(env={**asked, "COMP_CWORD": "3"}).invoke(main, [], prog_name="clipdeploy")
    assert completed.stdout.split("\n")[:3] == ["plain", "demo", "top-1 99.4 % at 32 px"]


def test_artifacts_of_the_workspace_come_first(tmp_path: Path) -> None:
    made = tmp_path / "artifacts" / cards.DEMO
    made.mkdir(parents=True)
    for name in ("a.onnx", "b.engine", "b.engine.json"):
        (made / name).touch()
    paths = [f"artifacts/{cards.DEMO}/a.onnx", f"artifacts/{cards.DEMO}/b.engine"]
    for words in (("inspect", ""), ("verify", ""), ("benchmark", ""), ("package", "")):
        assert ask("bash", *words, here=tmp_path) == paths
    assert ask("bash", "predict", "--artifact", paths[0][:-5], here=tmp_path) == paths[:1]
    # Where none begins so, the shell completes files itself.
    assert ask("bash", "inspect", "elsewhere/", here=tmp_path) == ["elsewhere/"]
    assert ask("bash", "inspect", "--workspace", "other", "x", here=tmp_path) == ["x"]


def test_a_broken_file_is_no_matter_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPDEPLOY_CONFIG")
    (tmp_path / "clipdeploy.toml").write_text("workspace =")
    assert ask("bash", "export", "--model", "dem", here=tmp_path) == ["demo"]
    (tmp_path / "clipdeploy.toml").write_text('workspace = "kept"')
    (tmp_path / "kept" / "m").mkdir(parents=True)
    (tmp_path / "kept" / "m" / "x.onnx").touch()
    assert ask("bash", "inspect", "", here=tmp_path) == ["kept/m/x.onnx"]


def test_completing_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from clipdeploy.cli.main import main\n"
        "try:\n    main(prog_name='clipdeploy')\n"
        "finally:\n"
        "    heavy = {'torch', 'tensorrt', 'tensorrt_rtx', 'onnx', 'onnxruntime', 'numpy'}\n"
        "    print('HEAVY', sorted(heavy & sys.modules.keys()))\n"
    )
    words = "clipdeploy export --model dem"
    asked = {COMPLETE_VARIABLE: "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "plain,demo\nHEAVY []\n"


@pytest.fixture
def on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``clipdeploy`` that a shell finds, whether or not the package is installed."""
    program = tmp_path / "bin" / "clipdeploy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{PROGRAM}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def in_shell(shell: str, code: str, here: Path) -> list[str]:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    words = [program, *(("--norc",) if shell == "bash" else ()), "-c", code]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.usefixtures("on_the_path")
def test_a_real_bash_completes(tmp_path: Path) -> None:
    code = (
        'eval "$(clipdeploy completion bash)"\n'
        "COMP_WORDS=(clipdeploy export --model clip-vit-d)\nCOMP_CWORD=3\n"
        "complete -p clipdeploy\n_clipdeploy_completion clipdeploy\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert in_shell("bash", code, tmp_path) == [
        "complete -o nosort -F _clipdeploy_completion clipdeploy",
        cards.DEMO,
    ]


@pytest.mark.usefixtures("on_the_path")
def test_a_real_fish_completes(tmp_path: Path) -> None:
    code = 'clipdeploy completion fish | source\ncomplete -C "clipdeploy export --model clip-vit-d"'
    assert in_shell("fish", code, tmp_path) == [f"{cards.DEMO}\ttop-1 99.4 % at 32 px"]


@pytest.mark.usefixtures("on_the_path")
def test_a_real_zsh_takes_the_script(tmp_path: Path) -> None:
    code = (
        "autoload -Uz compinit && compinit -D -u\n"
        'eval "$(clipdeploy completion zsh)"\nprint -r -- ${_comps[clipdeploy]}'
    )
    assert in_shell("zsh", code, tmp_path) == ["_clipdeploy_completion"]
