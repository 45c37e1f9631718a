"""The reports of all replicas: ReplicaPolling asks for them, and merges them into one snapshot of the cluster.

It says which replicas have a GPU worker. It sends them nothing but requests for reports.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec
import structlog

from server.engine.outage import unavailable_error
from server.engine.ray.cluster_snapshot import merge, sum_of_counts, without_workers
from server.engine.ray.interface import EngineReplicas, ReplicaLostError, ReportRequest
from server.engine.ray.key_use import ClusterUse
from server.engine.ray.known_replica import KnownReplica
from server.engine.reports import ReplicaReport
from server.engine.web_process import WebProcess
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import CacheName, Snapshot

log = structlog.get_logger(__name__)

REPORT_INTERVAL_S: Final = 0.25
STALE_AFTER_S: Final = 5.0
"""A replica whose last report is older takes no part in the snapshot."""

FRESH_WITHIN_S: Final = 1.0
_GATHER_S: Final = 0.05
"""Reports that come within it are taken together: each taking looks at all replicas."""


class ReplicaPolling:
    """The replicas by their reports, used on one event loop.

    `ingress` names this process. With `scales_to_zero` a cluster without replicas is in order: the next request starts
    one, and until it comes the figures are those of a cluster without a GPU worker.
    `start` runs a coroutine in the background. `streaming` returns the replicas that speak for this process.
    `on_new_worker` gets the name of a replica whose GPU worker this process has not known.
    """

    def __init__(
        self,
        replicas: EngineReplicas,
        *,
        ingress: str,
        timeout_s: float,
        scales_to_zero: bool,
        clock: Callable[[], float],
        web: WebProcess,
        start: Callable[[Coroutine[Any, Any, None]], None],
        streaming: Callable[[], set[str]],
        on_new_worker: Callable[[str], None],
    ) -> None:
        self._replicas = replicas
        self._ingress = ingress
        self._timeout_s = timeout_s
        self._scales_to_zero = scales_to_zero
        self._clock = clock
        self._web = web
        self._start = start
        self._streaming = streaming
        self._on_new_worker = on_new_worker
        self.catalog: list[ModelSpec] = []
        self.settings: dict[str, Any] = {}
        self.available = False
        """True if a replica has a GPU worker."""

        self._known: dict[str, KnownReplica] = {}
        self._use = ClusterUse()
        self._alive: list[ReplicaReport] = []
        """The reports of the replicas that were last alive; they stay when all are gone, as a snapshot does."""

        self._snapshot: Snapshot | None = None
        """Made of `_alive` at the first read; None until then."""

        self._snapshot_made_at = -math.inf
        self._emptied: dict[CacheName, int] | None = None
        self._reported = asyncio.Event()
        """Set, and replaced, by each report."""

        self._awaited = 0
        """Replicas whose reports are under way."""

        self._renewing: set[str] = set()
        """Draining replicas that are asked for a report now."""

        self._gathering: asyncio.TimerHandle | None = None
        self._loss: asyncio.Future[ApiError] | None = None

    # --- figures -----------------------------------------------------------------------------------------------------

    @property
    def snapshot(self) -> Snapshot | None:
        """The sum over the replicas that are alive, or that were; None before the first report."""
        if self._snapshot is None and self._alive:
            merged = merge(self._alive)
            self._snapshot = without_workers(merged) if self.is_at_zero() else merged
        return self._snapshot

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        """A replica that does not answer in time is shown as it was: the others must not wait for it."""
        self.require_worker()
        if self.is_at_zero() and self.snapshot is not None:
            return self.snapshot
        oldest = self._clock() - max_age_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FRESH_WITHIN_S):
                while self._snapshot_made_at < oldest:
                    self.poll_all(fresh=True)
                    await self.next_report()
                    self.require_worker()
        snapshot = self.snapshot
        if snapshot is None or self.outage(STALE_AFTER_S) is not None:
            raise unavailable_error("The GPU workers do not answer.")
        return snapshot

    def reports(self) -> dict[str, ReplicaReport]:
        """The latest report of each replica that has sent one."""
        return {name: report for name, known in self._known.items() if (report := known.current()) is not None}

    async def next_report(self) -> None:
        """Wait for the next report."""
        await self._reported.wait()

    # --- availability ------------------------------------------------------------------------------------------------

    def alive(self) -> list[str]:
        """The replicas that take requests."""
        return [name for name, known in self._known.items() if known.outage(self._clock(), STALE_AFTER_S) is None]

    def outage(self, patience_s: float) -> ApiError | None:
        """The error if no replica has a GPU worker that has answered within `patience_s`."""
        if self.is_at_zero():
            return None
        errors = []
        for known in self._known.values():
            error = known.outage(self._clock(), patience_s)
            if error is None:
                return None
            errors.append(error)
        if not errors:
            return unavailable_error("No GPU worker is there; the cluster is starting, or it has no replica.")
        return min(errors, key=lambda error: error.retry_after_s or 0.0)

    def require_worker(self) -> None:
        """Raise the outage if the last answer of all replicas is too long ago."""
        error = self.outage(self._timeout_s)
        if error is not None:
            raise error

    def is_at_zero(self) -> bool:
        """True if the cluster has scaled to zero, or its first replica has not reported yet. Requests wait for it."""
        new = all(replica.is_new for replica in self._known.values())
        return self._scales_to_zero and bool(self._alive) and bool(self.catalog) and new

    async def loss(self) -> ApiError:
        """Wait until the last GPU worker is lost."""
        if self._loss is None:
            self._loss = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._loss)

    def lose(self, replica: str, error: ApiError) -> None:
        """The replica takes no more requests, because of `error`, until it has answered a new poll."""
        known = self._known.get(replica)
        if known is not None:
            known.lose(error, self._clock())
            self._refresh()
            self.poll_all()

    # --- polling -----------------------------------------------------------------------------------------------------

    async def poll_forever(self) -> None:
        """Poll all replicas every REPORT_INTERVAL_S."""
        while True:
            self.poll_all()
            await asyncio.sleep(REPORT_INTERVAL_S)

    def close(self, message: str) -> None:
        """Call it behind the last poll. `message` is the loss for those that still wait for one."""
        self._stop_gathering()
        self._note_loss(message)

    def poll_all(self, *, fresh: bool = False) -> None:
        """Ask each replica for its report, but those whose answer is still awaited.

        One that drains is asked while it has streams of this process: each report renews their lease.
        """
        ids = set(self._replicas.ids())
        gone = self._known.keys() - ids
        for name in gone:
            self._forget(name)
        if gone:
            self._refresh()
        if not ids and not self.catalog and self._scales_to_zero:
            self._replicas.wake()  # no request can be understood without a catalogue
        for name in self._streaming() - ids - self._renewing - {""}:
            self._start(self._renew_lease(name))
        for name in ids:
            known = self._known.setdefault(name, KnownReplica(self._clock()))
            if not known.is_polled:
                known.is_polled = True
                self._awaited += 1
                self._start(self._poll(name, known, fresh=fresh))

    async def _poll(self, name: str, known: KnownReplica, *, fresh: bool) -> None:
        asked_at = self._clock()
        boot_id = known.boot_id if self.catalog else ""
        used = self._use.elsewhere(known.report.boot_id) if known.report else {}
        request = ReportRequest(
            ingress=self._ingress, fresh=fresh, boot_id=boot_id, ping=self._web.ping(), used_elsewhere=used
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._replicas.report(name, msgspec.msgpack.encode(request))
            report = msgspec.msgpack.decode(answer, type=ReplicaReport)
        except (ReplicaLostError, TimeoutError, msgspec.DecodeError) as error:
            log.warning("replica_silent", replica=name, reason=str(error) or type(error).__name__)
            self._web.take_back(request.ping)
            known.lose(unavailable_error("The GPU worker went away."), self._clock())
        else:
            if self._known.get(name) is known:  # Serve may have taken the replica away meanwhile
                self._on_report(name, report, known, asked_at)
        finally:
            known.is_polled = False
            self._awaited -= 1
        if not self._awaited:
            self._refresh()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(_GATHER_S, self._refresh)

    async def _renew_lease(self, replica: str) -> None:
        self._renewing.add(replica)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._replicas.report(replica, msgspec.msgpack.encode(ReportRequest(ingress=self._ingress)))
        except (ReplicaLostError, TimeoutError) as error:
            log.info("lease_not_renewed", replica=replica, reason=str(error) or type(error).__name__)
        finally:
            self._renewing.discard(replica)

    def _on_report(self, name: str, report: ReplicaReport, known: KnownReplica, asked_at: float) -> None:
        if report.catalog is not None:
            self._on_new_worker(name)
            known.boot_id = report.boot_id
            self.catalog, self.settings = report.catalog, report.settings
        if known.report is not None and known.report.boot_id != report.boot_id:
            self._use.end(known.report.boot_id)
        if report.snapshot is not None and report.snapshot.key_use is not None:
            self._use.record(report.boot_id, report.snapshot.key_use)
        known.report, known.made_at, known.heard_at = report, asked_at - report.age_s, self._clock()
        if asked_at > known.lost_at:
            known.lost = None

    def _forget(self, name: str) -> None:
        """The replica takes no new requests. Its streams go on, and fail by themselves if it is gone."""
        known = self._known.pop(name)
        if known.report is not None:
            self._use.end(known.report.boot_id)

    def _refresh(self) -> None:
        """Make the snapshot of the cluster anew, and wake those that wait for it."""
        self._stop_gathering()
        now = self._clock()
        alive = [known for known in self._known.values() if known.outage(now, STALE_AFTER_S) is None]
        self._replicas.update(self.reports())
        reports = [known.report for known in alive if known.report and known.report.snapshot]
        if reports:
            self._alive, self._snapshot = reports, None
            self._snapshot_made_at = min(known.made_at for known in alive)
            self._empty_caches(sum_of_counts(report.snapshot.emptied for report in reports if report.snapshot))
        if self.is_at_zero():
            self._snapshot = None
        # Replicas that Serve has taken away, to replace them or to save them, let their streams end: they are no loss.
        if self.available and not alive and self._known:
            self._note_loss("The GPU worker went away.")
        self.available = bool(alive)
        self._reported.set()
        self._reported = asyncio.Event()

    def _stop_gathering(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None

    def _note_loss(self, message: str) -> None:
        if self._loss is not None:
            self._loss.set_result(unavailable_error(message))
            self._loss = None

    def _empty_caches(self, emptied: dict[CacheName, int]) -> None:
        before, self._emptied = self._emptied, emptied
        if before is None:
            return
        for name in [name for name, times in emptied.items() if times > before.get(name, 0)]:
            if name == "catalog":
                self.catalog = []  # the next report has it
            else:
                self._web.on_emptied(name)
