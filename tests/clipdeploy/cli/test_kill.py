"""Kill a command at any moment and run it again: it completes, as if nothing had happened.

Two kinds of moments, both seeded: at a step on the file system, between which a kill always leaves
the same files, and after a share of the time that the command takes.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX signals", allow_module_level=True)

from command_cases import SEARCH, prepare
from command_server import Command, CommandServer

from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

pytestmark = pytest.mark.slow

MODEL = f"artifacts/{cards.DEMO}"
STEPS, TIMES = 2, 1
# What is of one run and not of its result.
# ``sum`` covers the state of the files, ``stamps``.
PASSING = frozenset(
    {"build_seconds", "changed", "environment", "rounds", "stamps", "sum", "warmup"}
)


@dataclass(frozen=True)
class Killed:
    """``words`` are typed where ``missing`` is not there; ``measured``: figures vary.

    A ``quick`` one is killed before each renaming as well.
    """

    words: str
    missing: tuple[str, ...] = ()
    engine: bool = False
    measured: bool = False
    quick: bool = False


KILLED = (
    Killed("export --model demo", ("artifacts",)),
    Killed("quantize --range minmax"),
    Killed("calibrate --data calibration.zip --images 24", (f"{MODEL}/calibration.json",)),
    Killed("quantize", (f"{MODEL}/int8.onnx",)),
    Killed(
        "build-engine --int8 --data calibration.zip --images 24",
        (f"{MODEL}/int8.onnx", f"{MODEL}/calibration.json"),
        engine=True,
    ),
    Killed("verify --data test.zip --images 12 --max-drop 45 --batch 4 --output verdict.json"),
    Killed("bisect --data test.zip --images 2 --output bisection.svg"),
    Killed(SEARCH),
    Killed("benchmark --batch 1 --rounds 3 --warmup 0.01 --output speed.svg", measured=True),
    Killed("package --triton models", quick=True),
    Killed(f"package {MODEL}/int8.onnx --triton old --force", quick=True),
    Killed(f"package {MODEL}/int8.onnx --cpp program --force", quick=True),
)


@pytest.fixture(scope="module")
def server(commands: CommandServer) -> CommandServer:
    return commands.with_env({"CLIPDEPLOY_OFFLINE": "1"})


class Place:
    """A folder in which a command is killed and run again; the cache and scratch files too."""

    def __init__(self, root: Path, case: Killed, made: Workspace, server: CommandServer) -> None:
        self.root, self._case, self._server = root, case, server
        root.mkdir()
        prepare(made, root)
        for name in ("home", "tmp"):
            (root / name).mkdir()
        if "--force" in case.words:
            for folder, kind in (("old", "--triton"), ("program", "--cpp")):
                words = f"package {MODEL}/fp32.onnx {kind} {folder}"
                name = " --name clip-vit-demo-int8" if kind == "--triton" else ""
                assert self._server.run(self._command((words + name).split())) == 0
        for name in case.missing:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _command(self, words: list[str], **options: Any) -> Command:
        env: dict[str, str | None] = {
            "CLIPDEPLOY_HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
        }
        out, err = (str(self.root.with_suffix(end)) for end in (".out", ".err"))
        for path in (out, err):
            Path(path).unlink(missing_ok=True)
        return Command(tuple(words), str(self.root), out, err, env, **options)

    def command(self, **options: Any) -> Command:
        return self._command([*self._case.words.split(), "--json"], **options)

    def run(self) -> object:
        """Run it to its end; its result."""
        status = self._server.run(self.command())
        assert status == 0, self.root.with_suffix(".err").read_text()
        return self.result()

    def result(self) -> object:
        found = json.loads(self.root.with_suffix(".out").read_bytes())
        return lasting(found, figures=not self._case.measured)

    def files(self) -> dict[str, object]:
        """What lies there, by its path; JSON without what is of one run."""
        return {
            str(path.relative_to(self.root)): content(path)
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and "home" not in path.relative_to(self.root).parts
        }


def content(path: Path) -> object:
    data = path.read_bytes()
    if path.suffix == ".svg":
        return data.rstrip().endswith(b"</svg>")
    if path.suffix == ".json" and data.startswith((b"{", b"[")):
        return lasting(json.loads(data))
    if path.suffix == ".jsonl":
        return [lasting(json.loads(line)) for line in data.splitlines()]
    return hashlib.sha256(data).hexdigest()


def lasting(value: Any, *, figures: bool = True) -> object:
    """A result without what differs from run to run."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key not in PASSING}
        return {key: lasting(part, figures=figures) for key, part in kept.items()}
    if isinstance(value, list):
        return [lasting(part, figures=figures) for part in value]
    return value if figures or not isinstance(value, float) else None


def stray(place: Place) -> list[str]:
    """Files of killed writers."""
    return [
        name
        for name in place.files()
        if any(
            part.startswith(".") and part.endswith((".part", ".old")) for part in name.split("/")
        )
    ]


def moments(count: int, generator: random.Random) -> list[float]:
    """Shares of the whole, one in each of ``count`` equal parts of it."""
    return [(part + generator.random()) / count for part in range(count)]


@pytest.mark.parametrize("case", KILLED, ids=lambda case: case.words.replace(" ", "_"))
def test_killed_and_run_again(
    case: Killed, demo_workspace: Workspace, server: CommandServer, tmp_path: Path
) -> None:
    if case.engine:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    whole = Place(tmp_path / "whole", case, demo_workspace, server)
    before, log = whole.files(), tmp_path / "steps"
    started = time.perf_counter()
    assert server.run(whole.command(steps=str(log))) == 0
    seconds = time.perf_counter() - started
    result, after = whole.result(), whole.files()
    assert stray(whole) == []
    steps = log.read_text().splitlines() if log.exists() else []
    generator = random.Random(case.words)
    some = [1 + int(share * len(steps)) for share in moments(STEPS, generator)]
    renames = [number for number, step in enumerate(steps, 1) if step.startswith("os.rename")]
    kills: list[int | float] = sorted({*some, *(renames if case.quick else ())})
    kills += [share * seconds for share in moments(TIMES, generator)]
    killed = 0
    for number, moment in enumerate(kills):
        place = Place(tmp_path / str(number), case, demo_workspace, server)
        options = {"kill_at" if isinstance(moment, int) else "kill_after": moment}
        killed += server.run(place.command(**options)) == -signal.SIGKILL
        nothing_half_done(place.files(), before, after)
        assert place.run() == result, moment
        assert stray(place) == [], moment
        assert place.files() == after, moment
        shutil.rmtree(place.root)
    assert killed, "no kill came in the middle"


def nothing_half_done(
    found: dict[str, object], before: dict[str, object], after: dict[str, object]
) -> None:
    """Under every name that a later command looks at lies what was there, or what is to be."""
    for name, data in found.items():
        unfinished = name.endswith((".part", ".partial", ".old")) or "/." in f"/{name}"
        if unfinished or name.startswith("tmp/") or "/search/" in name:
            continue  # a search's state is whole at any time, and read again
        assert data in (before.get(name), after.get(name)), name


def test_a_half_written_file_is_noticed(
    demo_workspace: Workspace, server: CommandServer, tmp_path: Path
) -> None:
    place = Place(tmp_path / "place", Killed("quantize"), demo_workspace, server)
    before = place.files()
    graph = place.root / MODEL / "int8.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(AssertionError, match=r"int8\.onnx"):
        nothing_half_done(place.files(), before, before)
    (place.root / MODEL / ".a.onnx.abcdefgh.part").write_bytes(b"half of it")
    assert stray(place) == [f"{MODEL}/.a.onnx.abcdefgh.part"]


def test_a_kill_comes_at_its_step(
    demo_workspace: Workspace, server: CommandServer, tmp_path: Path
) -> None:
    case = Killed("quantize", (f"{MODEL}/int8.onnx",))
    place, log = Place(tmp_path / "place", case, demo_workspace, server), tmp_path / "steps"
    assert server.run(place.command(steps=str(log))) == 0
    steps = log.read_text().splitlines()
    assert any(step.startswith("os.rename") and ".part" in step for step in steps)
    graph = place.root / MODEL / "int8.onnx"
    graph.unlink()
    rename = next(n for n, step in enumerate(steps, 1) if step.startswith("os.rename"))
    assert server.run(place.command(kill_at=rename)) == -signal.SIGKILL
    assert not graph.exists()
    assert len(stray(place)) == 1
