"""Figures that a web process sends with each ping, and caches that the GPU worker tells it to empty."""

from collections import Counter
from collections.abc import Callable

from shared.protocol import CacheCounts, CacheName, LimitName, Ping


class WebProcess:
    """The web process of an engine client.

    `cache_counts` returns the counts of its caches; those of the catalogue may be missing: `count_catalog` has them.
    `open_sockets` returns the number of its WebSockets.
    `limit_hits` counts the requests that it refuses; each ping takes what is in it.
    `on_emptied` gets the name of each cache that an admin has emptied, through this web process or another one.
    """

    def __init__(
        self,
        *,
        cache_counts: Callable[[], dict[CacheName, CacheCounts]] = dict,
        open_sockets: Callable[[], int] = int,
        limit_hits: Counter[LimitName] | None = None,
        on_emptied: Callable[[CacheName], None] = lambda _name: None,
    ) -> None:
        self.on_emptied = on_emptied
        self._cache_counts = cache_counts
        self._open_sockets = open_sockets
        self._limit_hits = Counter() if limit_hits is None else limit_hits
        self._catalog = CacheCounts()

    def count_catalog(self, *, hit: bool) -> None:
        """A route has read the catalogue; it was there, or it was not."""
        self._catalog = CacheCounts(self._catalog.hits + hit, self._catalog.misses + (not hit))

    def count_refusal(self, limit: LimitName) -> None:
        """A request was refused by that limit."""
        self._limit_hits[limit] += 1

    def ping(self) -> Ping:
        """The next ping."""
        caches = {"catalog": self._catalog, **self._cache_counts()}
        ping = Ping(caches=caches, open_sockets=self._open_sockets(), limit_hits=dict(self._limit_hits))
        self._limit_hits.clear()
        return ping

    def take_back(self, ping: Ping) -> None:
        """The ping was not sent, or not answered; the next one has its refusals."""
        self._limit_hits.update(ping.limit_hits)
