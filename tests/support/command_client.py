"""``clipdeploy`` as a program whose work a command server does, without the time of its imports.

    python -IS command_client.py SOCKET WORDS...

Passes the words, working folder, environment and standard streams to the server of
``command_server.py``, forwards signals to the process that it forks, and ends as that process does.
A stream that is closed here is closed there.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys


def main() -> None:
    # Before anything else is opened, which would get the number of a closed stream.
    streams = [number for number in (0, 1, 2) if _is_open(number)]
    address, *words = sys.argv[1:]
    opened = socket.socket(socket.AF_UNIX)
    server = socket.socket(fileno=fcntl.fcntl(opened.fileno(), fcntl.F_DUPFD, 3))
    opened.close()
    server.connect(address)
    request = {"words": words, "cwd": os.getcwd(), "env": dict(os.environ), "streams": streams}
    data = json.dumps(request).encode()
    size = len(data).to_bytes(8, "big")
    if streams:
        socket.send_fds(server, [size], streams)
    else:
        server.sendall(size)
    server.sendall(data)
    pid = _number(server)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: os.kill(pid, got))
    code = os.waitstatus_to_exitcode(_number(server))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _number(server: socket.socket) -> int:
    data = server.recv(8)
    assert len(data) == 8, "the command server has died"
    return int.from_bytes(data, "big")


if __name__ == "__main__":
    main()
