"""Ports for the servers that a test starts."""

import itertools
import os
import socket
from typing import Final

FIRST: Final = 20_000
LAST: Final = 32_000
"""Below the ports that Linux gives to outgoing connections: none of those takes a port before its server binds it."""

_ports: Final = itertools.count(os.getpid() * 397)
"""Begins elsewhere in every pytest process, so that two that run at once do not choose the same port."""


def free_port() -> int:
    """A port of the loopback on which no process listens."""
    while True:
        port = FIRST + next(_ports) % (LAST - FIRST)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
