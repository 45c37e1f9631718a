"""The leases of the web processes on one replica: each request for a report renews one."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from server.engine import WebProcess
from shared.protocol import CacheCounts, CacheName, LimitName, Ping

LEASE_S: Final = 30.0
"""A web process that asks for no report for so long is gone, and its requests end."""

_USAGE_SOURCE_S: Final = 2.0
"""A web process that asks for no report for so long is a usage source no more."""


class IngressLeases:
    """The web processes that hold a lease, with the last Ping of each one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._renewed: dict[str, tuple[float, Ping]] = {}
        self._limit_hits: Counter[LimitName] = Counter()

    def renew(self, ingress: str, ping: Ping) -> None:
        """Begin the lease of `ingress` anew."""
        self._renewed[ingress] = self._clock(), ping
        self._limit_hits.update(ping.limit_hits)

    def end(self) -> set[str]:
        """End the leases that were not renewed in time. Returns their web processes."""
        now = self._clock()
        ended = {name for name, (renewed_at, _) in self._renewed.items() if now - renewed_at > LEASE_S}
        for name in ended:
            del self._renewed[name]
        return ended

    def usage_source(self) -> str:
        """The one web process whose figures of use elsewhere count; the same one for as long as it asks for reports."""
        now = self._clock()
        return min(name for name, (renewed_at, _) in self._renewed.items() if now - renewed_at <= _USAGE_SOURCE_S)

    def as_web_process(self) -> WebProcess:
        """The web processes as one, for the GPU worker of the replica."""
        return WebProcess(cache_counts=self.cache_counts, open_sockets=self.open_sockets, limit_hits=self._limit_hits)

    def cache_counts(self) -> dict[CacheName, CacheCounts]:
        """The sums of what the web processes have counted."""
        sums: dict[CacheName, CacheCounts] = {}
        for _, ping in self._renewed.values():
            for name, counts in ping.caches.items():
                before = sums.get(name, CacheCounts())
                sums[name] = CacheCounts(before.hits + counts.hits, before.misses + counts.misses)
        return sums

    def open_sockets(self) -> int:
        """The number of WebSockets of all web processes."""
        return sum(ping.open_sockets for _, ping in self._renewed.values())
