"""A connection between the first process of a run and each of the others, which ends when one of them does."""

import logging
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

logger = logging.getLogger(__name__)

KILLED = -1
"""Exit code of a process that did not say any."""

TIME_TO_CONNECT = 60.0
"""Seconds for all processes to connect."""

_RANK_BYTES, _TOKEN_BYTES = 8, 32


class Links:
    """Sockets by which processes learn that another one has ended.

    The operating system closes a socket when its process ends, however it ends. A process that ends in order says its
    exit code first, in one byte.

    Attributes
    ----------
    ranks
        The process at the other end of each socket that is open.
    """

    def __init__(self) -> None:
        self.ranks: dict[socket.socket, int] = {}

    def connect(self, rank: int, n_processes: int, broadcast: Callable[[Any], Any], host: str) -> None:
        """Connect all processes of a run, each of which calls this.

        Parameters
        ----------
        rank, n_processes
            Which process of how many this is.
        broadcast
            Returns in every process what the first one gives it.
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
                link = socket.create_connection((host, port), TIME_TO_CONNECT)
                link.sendall(f"{token}{rank:0{_RANK_BYTES}}".encode())
                _keep_alive(link)
                self.ranks[link] = 0

    def exit_code(self, link: socket.socket) -> int:
        """Return what the process at the other end of a readable socket said, or `KILLED`; close the socket."""
        try:
            said = link.recv(1)
        except OSError:
            said = b""
        self.ranks.pop(link, None)
        link.close()
        return said[0] if said else KILLED

    def say(self, exit_code: int) -> None:
        """Say that this process ends, or is going to."""
        for link in list(self.ranks):
            with suppress(OSError):
                link.sendall(bytes([exit_code]))

    def close(self, exit_code: int) -> None:
        """Say so, if not yet, and close the sockets."""
        self.say(exit_code)
        for link in list(self.ranks):
            link.close()
        self.ranks.clear()


@contextmanager
def _warning() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("the processes of this run cannot connect (%s) and may not notice when one ends", error)


def _accept(server: socket.socket, token: str, n_links: int, ranks: dict[socket.socket, int]) -> None:
    """Add `n_links` connections of processes that know the token to `ranks`."""
    server.settimeout(TIME_TO_CONNECT)
    while len(ranks) < n_links:
        link, _ = server.accept()
        link.settimeout(TIME_TO_CONNECT)
        hello = link.recv(_TOKEN_BYTES + _RANK_BYTES, socket.MSG_WAITALL).decode(errors="replace")
        if hello[:_TOKEN_BYTES] == token:
            _keep_alive(link)
            ranks[link] = int(hello[_TOKEN_BYTES:])
        else:  # a stranger
            link.close()


def _keep_alive(link: socket.socket) -> None:
    """Notice also that the machine at the other end is gone, within some ten seconds."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
