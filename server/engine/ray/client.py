"""EngineClient over replicas: it polls their reports, and sends speech and calls to them."""

import asyncio
import contextlib
import contextvars
import math
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, Self

import msgspec
import structlog

from server.engine.client import Speech
from server.engine.ray.calls import FOR_ALL, ReplicaCalls
from server.engine.ray.cluster_snapshot import merge, sum_of_counts, without_workers
from server.engine.ray.interface import (
    RETRY_AFTER_S,
    EngineReplicas,
    ReplicaLostError,
    ReportRequest,
    unavailable_error,
)
from server.engine.ray.key_use import ClusterUse
from server.engine.ray.known_replica import KnownReplica
from server.engine.ray.outbox import Outboxes
from server.engine.ray.stream import RelayedStream
from server.engine.reports import ReplicaReport
from server.engine.web_process import WebProcess
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import (
    SHARED_VOICES,
    Action,
    CacheName,
    Call,
    Reload,
    Reply,
    Snapshot,
    Speak,
    SpeechOutcome,
    Spoken,
    VoiceAccess,
    encode,
)

log = structlog.get_logger(__name__)

REPORT_INTERVAL_S: Final = 0.25
STALE_AFTER_S: Final = 5.0
"""A replica whose last report is older takes no part in the snapshot."""

_GATHER_S: Final = 0.05
"""Reports that come within it are taken together: each taking looks at all replicas."""

_FRESH_WITHIN_S: Final = 1.0
_RELOAD_TIMEOUT_S: Final = 5.0
_AT_ZERO: Final = "No GPU worker runs, because this cluster scales to zero. A request for speech starts one."


class RayEngineClient:
    """EngineClient over `replicas`: an async context manager, used on one event loop.

    The start waits for a replica, so that Serve sends no request to a process that knows of none; after
    `start_timeout_s` it goes on without one.
    With `max_waiting` the cluster scales to zero: that many requests may wait for the first replica, `start_timeout_s`
    each, and until it comes the figures are those of a cluster without a GPU worker.
    `clock` gives seconds and never goes back. The other arguments are those of ZmqEngineClient.
    """

    _polling: asyncio.Task[None]
    _context: contextvars.Context

    def __init__(
        self,
        replicas: EngineReplicas,
        *,
        timeout_s: float,
        start_timeout_s: float = 0.0,
        max_waiting: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        web: WebProcess | None = None,
    ) -> None:
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._max_waiting = max_waiting
        self._clock = clock
        self._web = web or WebProcess()
        self._id = uuid.uuid4().hex
        self._catalog: list[ModelSpec] = []
        self._settings: dict[str, Any] = {}
        self._variables: dict[str, str] = {}
        """Settings that each new GPU worker gets."""
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
        self._available = False
        self._streams: dict[str, RelayedStream] = {}
        self._calls = ReplicaCalls(replicas)
        self._outboxes = Outboxes(replicas, timeout_s, start=self._start, on_lost=self._on_lost)
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what routes use ---------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> list[ModelSpec]:
        self._web.count_catalog(hit=bool(self._catalog))
        return self._catalog

    @property
    def snapshot(self) -> Snapshot | None:
        if self._snapshot is None and self._alive:
            merged = merge(self._alive)
            self._snapshot = without_workers(merged) if self._is_at_zero() else merged
        return self._snapshot

    @property
    def worker_settings(self) -> dict[str, Any]:
        return self._settings

    def reports(self) -> dict[str, ReplicaReport]:
        return {name: report for name, known in self._known.items() if (report := known.current()) is not None}

    def unavailable(self) -> ApiError | None:
        return self._outage(STALE_AFTER_S)

    def _outage(self, patience_s: float) -> ApiError | None:
        """The error if no replica has a GPU worker that has answered within `patience_s`."""
        if self._is_at_zero():
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

    def _is_at_zero(self) -> bool:
        """True if the cluster has scaled to zero, or its first replica has not reported yet. Requests wait for it."""
        known = all(replica.is_new for replica in self._known.values())
        return self._max_waiting is not None and bool(self._alive) and bool(self._catalog) and known

    async def worker_loss(self) -> ApiError:
        if self._loss is None:
            self._loss = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._loss)

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        """A replica that does not answer in time is shown as it was: the others must not wait for it."""
        self._require_worker()
        if self._is_at_zero() and self.snapshot is not None:
            return self.snapshot
        oldest = self._clock() - max_age_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FRESH_WITHIN_S):
                while self._snapshot_made_at < oldest:
                    self._poll_all(fresh=True)
                    await self._reported.wait()
                    self._require_worker()
        snapshot = self.snapshot
        if snapshot is None or self._outage(STALE_AFTER_S) is not None:
            raise unavailable_error("The GPU workers do not answer.")
        return snapshot

    def speak(self, request: Speak, reference: bytes | None = None) -> Speech:
        self._require_worker()
        self._require_place()
        stream = self._streams[request.id] = RelayedStream(
            request,
            self._replicas,
            ingress=self._id,
            post=self._outboxes.post,
            on_failed=self._on_failed,
            on_end=lambda: self._forget_stream(request.id),
            start_timeout_s=None if self._max_waiting is None else self._start_timeout_s,
        )
        self._start(stream.run(reference))
        return stream.speech

    def record(self, outcome: SpeechOutcome) -> None:
        alive = [name for name, known in self._known.items() if known.outage(self._clock(), STALE_AFTER_S) is None]
        if alive:
            self._outboxes.post(alive[0], Spoken(outcome=outcome))

    async def call(
        self,
        action: Action,
        *,
        client: str,
        access: VoiceAccess = SHARED_VOICES,
        payload: bytes | None = None,
        timeout_s: float,
    ) -> Reply:
        self._require_worker()
        if self._is_at_zero() and isinstance(action, FOR_ALL):
            raise unavailable_error(_AT_ZERO)
        message = encode(Call(id=uuid.uuid4().hex, client=client, access=access, action=action))[0]
        try:
            async with asyncio.timeout(timeout_s):
                return await self._calls.call(action, message, payload)
        except TimeoutError:
            did_not = "start" if self._is_at_zero() else "answer"
            raise unavailable_error(f"The GPU worker did not {did_not} within {timeout_s:.0f} s.") from None

    async def use_variables(self, variables: dict[str, str]) -> None:
        self._variables = variables
        if variables:
            await asyncio.gather(*(self._send_variables(name) for name in self._replicas.ids()))

    async def _send_variables(self, replica: str) -> None:
        message = encode(Call(id=uuid.uuid4().hex, client="", action=Reload(variables=self._variables)))[0]
        try:
            async with asyncio.timeout(_RELOAD_TIMEOUT_S):
                self._settings = (await self._calls.call_replica(replica, message, None)).settings
        except (ApiError, TimeoutError) as error:
            log.warning("worker_keeps_its_settings", replica=replica, reason=str(error))

    # --- the client's life -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._context = contextvars.copy_context()
        self._polling = asyncio.create_task(self._poll_forever())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._start_timeout_s):
                while not self._available:
                    await self._reported.wait()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.abort_all()
        self._polling.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FRESH_WITHIN_S):
                await self._outboxes.flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._polling, *self._tasks, return_exceptions=True)
        self._stop_gathering()
        self._note_loss("The server is shutting down.")

    def abort_all(self) -> None:
        """Break every speech, because this process ends."""
        for stream in list(self._streams.values()):
            stream.speech.abort(ApiError("shutting_down", "The server is shutting down."))

    def _start(self, work: Any) -> None:
        """Run `work` in the context of this client: Ray cancels what was begun in that of a request with the request.

        An answer to one request may carry the credit of others.
        """
        task = asyncio.create_task(work, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _poll_forever(self) -> None:
        while True:
            self._poll_all()
            await asyncio.sleep(REPORT_INTERVAL_S)

    def _poll_all(self, *, fresh: bool = False) -> None:
        """Ask each replica for its report, but those whose answer is still awaited.

        One that drains is asked while it has streams of this process: each report renews their lease.
        """
        ids = set(self._replicas.ids())
        gone = self._known.keys() - ids
        for name in gone:
            self._forget(name)
        if gone:
            self._refresh()
        if not ids and not self._catalog and self._max_waiting is not None:
            self._replicas.wake()  # no request can be understood without a catalogue
        for name in {stream.replica for stream in self._streams.values()} - ids - self._renewing - {""}:
            self._start(self._renew_lease(name))
        for name in ids:
            known = self._known.setdefault(name, KnownReplica(self._clock()))
            if not known.is_polled:
                known.is_polled = True
                self._awaited += 1
                self._start(self._poll(name, known, fresh=fresh))

    async def _poll(self, name: str, known: KnownReplica, *, fresh: bool) -> None:
        asked_at = self._clock()
        boot_id = known.boot_id if self._catalog else ""
        used = self._use.elsewhere(known.report.boot_id) if known.report else {}
        request = ReportRequest(
            ingress=self._id, fresh=fresh, boot_id=boot_id, ping=self._web.ping(), used_elsewhere=used
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
            if report.catalog is not None and self._variables:
                self._start(self._send_variables(name))
            self._on_report(report, known, asked_at)
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
                await self._replicas.report(replica, msgspec.msgpack.encode(ReportRequest(ingress=self._id)))
        except (ReplicaLostError, TimeoutError) as error:
            log.info("lease_not_renewed", replica=replica, reason=str(error) or type(error).__name__)
        finally:
            self._renewing.discard(replica)

    def _on_report(self, report: ReplicaReport, known: KnownReplica, asked_at: float) -> None:
        if report.catalog is not None:
            known.boot_id = report.boot_id
            self._catalog, self._settings = report.catalog, report.settings
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
        if self._is_at_zero():
            self._snapshot = None
        # Replicas that Serve has taken away, to replace them or to save them, let their streams end: they are no loss.
        if self._available and not alive and self._known:
            self._note_loss("The GPU worker went away.")
        self._available = bool(alive)
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
                self._catalog = []  # the next report has it
            else:
                self._web.on_emptied(name)

    def _require_worker(self) -> None:
        error = self._outage(self._timeout_s)
        if error is not None:
            raise error

    def _require_place(self) -> None:
        """Raise if as many requests as may do so wait for the first replica."""
        if self._max_waiting is None or not self._is_at_zero():
            return
        waiting = sum(not stream.replica for stream in self._streams.values())
        if waiting >= self._max_waiting:
            message = f"{waiting} requests wait for the first GPU worker to start, as many as may (TTS_MAX_QUEUE)."
            raise ApiError("queue_full", message, retry_after_s=RETRY_AFTER_S)

    def _forget_stream(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def _on_lost(self, request_id: str, replica: str) -> None:
        if request_id in self._streams:
            self._streams[request_id].lose(replica)

    def _on_failed(self, replica: str, error: ApiError) -> None:
        """The replica takes no more requests if it has failed one because its GPU worker is away."""
        known = self._known.get(replica)
        if known is not None and error.code == "worker_unavailable":
            known.lose(error, self._clock())
            self._refresh()
            self._poll_all()
