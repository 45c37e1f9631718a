"""The limits of each API key: requests a minute, characters a day, requests at once.

The GPU worker counts, so that a limit holds over all web workers. Counts live in memory: a new process learns the
characters of the day from `usage`, and begins the others anew.
Requests a minute follow the generic cell rate algorithm (GCRA): a key that has been quiet may use its minute at once,
and then gets a request every 60 / limit seconds.

In a cluster, each GPU worker counts its own requests, and `take` brings what the others have counted. So a limit is
exceeded by what a key sends to other workers until the news of that arrives; the requests of a minute are paid back,
because they count all the same.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final

import msgspec

from gpu_worker.engines.base import JobError
from shared.protocol import KeyLimits, KeyUse, LimitName, RateLimit, WorkerUse

MINUTE_S: Final = 60.0
DAY_S: Final = 86_400.0


class _Use(msgspec.Struct):
    """The use of one client. `full_at`: when the whole minute is free again; GCRA's theoretical arrival time.

    `characters` are those of `day`, with what the file of usage had at the start. `own` was used at this worker since
    then, `elsewhere` at the others.
    """

    full_at: float = 0.0
    day: int = 0
    characters: int = 0
    own: KeyUse = KeyUse()
    elsewhere: KeyUse = KeyUse()


class LimitCounter:
    """Counts the use of each client with limits. Clients without limits are not counted."""

    def __init__(
        self,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        characters_today: Mapping[str, int] = MappingProxyType({}),
        usage_source: str = "",
    ) -> None:
        """`clock` is monotonic, `wall_clock` gives Unix seconds; `characters_today` are those of each client so far.

        `usage_source` is that of the file which has those.
        """
        self._clock = clock
        self._wall_clock = wall_clock
        day = self._day()
        self._usage_source = usage_source
        self._source: str | None = None
        # The file of keys bounds it: only its keys have limits.
        self._uses = {client: _Use(day=day, characters=count) for client, count in characters_today.items()}

    def take(self, source: str, elsewhere: Mapping[str, KeyUse]) -> None:
        """Count the use of clients at the other GPU workers of a cluster; see shared.protocol.UsedElsewhere.

        Only what `source` adds to its earlier news counts for the minute.
        """
        known, self._source = source == self._source, source
        now = self._clock()
        for client in self._uses.keys() - elsewhere.keys():
            self._uses[client].elsewhere = KeyUse()
        for client, used in elsewhere.items():
            use = self._uses.setdefault(client, _Use())
            if known:
                use.full_at = max(use.full_at, now) + max(0.0, used.minute_s - use.elsewhere.minute_s)
            use.elsewhere = used

    @property
    def worker_use(self) -> WorkerUse | None:
        """The use at this worker since it started; None if no other worker has to know it."""
        if self._source is None:
            return None
        clients = {client: use.own for client, use in self._uses.items() if use.own != KeyUse()}
        return WorkerUse(usage_source=self._usage_source, clients=clients)

    def check(self, client: str, limits: KeyLimits, characters: int) -> None:
        """Raise JobError (`rate_limit_exceeded`) if a request of so many characters is over a limit."""
        if limits == _NO_LIMITS:
            return
        use = self._uses.setdefault(client, _Use())
        running = use.own.running + use.elsewhere.running
        if limits.concurrent_requests is not None and running >= limits.concurrent_requests:
            raise _exceeded("concurrent_requests", f"{limits.concurrent_requests} requests at once", 1.0)
        if limits.requests_per_minute is not None:
            interval_s = MINUTE_S / limits.requests_per_minute
            wait_s = max(use.full_at, self._clock()) + interval_s - MINUTE_S - self._clock()
            if wait_s > _ROUNDING_S:
                raise _exceeded("requests_per_minute", f"{limits.requests_per_minute} requests a minute", wait_s)
        self._check_characters(use, limits, characters)

    def add_characters(self, client: str, limits: KeyLimits, characters: int) -> None:
        """Count more text of a counted request; JobError (`rate_limit_exceeded`) if there are too many."""
        if limits != _NO_LIMITS:
            use = self._uses[client]
            self._check_characters(use, limits, characters)
            self._add(use, characters=characters)

    def _check_characters(self, use: _Use, limits: KeyLimits, characters: int) -> None:
        if limits.characters_per_day is not None:
            self._begin_day(use)
            used = use.characters + (use.elsewhere.characters if use.elsewhere.day == use.day else 0)
            if used + characters > limits.characters_per_day:
                left = max(0, limits.characters_per_day - used)
                until_midnight_s = DAY_S - self._wall_clock() % DAY_S
                text = f"{limits.characters_per_day} characters a day ({left} are left)"
                raise _exceeded("characters_per_day", text, until_midnight_s)

    def count(self, client: str, limits: KeyLimits, characters: int) -> RateLimit | None:
        """Count a request that `check` let pass; what is left of the minute, or None without such a limit."""
        if limits == _NO_LIMITS:
            return None
        use = self._uses.setdefault(client, _Use())
        interval_s = MINUTE_S / limits.requests_per_minute if limits.requests_per_minute else 0.0
        use.full_at = max(use.full_at, self._clock()) + interval_s
        self._add(use, characters=characters, requests=1, minute_s=interval_s)
        return self.left(client, limits)

    def left(self, client: str, limits: KeyLimits) -> RateLimit | None:
        """The requests that a client has left in its minute; None without such a limit."""
        if limits.requests_per_minute is None:
            return None
        used_s = max(0.0, self._uses.get(client, _Use()).full_at - self._clock())
        interval_s = MINUTE_S / limits.requests_per_minute
        remaining = max(0, int((MINUTE_S - used_s + _ROUNDING_S) / interval_s))
        return RateLimit(limit=limits.requests_per_minute, remaining=remaining, reset_s=used_s)

    def end(self, client: str, limits: KeyLimits) -> None:
        """A request that was counted with `limits` is over."""
        if limits != _NO_LIMITS:
            self._add(self._uses[client], requests=-1)

    def _add(self, use: _Use, *, characters: int = 0, requests: int = 0, minute_s: float = 0.0) -> None:
        self._begin_day(use)
        use.characters += characters
        own = use.own
        use.own = KeyUse(own.minute_s + minute_s, use.day, own.characters + characters, own.running + requests)

    def _day(self) -> int:
        return datetime.fromtimestamp(self._wall_clock(), UTC).toordinal()

    def _begin_day(self, use: _Use) -> None:
        day = self._day()
        if use.day != day:
            use.day, use.characters = day, 0
            use.own = msgspec.structs.replace(use.own, day=day, characters=0)


_NO_LIMITS: Final = KeyLimits()

_ROUNDING_S: Final = 1e-6
"""A sum of sixty intervals differs from a minute by less."""


def _exceeded(limit: LimitName, text: str, retry_after_s: float) -> JobError:
    error = JobError("rate_limit_exceeded", f"this API key is limited to {text}", retry_after_s=retry_after_s)
    error.limit = limit
    return error
