"""The load of each replica as one router estimates it: the figures in its report, and the requests sent since.

Figures are up to a second old. In a second a router may send a hundred requests.
Nothing here knows Ray or a clock: the times are passed in.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from server.cluster.ranking import Replica, ReplicaModel

UNCONFIRMED_S: Final = 10.0
"""How long a request counts that was to be sent to a replica, and of which nothing was heard since."""

ON_THE_WAY_S: Final = 0.25
"""Figures do not have a request yet that was sent this shortly before they came."""


class _Sent(msgspec.Struct):
    replica_id: str
    model: str
    at: float
    confirmed: bool
    counted: bool
    """True if the figures of the replica have the request."""


class ReplicaEstimates:
    """The replicas as they should be by now. `estimated_bytes`: what a load takes of a model that is nowhere."""

    def __init__(self, estimated_bytes: Mapping[str, int]) -> None:
        self._estimated_bytes = estimated_bytes
        self._measured_bytes: dict[str, int] = {}  # by model, where it is resident
        self._figures: dict[str, Replica] = {}
        self._estimates: dict[str, Replica] = {}
        self._sent: dict[str, dict[str, _Sent]] = {}  # by replica and request
        self._replica_of: dict[str, str] = {}  # by request
        self._since: dict[str, Counter[str]] = {}
        """By replica and model: the requests that its figures do not have, less those that they still have."""

    @property
    def replicas(self) -> list[Replica]:
        """All replicas whose figures have come."""
        return list(self._estimates.values())

    def needed_bytes(self, model: str) -> int:
        """The bytes that a load of the model takes: the most that it took anywhere, or the estimate."""
        return self._measured_bytes.get(model) or self._estimated_bytes.get(model, 0)

    def update(self, figures: Replica, now: float) -> None:
        """Take new figures of a replica."""
        self._figures[figures.id] = figures
        for model, held in figures.models.items():
            if held.residence == "resident":
                self._measured_bytes[model] = max(self._measured_bytes.get(model, 0), held.device_bytes)
        since = self._since[figures.id] = Counter()
        for request_id, sent in list(self._sent.get(figures.id, {}).items()):
            if not sent.confirmed and now - sent.at > UNCONFIRMED_S:
                self.done(request_id)
                continue
            sent.counted = now - sent.at > ON_THE_WAY_S
            since[sent.model] += not sent.counted
        self._refresh(figures.id)

    def keep(self, replica_ids: Collection[str]) -> None:
        """Forget all other replicas and what was sent to them."""
        for replica_id in self._figures.keys() - set(replica_ids):
            del self._figures[replica_id], self._estimates[replica_id]
            self._since.pop(replica_id, None)
            for request_id in self._sent.pop(replica_id, {}):
                del self._replica_of[request_id]

    def sent(self, request_id: str, replica_id: str, model: str, now: float, *, confirmed: bool) -> None:
        """A request goes to a replica. `confirmed`: the replica has taken it."""
        known = self._sent.get(self._replica_of.get(request_id, ""), {}).get(request_id)
        if known is not None and known.replica_id == replica_id:
            known.confirmed = known.confirmed or confirmed
            return
        self.done(request_id)
        if replica_id in self._figures:
            sent = _Sent(replica_id, model, now, confirmed, counted=False)
            self._sent.setdefault(replica_id, {})[request_id] = sent
            self._replica_of[request_id] = replica_id
            self._count(sent, 1)

    def done(self, request_id: str) -> None:
        """The request has ended, or its replica did not take it."""
        replica_id = self._replica_of.pop(request_id, None)
        if replica_id is not None:
            self._count(self._sent[replica_id].pop(request_id), -1)

    def _count(self, sent: _Sent, change: int) -> None:
        self._since[sent.replica_id][sent.model] += change
        self._refresh(sent.replica_id)

    def _refresh(self, replica_id: str) -> None:
        figures = self._figures[replica_id]
        since = {model: count for model, count in self._since[replica_id].items() if count}
        if not since:
            self._estimates[replica_id] = figures
            return
        requests = max(0, figures.running + figures.queued + sum(since.values()))
        models = dict(figures.models)
        free_bytes = figures.free_bytes
        for model, count in since.items():
            held = figures.models.get(model)
            if held is not None and held.residence in {"resident", "loading"}:
                models[model] = msgspec.structs.replace(held, requests=max(0, held.requests + count))
            elif count > 0:
                models[model] = ReplicaModel(residence="loading", requests=count)
                free_bytes -= self.needed_bytes(model)
        running = min(requests, figures.slots)
        self._estimates[replica_id] = msgspec.structs.replace(
            figures, running=running, queued=requests - running, models=models, free_bytes=max(0, free_bytes)
        )
