"""The requests in progress of this web worker, by connection: the connection reaper leaves these alone.

`OpenRequests` belongs to the event loop. The middleware writes it; the reaper and the limits on requests read it.
Whether a connection is closed is the reaper's decision (server/processes/connection_reaper.py).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from server.http.forwarded import client_network

Peer = tuple[str, int]
"""The other end of a connection: IP address and port."""

BODY_TIMEOUT_S: Final = 30.0
"""The longest pause within a body, and the time that a body has besides that of its bytes."""

MIN_BODY_BYTES_PER_S: Final = 8_192
"""A body that arrives slower on average is given up: 64 kbit/s, and 16 MB in 35 minutes."""


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request whose handler has not returned."""

    peer: Peer | None
    began: float
    body_complete: bool
    """True if the client has nothing more to send, so the client waits for this server."""
    body_bytes: int = 0
    crowded_out: bool = False
    """True if its body is refused for others that arrive faster."""
    waiting: asyncio.Timeout | None = None
    """The time limit of the wait for the next part of the body."""

    def body_patience_s(self, now: float) -> float:
        """How long the next part of the body may take: a fixed time for each byte, so dripping prolongs nothing."""
        deadline = self.began + BODY_TIMEOUT_S + self.body_bytes / MIN_BODY_BYTES_PER_S
        return 0.0 if self.crowded_out else max(0.0, min(BODY_TIMEOUT_S, deadline - now))

    def crowd_out(self) -> None:
        """Refuse the rest of the body, also if its handler is waiting for the next part."""
        self.crowded_out = True
        if self.waiting:
            self.waiting.reschedule(0.0)


class OpenRequests:
    """All open requests, and when the last one of each connection ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.count = 0
        self.peak = 0
        """The largest `count` since the heap trimmer last set it back."""
        self._of_peer: dict[Peer, set[OpenRequest]] = {}
        self._of_network: Counter[str] = Counter()
        self._ended: dict[Peer, float] = {}

    def begin(self, scope: Any, *, has_body: bool) -> OpenRequest:
        """A request has arrived with this ASGI scope."""
        client = scope.get("client")
        request = OpenRequest(peer_of(client) if client else None, self.clock(), body_complete=not has_body)
        self.count += 1
        self.peak = max(self.peak, self.count)
        if request.peer:
            self._of_peer.setdefault(request.peer, set()).add(request)
            self._of_network[client_network(request.peer[0])] += 1
        return request

    def end(self, request: OpenRequest) -> None:
        """The handler of `request` has returned; the last part of the response may still be on its way."""
        self.count -= 1
        if request.peer is None:
            return
        others = self._of_peer[request.peer]
        others.discard(request)
        if not others:
            del self._of_peer[request.peer]
            self._ended[request.peer] = self.clock()
        network = client_network(request.peer[0])
        self._of_network[network] -= 1
        if not self._of_network[network]:
            del self._of_network[network]

    def of(self, peer: Peer) -> Collection[OpenRequest]:
        """The open requests of one connection: several only in HTTP/2."""
        return self._of_peer.get(peer, ())

    def of_address(self, address: str) -> int:
        """The number of open requests of a client address; of its /64, if it is one of IPv6."""
        return self._of_network[client_network(address)]

    def last_end(self, peer: Peer) -> float:
        """The end of the connection's last request, if that was after the last call of `take_ended`; else 0."""
        return self._ended.get(peer, 0.0)

    def take_ended(self) -> dict[Peer, float]:
        """The end of the last request of each connection that has become idle since the last call."""
        ended, self._ended = self._ended, {}
        return ended


def peer_of(address: Any) -> Peer:
    """The peer of a socket's address; IPv6 addresses may have a scope, which ASGI leaves out."""
    return str(address[0]).partition("%")[0], int(address[1])
