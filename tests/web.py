"""A web server on loopback that can be told to fail."""

import functools
import hashlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[[str, int], str]
"""(path, how many requests for it came before) → what goes wrong with this one; "" for nothing."""


@dataclass
class Web:
    """What is served, how, and what was asked for.

    Attributes
    ----------
    files
        Path → bytes; may be changed while it runs.
    fault
        What goes wrong. A number is an answer of that status ("429 7" with Retry-After: 7). "reset" and "truncated" end
        the body half-way, "short" and "long" announce a wrong length, "slow" sends it in small pieces, within a second
        ("slow 6": six).
    headers
        Sent along with every answer.
    serves_ranges
        Otherwise every answer is the whole file.
    sent
        Bytes of bodies, by path.
    asked
        (path, Range header, status) of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    fault: Fault = lambda path, n: ""
    headers: dict[str, str] = field(default_factory=dict)
    serves_ranges: bool = True
    sent: Counter[str] = field(default_factory=Counter)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    address: str = ""

    def ranges(self, path: str) -> list[str]:
        """Ranges of a file that were asked for and given."""
        return [wanted for at, wanted, status in self.asked if at == path and status < 300]


@functools.cache
def _tag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    web: Web

    def do_GET(self) -> None:
        web, path = self.web, self.path
        with web.lock:
            n_before = sum(at == path for at, _, _ in web.asked)
            web.asked.append((path, self.headers.get("Range", ""), 0))
            mine = len(web.asked) - 1
        fault, _, seconds = web.fault(path, n_before).partition(" ")
        body = web.files.get(path)
        if fault.isdigit() or body is None:
            self._answer(mine, int(fault) if fault.isdigit() else 404, b"", {"Retry-After": seconds} if seconds else {})
            return
        tag = _tag(body)
        status, headers = 200, {"ETag": tag}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if web.serves_ranges and wanted and self.headers.get("If-Range", tag) == tag:
            start, stop = int(wanted[1]), min(int(wanted[2] or len(body)) + 1, len(body))
            if start >= len(body):
                self._answer(mine, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(body)}"
            body = body[start:stop]
        self._answer(mine, status, body, headers, fault, float(seconds or 1))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(
        self, mine: int, status: int, body: bytes, headers: dict[str, str], fault: str = "", seconds: float = 0
    ) -> None:
        web, path = self.web, self.path
        web.asked[mine] = (*web.asked[mine][:2], status)
        announced = {"short": len(body) // 2, "long": len(body) + 10}.get(fault, len(body))
        self.send_response(status)
        for name, value in {**web.headers, **headers, "Content-Length": str(announced)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[:announced]
        if fault in ("reset", "truncated"):
            body = body[: len(body) // 2]
        step = max(1, len(body) // 20) if fault == "slow" else 2**20
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            with web.lock:
                web.sent[path] += len(body[start : start + step])
            if fault == "slow":
                time.sleep(seconds / 20)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(0.02)  # what was sent shall arrive before the reset overtakes it
        if fault in ("reset", "truncated", "short", "long"):
            self.close_connection = True

    def log_message(self, *unused: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *unused: object) -> None:
        """Clients that go away are what the tests are about."""


@contextmanager
def serve(web: Web) -> Iterator[Web]:
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": web}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    web.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
