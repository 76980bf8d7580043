"""Runs ``clipdeploy`` commands in separate processes without importing torch in each.

One process imports everything and forks a child per command.  The child equals a user's process
after its imports, because the server starts no thread and opens no device before it forks.

    python command_server.py     reads requests (JSON lines), writes one status per line
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["Command", "CommandServer", "command_server"]

# Modules imported before forking; children import the others.
_PRELOADED = (
    "clipdeploy.cli.main",
    "clipdeploy.benchmark.plot",
    "clipdeploy.doctor.findings",
    "clipdeploy.stages.demo",
    "clipdeploy.workspace.inspection",
    "clipdeploy.pipeline",
    "clipdeploy.stages.bisect",
    "clipdeploy.stages.package",
    "clipdeploy.stages.predict",
    "clipdeploy.stages.search",
    "clipdeploy.tuning.drawing",
    "clipdeploy.verification.result",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "networkx",
    "onnxruntime",
    "rich.progress",
    "safetensors.torch",
    "tensorrt_rtx",
    "torch._dynamo",
    "torch.hub",
    "torch.onnx._internal.exporter._core",
)


@dataclass(frozen=True)
class Command:
    """A command line; ``out`` and ``err`` are files or terminals.

    ``env`` is added to the environment, None removes a variable.  ``kill_at``: number of the file
    system operation under ``cwd`` at which the process kills itself; ``kill_after``: seconds after
    which it is killed; ``steps``: file to which the name of each operation is written; ``pid``:
    file to which the process writes its number.
    """

    words: tuple[str, ...]
    cwd: str
    out: str
    err: str
    env: dict[str, str | None] = field(default_factory=dict)
    kill_at: int | None = None
    kill_after: float | None = None
    steps: str | None = None
    pid: str | None = None


class CommandServer:
    """The forking process; runs one command at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, command: Command) -> int:
        """Run a command; return its exit code, or -N if signal N killed it."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(json.dumps(asdict(command)) + "\n")
        requests.flush()
        status = answers.readline()
        assert status, "the command server has died"
        return os.waitstatus_to_exitcode(int(status))


@contextmanager
def command_server(env: Mapping[str, str]) -> Iterator[CommandServer]:
    """Run a server during the block; ``env`` is added to the environment."""
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    ) as process:
        yield CommandServer(process)
        assert process.stdin is not None
        process.stdin.close()


def _become(command: Command) -> int:
    """Run the command in the child like ``python -m clipdeploy``; return its exit code."""
    os.setsid()
    # As in a terminal: what starts in the background may ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if command.pid:
        Path(command.pid).write_text(str(os.getpid()))
    opened = (("/dev/null", os.O_RDONLY), (command.out, os.O_RDWR), (command.err, os.O_RDWR))
    for number, (path, mode) in enumerate(opened):
        # The first terminal becomes the controlling terminal.
        descriptor = os.open(path, mode | os.O_CREAT, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    for name, value in command.env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(command.cwd)
    tempfile.tempdir = os.environ.get("TMPDIR")
    if command.steps or command.kill_at is not None:
        sys.addaudithook(_Steps(command))
    # Python created these for the inherited descriptors.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1 if os.isatty(number) else -1, closefd=False)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    from clipdeploy.cli.main import main

    try:
        main(list(command.words), prog_name="clipdeploy")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


class _Steps:
    """Counts Python's file system operations under a folder, and can kill the process at one.

    A kill between two operations leaves the same files, so killing at each operation covers every
    case, except for the content of a file that is being written.
    """

    EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"})
    WRITES = os.O_WRONLY | os.O_RDWR

    def __init__(self, command: Command) -> None:
        self._folder, self._pid = command.cwd, os.getpid()
        self._kill_at, self._log = command.kill_at, command.steps
        self._count = 0

    def __call__(self, event: str, words: tuple[object, ...]) -> None:
        if os.getpid() != self._pid or not self._is_step(event, words):
            return
        self._count += 1
        if self._log:
            descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, f"{event} {words[0]}\n".encode())
            os.close(descriptor)
        if self._count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_step(self, event: str, words: tuple[object, ...]) -> bool:
        path = os.fsdecode(words[0]) if words and isinstance(words[0], (str, bytes)) else ""
        if path == self._log or not os.path.abspath(path).startswith(self._folder):
            return False
        if event == "open":
            return isinstance(words[2], int) and bool(words[2] & self.WRITES)
        return event in self.EVENTS


def _serve() -> None:
    from PIL import Image

    for name in _PRELOADED:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    # Pillow loads its plug-ins with the first image.
    Image.init()
    sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
    assert threading.active_count() == 1
    # Children need not look at these objects again, nor copy their pages.
    gc.collect()
    gc.freeze()
    requests, answers = os.dup(0), os.dup(1)
    for line in open(requests, encoding="utf-8"):  # noqa: SIM115
        pid = os.fork()
        if pid == 0:
            os.closerange(3, max(requests, answers) + 1)
            request = json.loads(line)
            status = 70
            try:
                status = _become(Command(**request | {"words": tuple(request["words"])}))
            finally:
                os._exit(status)
        status = _wait(pid, json.loads(line)["kill_after"])
        os.write(answers, f"{status}\n".encode())


def _wait(pid: int, kill_after: float | None) -> int:
    """Wait for the child and return its status; its pid is not reused before waitpid returns."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, kill_after or 0)
    status = os.waitpid(pid, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return status


if __name__ == "__main__":
    _serve()
