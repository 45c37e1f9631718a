"""The use of each API key in the whole cluster: GPU workers report, and learn of each other. Plain data, no ray.

Each GPU worker counts the requests that reach it, and decides by that and by `elsewhere`, which a web process sums up
of the reports of all workers. So a worker is behind by the time of one report and one answer.
"""

from collections.abc import Iterable, Mapping
from datetime import date
from typing import Final

import msgspec

from shared.protocol import KeyUse, Reply, UsageRow, WorkerUse

MAX_ROWS: Final = 10_000
"""Rows of usage in one answer."""

_MINUTE_S: Final = 60.0

MAX_ENDED: Final = 1_000
"""GPU workers of today that have ended, and whose characters still count."""


class ClusterUse:
    """The latest report of every GPU worker that has run today, by its boot id."""

    def __init__(self) -> None:
        self._uses: dict[str, WorkerUse] = {}
        self._in_file: dict[str, dict[str, KeyUse]] = {}
        """The use at others that a worker's file had at its start: the worker counts that as its own."""

        self._old: dict[str, dict[str, float]] = {}
        """The `minute_s` of a worker at its first report that counts for no minute any more, by client."""

        self._old_elsewhere: dict[str, dict[str, float]] = {}
        """As `_old`, of the others at that report: a worker that comes later has counted nothing of it."""

        self._totals: dict[str, KeyUse] = {}
        self._ended: list[str] = []

    def record(self, boot_id: str, use: WorkerUse) -> None:
        """A worker has reported."""
        if boot_id not in self._uses:
            siblings = [other for other in self._uses.values() if other.usage_source == use.usage_source]
            self._in_file[boot_id] = _sum(siblings)
            self._old[boot_id] = _old_minutes(use.clients)
            self._old_elsewhere[boot_id] = _old_minutes(_sum(self._uses.values()))
        if boot_id in self._ended:  # Serve had taken its replica away for a moment
            self._ended.remove(boot_id)
        self._uses[boot_id] = msgspec.structs.replace(use, clients=_without_old(use.clients, self._old[boot_id]))
        self._totals = {}

    def end(self, boot_id: str) -> None:
        """A worker has ended: none of its requests runs any more. Its counts stay."""
        use = self._uses.get(boot_id)
        if use is None or boot_id in self._ended:
            return
        stopped = {client: msgspec.structs.replace(used, running=0) for client, used in use.clients.items()}
        self._uses[boot_id] = msgspec.structs.replace(use, clients=stopped)
        self._ended.append(boot_id)
        if len(self._ended) > MAX_ENDED:
            oldest = self._ended.pop(0)
            del self._uses[oldest], self._in_file[oldest], self._old[oldest], self._old_elsewhere[oldest]
        self._totals = {}

    def elsewhere(self, boot_id: str) -> dict[str, KeyUse]:
        """The use of clients at all other workers; empty for a worker that has not reported."""
        if boot_id not in self._uses:
            return {}
        self._totals = self._totals or _sum(self._uses.values())
        own, in_file = self._uses[boot_id].clients, self._in_file[boot_id]
        none = KeyUse()
        elsewhere = {
            client: _without(total, own.get(client, none), in_file.get(client, none))
            for client, total in self._totals.items()
        }
        return _without_old(elsewhere, self._old_elsewhere[boot_id])


def merge_usage(replies: list[Reply]) -> Reply:
    """One answer to FindUsage: the sums of all files. GPU workers with one file have the same rows."""
    sums: dict[tuple[date, str, str], UsageRow] = {}
    for reply in {reply.usage_source: reply for reply in replies}.values():
        for row in reply.usage:
            place = row.date, row.key, row.model
            sums[place] = _added(sums[place], row) if place in sums else row
    rows = sorted(sums.values(), key=lambda row: (-row.date.toordinal(), row.key, row.model))
    has_more = len(rows) > MAX_ROWS or any(reply.has_more for reply in replies)
    return msgspec.structs.replace(replies[0], usage=rows[:MAX_ROWS], has_more=has_more)


def _added(one: UsageRow, other: UsageRow) -> UsageRow:
    sums = [
        mine + others
        for mine, others in zip(msgspec.structs.astuple(one)[3:], msgspec.structs.astuple(other)[3:], strict=True)
    ]
    return UsageRow(one.date, one.key, one.model, *sums)


def _old_minutes(clients: Mapping[str, KeyUse]) -> dict[str, float]:
    """All but the last minute of what clients have used until now, at an unknown time."""
    return {client: used.minute_s - _MINUTE_S for client, used in clients.items() if used.minute_s > _MINUTE_S}


def _without_old(clients: Mapping[str, KeyUse], old: Mapping[str, float]) -> dict[str, KeyUse]:
    return {
        client: msgspec.structs.replace(used, minute_s=max(0.0, used.minute_s - old.get(client, 0.0)))
        for client, used in clients.items()
    }


def _sum(uses: Iterable[WorkerUse]) -> dict[str, KeyUse]:
    """The sums over all workers. Characters are those of the latest day."""
    totals: dict[str, KeyUse] = {}
    for use in uses:
        for client, used in use.clients.items():
            total = totals.get(client, KeyUse())
            day = max(total.day, used.day)
            totals[client] = KeyUse(
                minute_s=total.minute_s + used.minute_s,
                day=day,
                characters=_on(day, total) + _on(day, used),
                running=total.running + used.running,
            )
    return totals


def _without(total: KeyUse, own: KeyUse, in_file: KeyUse) -> KeyUse:
    counted = _on(total.day, own) + _on(total.day, in_file)
    return KeyUse(
        minute_s=total.minute_s - own.minute_s,
        day=total.day,
        characters=max(0, total.characters - counted),
        running=total.running - own.running,
    )


def _on(day: int, use: KeyUse) -> int:
    return use.characters if use.day == day else 0
