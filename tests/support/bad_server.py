"""A local HTTP server whose path selects a failure.

/whole/FILE      the file
/cut/FILE        half of the file, with the Content-Length of all of it
/wrong/FILE      other bytes of the same length
/stall/FILE      half of the file, then no more data
/short/FILE      half of the file, with that Content-Length
/gone/FILE       404
/OWNER/NAME/resolve/main/FILE   the file, as the Hugging Face hub serves it

A failure can be limited to files with a text in their name: ``/cut-00002-of/...``.  A request for
the rest of a file gets all of the rest.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def _handler(folder: Path, released: threading.Event, log: list[str]) -> type:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            first = self._first_byte()
            log.append(f"{self.command} {self.path}{f' from {first}' if first else ''}")
            owner, name = self.path.split("/")[1], self.path.rpartition("/")[2]
            manner, _, part = owner.partition("-")
            manner = manner if part in name and not first else "whole"
            file = folder / name
            if manner == "gone" or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            whole = file.read_bytes()
            data = whole[first:]
            if manner == "short" and body:
                data = data[: len(data) // 2]
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(data)))
            if first:
                last = len(whole) - 1
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
            self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.end_headers()
            if not body:
                return
            if manner == "wrong":
                data = bytes(byte ^ 1 for byte in data)
            if manner in ("cut", "stall"):
                data = data[: len(data) // 2]
            self.wfile.write(data)
            self.wfile.flush()
            if manner == "stall":
                released.wait(30)
            self.close_connection = True

        def _first_byte(self) -> int:
            range_ = self.headers.get("Range", "")
            return int(range_.removeprefix("bytes=").partition("-")[0]) if range_ else 0

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Run the server during the block; yield its address and the list of requests."""
    released, log = threading.Event(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, released, log))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        released.set()
        server.shutdown()
        server.server_close()
