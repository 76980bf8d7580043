"""Runs ``clipdeploy`` commands in separate processes without importing torch in each.

One process imports everything and forks a child per command.  The child equals a user's process
after its imports, because the server starts no thread and opens no device before it forks.  The
server also traces the demo once, which takes most of its export's time (see ``shared_traces``).
Verifications take repeated calls from memory (``judging.each_once``), but not those of the program.

    python command_server.py SOCKET     reads requests (JSON lines), writes one status per line

At the socket it serves ``command_client.py``, a program that can be used in place of
``clipdeploy`` in shells and pipes.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Command", "CommandProgram", "CommandServer", "command_server"]

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
    file to which the process writes its number; ``largest_file``: bytes that a file may have.
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
    largest_file: int | None = None


@dataclass(frozen=True)
class CommandProgram:
    """``words`` start a command through a server, as ``python -m clipdeploy`` starts it itself."""

    words: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        """Write the program ``clipdeploy`` to ``folder``, which shells find on their PATH."""
        path = folder / "clipdeploy"
        path.write_text(f'#!/bin/sh\nexec {shlex.join(self.words)} "$@"\n')
        path.chmod(0o755)
        return path


@dataclass(frozen=True)
class CommandServer:
    """The forking process; runs one command at a time, and any number for the ``program``.

    ``env`` is added to the environment of commands.
    """

    process: subprocess.Popen[str]
    program: CommandProgram
    env: Mapping[str, str | None] = field(default_factory=dict)

    def with_env(self, env: Mapping[str, str | None]) -> CommandServer:
        """Return the same server for commands with this in their environment."""
        return replace(self, env=env)

    def run(self, command: Command) -> int:
        """Run a command; return its exit code, or -N if signal N killed it."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        command = replace(command, env={**self.env, **command.env})
        requests.write(json.dumps(asdict(command)) + "\n")
        requests.flush()
        status = answers.readline()
        assert status, "the command server has died"
        return os.waitstatus_to_exitcode(int(status))


@contextmanager
def command_server() -> Iterator[CommandServer]:
    """Run a server during the block."""
    client = str(Path(__file__).with_name("command_client.py"))
    # In a folder of its own, since the path of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder, "socket"))
        with subprocess.Popen(
            [sys.executable, __file__, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            program = CommandProgram((sys.executable, "-IS", client, address))
            server = CommandServer(process, program)
            # It answers once it listens.
            nothing = Command(("--version",), folder, os.devnull, os.devnull)
            assert server.run(nothing) == 0
            yield server
            assert process.stdin is not None
            process.stdin.close()


def _become(command: Command) -> int:
    """Run the command in the child like ``python -m clipdeploy``; return its exit code."""
    os.setsid()
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
    if command.largest_file is not None:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (command.largest_file, command.largest_file))
    if command.steps or command.kill_at is not None:
        sys.addaudithook(_Steps(command))
    from judging import each_once

    with each_once():
        return _run(command.words, (0, 1, 2))


def _run(words: Sequence[str], streams: Collection[int]) -> int:
    """Run the command with these standard streams, in the environment and folder of the process."""
    # As in a terminal: what starts in the background may ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = os.environ.get("TMPDIR")
    # Python created these for the inherited descriptors.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1 if os.isatty(number) else -1, closefd=False)  # noqa: SIM115
        if number in streams
        else None
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    from clipdeploy.cli.main import main

    try:
        main(list(words), prog_name="clipdeploy")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
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
    import judging  # noqa: F401
    from PIL import Image

    for name in _PRELOADED:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    # Pillow loads its plug-ins with the first image.
    Image.init()
    _trace_demo()
    sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
    assert threading.active_count() == 1
    # Children need not look at these objects again, nor copy their pages.
    gc.collect()
    gc.freeze()
    requests, answers = os.dup(0), os.dup(1)
    clients = socket.socket(socket.AF_UNIX)
    clients.bind(sys.argv[1])
    clients.listen()
    lines = open(requests, "rb", buffering=0)  # noqa: SIM115
    while True:
        ready, _, _ = select.select([lines, clients], [], [])
        if clients in ready:
            _answer(clients.accept()[0])
        if lines in ready:
            line = lines.readline()
            if not line:
                for pid in _SERVING:
                    os.waitpid(pid, 0)
                return
            os.write(answers, f"{_forked(Command(**json.loads(line)))}\n".encode())


def _forked(command: Command) -> int:
    """Run the command in a child; return its status."""
    pid = os.fork()
    if pid == 0:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        status = 70
        try:
            status = _become(command)
        finally:
            os._exit(status)
    return _wait(pid, command.kill_after)


# The processes that serve clients, and how often in seconds one looks if its command has ended.
_SERVING: list[int] = []
_POLL = 0.01


def _answer(connection: socket.socket) -> None:
    """Serve a client in a child, so that several can run at once, as in a pipe of shells."""
    pid = os.fork()
    if pid == 0:
        _serve_client(connection)
    connection.close()
    _SERVING.append(pid)
    # Those that have ended.
    _SERVING[:] = [each for each in _SERVING if os.waitpid(each, os.WNOHANG) == (0, 0)]


def _serve_client(connection: socket.socket) -> NoReturn:
    """Run the client's command in a child and report how it ended; kill it if the client ends."""
    size, given, _, _ = socket.recv_fds(connection, 8, 3)
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        data += connection.recv(1 << 16)
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = _become_client(json.loads(data), given)
        finally:
            os._exit(status)
    for descriptor in given:
        os.close(descriptor)
    connection.sendall(pid.to_bytes(8, "big"))
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            connection.sendall(status.to_bytes(8, "big"))
            os._exit(0)
        # The client sends nothing more: it has ended.
        if select.select([connection], [], [], _POLL)[0]:
            os.kill(pid, signal.SIGKILL)
            os._exit(0)


def _become_client(request: Mapping[str, Any], given: Sequence[int]) -> int:
    """Run the command with the client's environment, folder and streams."""
    streams = dict(zip(request["streams"], given, strict=True))
    for number in range(3):
        if number in streams:
            os.dup2(streams[number], number)
        else:
            os.close(number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    return _run(request["words"], streams)


def _trace_demo() -> None:
    """Trace the demo as its export does, for the exports of all children."""
    import torch
    import tqdm
    from shared_traces import keep_traces

    from clipdeploy.core.passport import Recipe
    from clipdeploy.models import cards
    from clipdeploy.models.load import WeightsChoice, load_model
    from clipdeploy.stages.class_names import name_classes
    from clipdeploy.stages.export import _passport
    from exporters.onnx import ExportConfig, trace

    # Threads would be lost in a child: those of PyTorch, and the one that redraws bars of tqdm.
    tqdm.tqdm.monitor_interval = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weights = WeightsChoice()
    model = load_model(cards.find(cards.DEMO), weights, Recipe())
    keep_traces()
    trace(model.module, _passport(model, name_classes(model, weights)), ExportConfig())
    torch.set_num_threads(threads)


def _wait(pid: int, kill_after: float | None) -> int:
    """Wait for the child and return its status; its pid is not reused before waitpid returns."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, kill_after or 0)
    status = os.waitpid(pid, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return status


if __name__ == "__main__":
    _serve()
