"""The TCP connection of a request. Granian shows no socket, so it is found among the open files of the process.

The client's address tells which one it is. A search among 20,000 connections takes a tenth of a second: use a thread.
"""

import asyncio
import ctypes
import math
import os
import socket
import struct
import sys
from typing import Any, Final

_ADDRESS_BYTES: Final = 28
"""Room for an address of IPv6 or IPv4; the port stands at bytes 2 and 3 of both."""
_getpeername: Final = ctypes.CDLL(None).getpeername

_LAST_DATA_RECEIVED: Final = struct.Struct("=52xI")
"""tcpi_last_data_recv (ms) of the kernel's tcp_info (include/uapi/linux/tcp.h)."""

_DROPPED_BYTES: Final = 65_536
"""Bytes that `read_to_end` reads at once."""


def connection_of(scope: Any) -> socket.socket | None:
    """The connection of the request with this ASGI scope, on a descriptor of its own; None if it is closed."""
    host, port = str(scope["client"][0]), int(scope["client"][1])
    # A first look at the port alone: there may be 20,000 connections.
    wanted = port.to_bytes(2, "big")
    address = bytearray(_ADDRESS_BYTES)
    buffer = (ctypes.c_char * _ADDRESS_BYTES).from_buffer(address)
    size = ctypes.c_uint32(_ADDRESS_BYTES)
    size_pointer = ctypes.pointer(size)
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - a Path for each would take longer than all the rest
        size.value = _ADDRESS_BYTES
        if _getpeername(int(entry), buffer, size_pointer) == 0 and address[2:4] == wanted:
            found = _duplicate(int(entry), host, port)
            if found is not None:
                return found
    return None


async def read_to_end(connection: socket.socket) -> None:
    """End what this side sends, and drop what the client still sends until it ends, too.

    A close with unread bytes would be a reset: a client that is still sending then loses what it has not read yet.
    """
    connection.shutdown(socket.SHUT_WR)
    loop = asyncio.get_running_loop()
    while await loop.sock_recv(connection, _DROPPED_BYTES):  # noqa: ASYNC110 -- it polls nothing
        await asyncio.sleep(0)  # asyncio's own loop reads on without a pause while there is something


def seconds_since_received(scope: Any) -> float:
    """How long ago the last byte came from the client of this request; infinite if its connection is not known."""
    connection = connection_of(scope) if sys.platform == "linux" and scope.get("client") else None
    if connection is None:
        return math.inf
    with connection:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECEIVED.size)
    return float(_LAST_DATA_RECEIVED.unpack(info)[0]) / 1000


def _duplicate(fd: int, host: str, port: int) -> socket.socket | None:
    """A file descriptor of our own for the connection at `fd`, if its other end is `host` and `port`.

    Granian's threads may close `fd` meanwhile and open another file in its place, so the copy is what is checked.
    """
    try:
        copy = os.dup(fd)
    except OSError:
        return None
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    try:
        if connection.family in {socket.AF_INET, socket.AF_INET6} and connection.getpeername()[:2] == (host, port):
            return connection
    except OSError:
        pass
    connection.close()
    return None
