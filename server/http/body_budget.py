"""The budget of a web worker for the bodies of its requests, which stay in memory until the requests end.

`BodyBudget` belongs to the event loop; the middleware tells what has arrived, and answers those that are crowded out.
"""

from collections import Counter
from typing import Final

from server.http.open_requests import OpenRequest
from shared.protocol import LimitName

SMALL_BODY_BYTES: Final = 65_536
"""Bodies up to this size always fit: 4,096 of them are as large as the default budget."""


class BodyBudget:
    """The large bodies in memory; above `budget_bytes` the slowest of those that still arrive go.

    `limit_hits` counts those that go.
    """

    def __init__(self, budget_bytes: int, limit_hits: Counter[LimitName] | None = None) -> None:
        self.budget_bytes = budget_bytes
        self._limit_hits = Counter() if limit_hits is None else limit_hits
        self._large: set[OpenRequest] = set()

    def check(self, request: OpenRequest, now: float) -> None:
        """More of the body of `request` has arrived."""
        if request.body_bytes > SMALL_BODY_BYTES and not request.crowded_out:
            self._large.add(request)
        while len(self._large) > 1 and sum(one.body_bytes for one in self._large) > self.budget_bytes:
            arriving = [one for one in self._large if not one.body_complete]
            if not arriving:
                return
            slowest = min(arriving, key=lambda one: one.body_bytes / max(now - one.began, 0.001))
            self._large.remove(slowest)
            slowest.crowd_out()
            self._limit_hits["body_memory"] += 1

    def release(self, request: OpenRequest) -> None:
        """The body of `request` is not in memory any more."""
        self._large.discard(request)
