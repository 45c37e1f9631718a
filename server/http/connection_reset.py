"""Resets of TCP connections: what tells a client with HTTP/1.0, or one that reads lines, that an answer has broken.

HTTP/1.0 has no chunks: the end of the connection is the end of the body. A reset (RST) is not that end:
a client's read fails, and nginx, which asks its upstream with HTTP/1.0 by default, breaks its own answer off.
A socket with SO_LINGER 0 is reset when it closes, also by the kernel after a process was killed.

It knows nothing of answers; streaming.py decides when one has broken.
"""

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from pathlib import Path
from typing import Any, Final

from server.http.connections import connection_of
from server.http.request_scope import RELAYED

_LINGER: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: a close resets the connection."""
_NO_LINGER: Final = struct.pack("ii", 0, 0)

_FLUSH_S: Final = 0.5
_FLUSH_POLL_S: Final = 0.01


def can_reset(scope: Any) -> bool:
    """True if the client of this request would notice a reset of its connection.

    A relay that copies bytes between two connections can make a normal end of a reset. The one that can be recognised
    is Docker's: a port that is published on the loopback of the host comes from the container's own gateway.
    """
    if RELAYED in scope.get("state", {}):
        return False
    client = scope.get("client")
    return sys.platform == "linux" and bool(client) and str(client[0]) not in _default_gateways()


class ResettableConnection:
    """The TCP connection of one request: it is reset when it closes, unless `finish` was called before."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)

    def finish(self) -> None:
        """From now on the connection ends normally: the answer is complete, or a reset would discard some of it."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)

    async def flush(self, timeout_s: float = _FLUSH_S) -> bool:
        """Wait until what was sent so far has reached the client (True); a reset discards what still waits (False)."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline:
            # Granian writes in a thread of its own, so a queue that is empty at first may fill up yet.
            await asyncio.sleep(_FLUSH_POLL_S)
            if not self._unsent_bytes():
                return True
        return False

    def close(self) -> None:
        """Give the file descriptor back; granian closes its own."""
        self._socket.close()

    def _unsent_bytes(self) -> int:
        size = struct.pack("i", 0)
        return int(struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, size))[0])


def resettable_connection(scope: Any) -> ResettableConnection | None:
    """The connection of the request with this ASGI scope; None if the client has closed it."""
    found = connection_of(scope)
    return ResettableConnection(found) if found is not None else None


def _default_gateways() -> set[str]:
    """The IPv4 addresses of the default routes."""
    try:
        lines = Path("/proc/net/route").read_text().splitlines()[1:]
    except OSError:
        return set()
    routes = [line.split() for line in lines]
    return {socket.inet_ntoa(bytes.fromhex(route[2])[::-1]) for route in routes if route[1] == "00000000"}
