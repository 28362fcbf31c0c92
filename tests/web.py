"""A loopback web server with fault injection."""

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
"""Maps a path and the number of earlier requests for it to a fault; "" for none."""


@dataclass
class Web:
    """State of the server: files, faults and a log of requests.

    Attributes
    ----------
    files
        Content by path; may change while the server runs.
    fault
        Fault to inject. A number is an HTTP status ("429 7" adds Retry-After: 7). "reset" and "truncated" end the body
        half-way, "short" and "long" declare a wrong Content-Length, "slow" spreads the body over a second ("slow 6":
        over six).
    headers
        Headers added to every response.
    serves_ranges
        Whether to honor Range headers.
    sent
        Body bytes sent, by path.
    requests
        (path, Range header, status) of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    fault: Fault = lambda path, n: ""
    headers: dict[str, str] = field(default_factory=dict)
    serves_ranges: bool = True
    sent: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    address: str = ""

    def ranges(self, path: str) -> list[str]:
        """Return the Range headers of successful requests for a file."""
        return [header for requested, header, status in self.requests if requested == path and status < 300]


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
            n_before = sum(requested == path for requested, _, _ in web.requests)
            web.requests.append((path, self.headers.get("Range", ""), 0))
            index = len(web.requests) - 1
        fault, _, seconds = web.fault(path, n_before).partition(" ")
        body = web.files.get(path)
        if fault.isdigit() or body is None:
            self._respond(
                index, int(fault) if fault.isdigit() else 404, b"", {"Retry-After": seconds} if seconds else {}
            )
            return
        tag = _tag(body)
        status, headers = 200, {"ETag": tag}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if web.serves_ranges and match and self.headers.get("If-Range", tag) == tag:
            start, stop = int(match[1]), min(int(match[2] or len(body)) + 1, len(body))
            if start >= len(body):
                self._respond(index, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(body)}"
            body = body[start:stop]
        self._respond(index, status, body, headers, fault, float(seconds or 1))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _respond(
        self, index: int, status: int, body: bytes, headers: dict[str, str], fault: str = "", seconds: float = 0
    ) -> None:
        web, path = self.web, self.path
        web.requests[index] = (*web.requests[index][:2], status)
        declared = {"short": len(body) // 2, "long": len(body) + 10}.get(fault, len(body))
        self.send_response(status)
        for name, value in {**web.headers, **headers, "Content-Length": str(declared)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[:declared]
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
            time.sleep(0.02)  # let the data arrive before the reset
        if fault in ("reset", "truncated", "short", "long"):
            self.close_connection = True

    def log_message(self, *unused: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *unused: object) -> None:
        """Ignore clients that disconnect, which tests do on purpose."""


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
