"""Sockets between the first process of a run and the others, to detect when one ends."""

import logging
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

logger = logging.getLogger(__name__)

KILLED = -1
"""Exit code of a process that did not report one."""

CONNECT_TIMEOUT = 60.0
"""Seconds to wait for all processes to connect."""

HELLO_TIMEOUT = 5.0
"""Seconds to wait for a new connection to identify itself."""

_RANK_BYTES, _TOKEN_BYTES = 8, 32


class Links:
    """Sockets by which processes detect that another one has ended.

    The operating system closes a process's sockets, however it ends. In an orderly exit, a process first sends its
    exit code as one byte.

    Attributes
    ----------
    ranks
        Rank of the peer of each open socket.
    """

    def __init__(self) -> None:
        self.ranks: dict[socket.socket, int] = {}

    def connect(self, rank: int, n_processes: int, broadcast: Callable[[Any], Any], host: str) -> None:
        """Connect the processes of a run; each of them calls this.

        Parameters
        ----------
        rank, n_processes
            Rank of this process, and number of processes.
        broadcast
            Returns, in every process, the argument given in the first one.
        host
            Address of the first process.
        """
        if rank == 0:
            local = host in ("127.0.0.1", "localhost")
            with socket.create_server(("127.0.0.1" if local else "", 0)) as server:
                token = secrets.token_hex(_TOKEN_BYTES // 2)
                broadcast((server.getsockname()[1], token))
                with _warning():
                    _accept(server, token, n_processes - 1, self.ranks)
        else:
            port, token = broadcast(None)
            with _warning():
                link = socket.create_connection((host, port), CONNECT_TIMEOUT)
                link.sendall(f"{token}{rank:0{_RANK_BYTES}}".encode())
                _keep_alive(link)
                self.ranks[link] = 0

    def exit_code(self, link: socket.socket) -> int:
        """Return the exit code received on a readable socket, or `KILLED`, and close the socket."""
        try:
            received = link.recv(1)
        except OSError:
            received = b""
        self.ranks.pop(link, None)
        link.close()
        return received[0] if received else KILLED

    def send_exit_code(self, exit_code: int) -> None:
        """Announce the exit code of this process to its peers."""
        for link in list(self.ranks):
            with suppress(OSError):
                link.sendall(bytes([exit_code]))

    def close(self, exit_code: int) -> None:
        """Announce the exit code and close the sockets."""
        self.send_exit_code(exit_code)
        for link in list(self.ranks):
            link.close()
        self.ranks.clear()


@contextmanager
def _warning() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("the processes of this run cannot connect (%s); they may not detect when one ends", error)


def _accept(server: socket.socket, token: str, n_links: int, ranks: dict[socket.socket, int]) -> None:
    """Accept `n_links` connections that present the token, and add them to `ranks`."""
    server.settimeout(CONNECT_TIMEOUT)
    while len(ranks) < n_links:
        link, _ = server.accept()
        link.settimeout(HELLO_TIMEOUT)
        hello = ""
        with suppress(OSError):
            hello = link.recv(_TOKEN_BYTES + _RANK_BYTES, socket.MSG_WAITALL).decode(errors="replace")
        if hello[:_TOKEN_BYTES] == token:
            _keep_alive(link)
            ranks[link] = int(hello[_TOKEN_BYTES:])
        else:  # not a process of this run
            link.close()


def _keep_alive(link: socket.socket) -> None:
    """Enable keepalive probes, which detect a lost machine within about ten seconds."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
