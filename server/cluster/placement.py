"""The choice of a replica for a request, by the reports of the replicas and the requests that this process sent.

Plain data in, names of replicas out; ranking.py has the rules. One thread calls `choose`, `taken` and `ended`;
`reports` may be replaced by another one.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from server.cluster.ranking import rank, replica_of
from server.cluster.replica_estimates import ReplicaEstimates
from server.engine import ReplicaReport
from shared.settings import ReplicaBounds

_DEFAULT: Final = ReplicaBounds()


class Placement:
    """The choices of one process. `bounds` and `estimated_bytes` are by model; `clock` gives Unix seconds."""

    def __init__(
        self,
        bounds: Mapping[str, ReplicaBounds],
        estimated_bytes: Mapping[str, int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.reports: Mapping[str, ReplicaReport] = {}
        """The latest report of each replica."""

        self._bounds = bounds
        self._clock = clock
        self._estimates = ReplicaEstimates(estimated_bytes)
        self._taken: Mapping[str, ReplicaReport] = {}

    def choose(self, replicas: Sequence[str], model: str, avoid: Collection[str] = ()) -> list[str]:
        """The replicas that may take a request for `model`, the best one first; at least one of `replicas`.

        `avoid` names replicas that have refused the request.
        """
        self._take_reports()
        known = [replica for replica in self._estimates.replicas if replica.id in replicas]
        ranked = rank(
            model,
            known,
            needed_bytes=self._estimates.needed_bytes(model),
            now=self._clock(),
            bounds=self._bounds.get(model, _DEFAULT),
            avoid=avoid,
        )
        if ranked:
            return [replica.id for replica in ranked]
        # None of them has a GPU worker that is known to answer: one that is new may have.
        return sorted(replicas, key=lambda name: (name in avoid, name in self.reports))

    def sent(self, request_id: str, replica: str, model: str, *, taken: bool) -> None:
        """A request for the model goes to a replica. `taken`: the replica has it."""
        self._estimates.sent(request_id, replica, model, self._clock(), confirmed=taken)

    def ended(self, request_id: str) -> None:
        """The request has ended, or its replica has not taken it."""
        self._estimates.done(request_id)

    def _take_reports(self) -> None:
        reports = self.reports
        if reports is self._taken:
            return
        now = self._clock()
        snapshots = {
            name: report.snapshot for name, report in reports.items() if report.snapshot and report.error is None
        }
        self._estimates.keep(snapshots.keys())
        for name, snapshot in snapshots.items():
            if reports[name] is not self._taken.get(name):
                self._estimates.update(replica_of(name, snapshot), now)
        self._taken = reports
