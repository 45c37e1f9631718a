"""EngineClient over the replicas of a cluster: each replica keeps one GPU worker, and Ray Serve chooses the replica.

This module knows messages, streams and failures. It does not import ray: server/cluster implements `EngineReplicas`
over a deployment handle. What crosses Ray are the encoded messages of shared/protocol.py, as bytes.
"""

import asyncio
import contextlib
import contextvars
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Protocol, Self

import msgspec
import structlog

from server.engine.client import Speech, error_of
from server.engine.cluster_snapshot import merge, sum_of_counts
from server.engine.key_use import ClusterUse, merge_usage
from server.engine.reports import ReplicaReport
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import (
    SHARED_VOICES,
    Action,
    Append,
    Audio,
    CacheCounts,
    CacheName,
    Call,
    Cancel,
    Cleanup,
    Credit,
    EmptyCache,
    EndText,
    Failed,
    FindSpeech,
    FindUsage,
    Finished,
    FromWorker,
    KeyUse,
    Message,
    Ping,
    PinModel,
    ProtocolError,
    Reload,
    Reply,
    Snapshot,
    Speak,
    SpeechError,
    SpeechOutcome,
    Spoken,
    Started,
    UnloadModel,
    VoiceAccess,
    decode_from_worker,
    encode,
)

log = structlog.get_logger(__name__)

REPORT_INTERVAL_S: Final = 0.25
STALE_AFTER_S: Final = 5.0
"""A replica whose last report is older takes no part in the snapshot."""

_FRESH_WITHIN_S: Final = 1.0
_RELOAD_TIMEOUT_S: Final = 5.0
_RETRY_AFTER_S: Final = 5.0
_LONGEST_RETRY_S: Final = 60.0
_MAX_KEPT_TEXT: Final = 65_536
"""Characters of an open request that are kept for another replica, in case the first one refuses the request."""

ELSEWHERE: Final = frozenset({"queue_full", "worker_unavailable", "shutting_down"})
"""Codes of a refusal that another replica may not repeat."""

Frames = list[bytes]
"""One message of shared/protocol.py: its header, and its payload if it has one."""


class ReplicaLostError(Exception):
    """A replica died, or cannot be reached; the message says what happened."""


class ReportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for a ReplicaReport. `ingress` names the asking process; it lives while it asks. `ping` has its figures.

    `fresh`: the snapshot must be one that the GPU worker makes now.
    """

    ingress: str
    fresh: bool = False
    boot_id: str = ""
    ping: Ping = Ping()
    used_elsewhere: dict[str, KeyUse] = {}
    """What clients with limits have used at the other replicas."""


class ReplicaStream(Protocol):
    """The answers to one Speak: batches of messages, of which the first begins with the replica's id."""

    def __aiter__(self) -> AsyncIterator[list[Frames]]:
        """The batches, as they arrive. Raises ReplicaLostError if the replica is lost."""

    def cancel(self) -> None:
        """End the request, wherever it is."""


class EngineReplicas(Protocol):
    """The replicas as one process reaches them. Every method may raise ReplicaLostError."""

    def ids(self) -> Sequence[str]:
        """The replicas that take new requests. Never raises."""

    def update(self, reports: dict[str, ReplicaReport]) -> None:
        """Take the latest reports, by which replicas are chosen."""

    def speak(
        self, request: bytes, reference: bytes | None, *, ingress: str, model: str, avoid: Sequence[str]
    ) -> ReplicaStream:
        """Send a Speak to a replica that is chosen by `model`, and is none of `avoid` if there is another."""

    async def call(self, replica: str, call: bytes, payload: bytes | None, *, model: str) -> Frames:
        """Send a Call; returns a Reply or a Failed. Without a name the replica is chosen by `model`."""

    async def post(self, replica: str, messages: list[bytes]) -> None:
        """Send messages that have no answer to the replica, also to one that takes no new requests."""

    async def report(self, replica: str, request: bytes) -> bytes:
        """Ask a replica for its report."""


class RayEngineClient:
    """EngineClient over `replicas`: an async context manager, used on one event loop.

    The start waits for a replica, so that Serve sends no request to a process that knows of none; after
    `start_timeout_s` it goes on without one.
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
        clock: Callable[[], float] = time.monotonic,
        cache_counts: Callable[[], dict[CacheName, CacheCounts]] = dict,
        open_sockets: Callable[[], int] = int,
        on_emptied: Callable[[CacheName], None] = lambda _name: None,
    ) -> None:
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._cache_counts = cache_counts
        self._open_sockets = open_sockets
        self._on_emptied = on_emptied
        self._id = uuid.uuid4().hex
        self._catalog: list[ModelSpec] = []
        self._settings: dict[str, Any] = {}
        self._variables: dict[str, str] = {}
        """What each GPU worker is told when it comes."""
        self._catalog_hits = self._catalog_misses = 0
        self._known: dict[str, _KnownReplica] = {}
        self._use = ClusterUse()
        self._alive: list[ReplicaReport] = []
        """Of the replicas that were there last; they stay when all are gone, as a snapshot does."""
        self._snapshot: Snapshot | None = None
        """Made of `_alive` when it is asked for; None until then."""
        self._snapshot_made_at = -math.inf
        self._emptied: dict[CacheName, int] | None = None
        self._news = asyncio.Event()
        """Set, and replaced, by each report."""
        self._loss: asyncio.Future[ApiError] | None = None
        self._available = False
        self._streams: dict[str, _Stream] = {}
        self._outboxes: dict[str, _Outbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what routes use ---------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> list[ModelSpec]:
        if self._catalog:
            self._catalog_hits += 1
        else:
            self._catalog_misses += 1
        return self._catalog

    @property
    def snapshot(self) -> Snapshot | None:
        if self._snapshot is None and self._alive:
            self._snapshot = merge(self._alive)
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
        errors = []
        for known in self._known.values():
            error = known.outage(self._clock(), patience_s)
            if error is None:
                return None
            errors.append(error)
        if not errors:
            return unavailable_error("No GPU worker is there; the cluster is starting, or it has no replica.")
        return min(errors, key=lambda error: error.retry_after_s or 0.0)

    async def worker_loss(self) -> ApiError:
        if self._loss is None:
            self._loss = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._loss)

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        """A replica that does not answer in time is shown as it was: the others must not wait for it."""
        self._require_worker()
        oldest = self._clock() - max_age_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FRESH_WITHIN_S):
                while self._snapshot_made_at < oldest:
                    self._ask_all(fresh=True)
                    await self._news.wait()
                    self._require_worker()
        snapshot = self.snapshot
        if snapshot is None or self._outage(STALE_AFTER_S) is not None:
            raise unavailable_error("The GPU workers do not answer.")
        return snapshot

    def speak(self, request: Speak, reference: bytes | None = None) -> Speech:
        self._require_worker()
        stream = _Stream(self, request)
        self._streams[request.id] = stream
        self._start(stream.run(reference))
        return stream.speech

    def record(self, outcome: SpeechOutcome) -> None:
        alive = [name for name, known in self._known.items() if known.outage(self._clock(), STALE_AFTER_S) is None]
        if alive:
            self.post(alive[0], Spoken(outcome=outcome))

    async def call(
        self,
        action: Action,
        *,
        client: str,
        access: VoiceAccess = SHARED_VOICES,
        payload: bytes | None = None,
        timeout_s: float,
    ) -> Reply:
        """Actions on one model's place, on caches and on outcomes go to all replicas, the others to one of them."""
        self._require_worker()
        message = encode(Call(id=uuid.uuid4().hex, client=client, access=access, action=action))[0]
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(action, _FOR_ALL):
                    return await self._call_all(action, message, payload)
                return await self._call_one(message, payload, model=getattr(action, "model", ""))
        except TimeoutError:
            raise unavailable_error(f"The GPU worker did not answer within {timeout_s:.0f} s.") from None

    async def use_variables(self, variables: dict[str, str]) -> None:
        self._variables = variables
        if variables:
            await asyncio.gather(*(self._tell_variables(name) for name in self._replicas.ids()))

    async def _tell_variables(self, replica: str) -> None:
        message = encode(Call(id=uuid.uuid4().hex, client="", action=Reload(variables=self._variables)))[0]
        try:
            async with asyncio.timeout(_RELOAD_TIMEOUT_S):
                self._settings = (await self._call_replica(replica, message, None)).settings
        except (ApiError, TimeoutError) as error:
            log.warning("worker_keeps_its_settings", replica=replica, reason=str(error))

    async def _call_one(self, message: bytes, payload: bytes | None, *, model: str) -> Reply:
        error = unavailable_error("No GPU worker is there.")
        for name in ["", *self._replicas.ids()]:  # first the one that is chosen, then whichever is there
            try:
                return await self._call_replica(name, message, payload, model=model)
            except ApiError as failure:
                if failure.code not in ELSEWHERE:
                    raise
                error = failure
        raise error

    async def _call_all(self, action: Action, message: bytes, payload: bytes | None) -> Reply:
        calls = [self._call_replica(name, message, payload) for name in self._replicas.ids()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        replies = [answer for answer in answers if isinstance(answer, Reply)]
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if not replies or (errors and isinstance(action, FindUsage)):  # a sum without one of its parts would be wrong
            raise errors[0] if errors else unavailable_error("No GPU worker is there.")
        return merge_replies(action, replies)

    async def _call_replica(self, replica: str, message: bytes, payload: bytes | None, *, model: str = "") -> Reply:
        try:
            answer, _ = decode_from_worker(await self._replicas.call(replica, message, payload, model=model))
        except ReplicaLostError:
            raise unavailable_error("The GPU worker went away.") from None
        except ProtocolError as error:
            raise ApiError("internal_error", f"The GPU worker's answer was {error}.") from None
        if isinstance(answer, Failed):
            raise error_of(answer)
        if not isinstance(answer, Reply):
            raise ApiError("internal_error", "The GPU worker sent no reply.")
        return answer

    # --- the client's life -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._context = contextvars.copy_context()
        self._polling = asyncio.create_task(self._poll_forever())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._start_timeout_s):
                while not self._available:
                    await self._news.wait()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.abort_all()
        self._polling.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FRESH_WITHIN_S):
                await asyncio.gather(*(outbox.sent() for outbox in self._outboxes.values()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._polling, *self._tasks, return_exceptions=True)
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
            self._ask_all()
            await asyncio.sleep(REPORT_INTERVAL_S)

    def _ask_all(self, *, fresh: bool = False) -> None:
        """Ask each replica that owes no answer for its report."""
        ids = set(self._replicas.ids())
        for name in self._known.keys() - ids:
            self._forget(name)
        for name in ids:
            known = self._known.setdefault(name, _KnownReplica(self._clock()))
            if not known.asked:
                known.asked = True
                self._start(self._ask(name, known, fresh=fresh))

    async def _ask(self, name: str, known: "_KnownReplica", *, fresh: bool) -> None:
        asked_at = self._clock()
        caches = {**self._cache_counts(), "catalog": CacheCounts(self._catalog_hits, self._catalog_misses)}
        ping = Ping(caches=caches, open_sockets=self._open_sockets())
        boot_id = known.boot_id if self._catalog else ""
        used = self._use.elsewhere(known.report.boot_id) if known.report else {}
        request = ReportRequest(ingress=self._id, fresh=fresh, boot_id=boot_id, ping=ping, used_elsewhere=used)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._replicas.report(name, msgspec.msgpack.encode(request))
            report = msgspec.msgpack.decode(answer, type=ReplicaReport)
        except (ReplicaLostError, TimeoutError, msgspec.DecodeError) as error:
            log.warning("replica_silent", replica=name, reason=str(error) or type(error).__name__)
            known.lose(unavailable_error("The GPU worker went away."), self._clock())
        else:
            if report.catalog is not None and self._variables:
                self._start(self._tell_variables(name))
            self._take(report, known, asked_at)
        finally:
            known.asked = False
        self._refresh()

    def _take(self, report: ReplicaReport, known: "_KnownReplica", asked_at: float) -> None:
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
        self._refresh()

    def _refresh(self) -> None:
        """Make the snapshot of the cluster anew, and wake those that wait for it."""
        now = self._clock()
        alive = [known for known in self._known.values() if known.outage(now, STALE_AFTER_S) is None]
        self._replicas.update(self.reports())
        reports = [known.report for known in alive if known.report and known.report.snapshot]
        if reports:
            self._alive, self._snapshot = reports, None
            self._snapshot_made_at = min(known.made_at for known in alive)
            self._empty_caches(sum_of_counts(report.snapshot.emptied for report in reports if report.snapshot))
        if self._available and not alive:
            self._note_loss("The GPU worker went away.")
        self._available = bool(alive)
        self._news.set()
        self._news = asyncio.Event()

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
                self._on_emptied(name)

    def _require_worker(self) -> None:
        error = self._outage(self._timeout_s)
        if error is not None:
            raise error

    # --- what streams use --------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> EngineReplicas:
        """The replicas of the cluster."""
        return self._replicas

    @property
    def ingress(self) -> str:
        """This process, as replicas know it."""
        return self._id

    def end(self, stream: "_Stream") -> None:
        """The stream is over."""
        self._streams.pop(stream.request.id, None)

    def failed(self, replica: str, error: ApiError) -> None:
        """The replica has failed a request by `error`: it takes no more if its GPU worker is away."""
        known = self._known.get(replica)
        if known is not None and error.code == "worker_unavailable":
            known.lose(error, self._clock())
            self._refresh()
            self._ask_all()

    def post(self, replica: str, message: Message) -> None:
        """Send a message without an answer to a replica, after those that were sent before. Never blocks."""
        outbox = self._outboxes.get(replica)
        if outbox is None:
            outbox = self._outboxes[replica] = _Outbox(replica, self._replicas, self._timeout_s)
        outbox.messages.append(message)
        if outbox.idle:
            outbox.idle = False
            self._start(self._empty(outbox))

    async def _empty(self, outbox: "_Outbox") -> None:
        try:
            lost = await outbox.send()
        finally:
            self._outboxes.pop(outbox.replica, None)
        for request_id in {message.id for message in lost if isinstance(message, Append | EndText | Credit)}:
            if request_id in self._streams:
                self._streams[request_id].lose(outbox.replica)


class _KnownReplica:
    """A replica, as of its latest report."""

    def __init__(self, now: float) -> None:
        self.asked = False
        self.made_at = -math.inf
        """When its snapshot was made, or earlier."""

        self.heard_at = now
        self.boot_id = ""
        self.report: ReplicaReport | None = None
        self.lost: ApiError | None = None
        self.lost_at = -math.inf

    def lose(self, error: ApiError, now: float) -> None:
        """It takes no requests until it has answered to a question that is asked from now on."""
        self.lost, self.lost_at = error, now

    def current(self) -> ReplicaReport | None:
        """The latest report, with what has become known since."""
        if self.report is None or self.lost is None:
            return self.report
        reason = SpeechError(code=self.lost.code, message=self.lost.message)
        return msgspec.structs.replace(self.report, error=reason, retry_after_s=self.lost.retry_after_s)

    def outage(self, now: float, patience_s: float) -> ApiError | None:
        """Why it takes no requests; None if it does."""
        if self.lost is not None:
            return self.lost
        if self.report is None:
            return unavailable_error("The GPU worker has not reported yet.")
        if self.report.error is not None:
            return unavailable_error(self.report.error.message, self.report.retry_after_s or _RETRY_AFTER_S)
        if now - self.heard_at > patience_s:
            return unavailable_error(f"The GPU worker has not answered for {now - self.heard_at:.0f} s.")
        return None


class _Outbox:
    """Messages for one replica: one call is under way at a time, so that they arrive in their order."""

    def __init__(self, replica: str, replicas: EngineReplicas, timeout_s: float) -> None:
        self.replica = replica
        self.messages: list[Message] = []
        self.idle = True
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._empty = asyncio.Event()

    async def send(self) -> list[Message]:
        """Send all messages. Returns those that the replica may not have taken: it is lost, or has stood still."""
        messages: list[Message] = []
        try:
            while self.messages:
                messages, self.messages = self.messages, []
                async with asyncio.timeout(self._timeout_s):
                    await self._replicas.post(self.replica, [encode(message)[0] for message in messages])
        except (ReplicaLostError, TimeoutError) as error:
            lost = [*messages, *self.messages]
            log.info("messages_lost", replica=self.replica, messages=len(lost), reason=str(error))
            return lost
        finally:
            self._empty.set()
        return []

    async def sent(self) -> None:
        """Wait until all messages are sent, or lost."""
        await self._empty.wait()


class _Stream:
    """One Speak on its way through the replicas, until one of them has taken it."""

    def __init__(self, client: RayEngineClient, request: Speak) -> None:
        self.request = request
        self.speech = Speech(request, grant=self._grant, abort=self._abort, write=self._write)
        self._client = client
        self._replica = ""
        """The one that has the request; "" while it is being chosen."""
        self._written: list[Append | EndText] = []
        """What another replica needs to know of an open request, while this one may still refuse it."""
        self._kept_chars = 0
        self._begun = False
        self._over = False
        self._lost: ApiError | None = None
        """Set when the replica lacks a message: without its text, the speech would have a hole."""
        self._answers: ReplicaStream | None = None
        self._cancel: Cancel | None = None

    async def run(self, reference: bytes | None) -> None:
        """Pass the messages on to the speech. A refusal, or a loss before the first sound, is tried elsewhere."""
        avoid: list[str] = []
        try:
            error = None
            while not self._over and (error := await self._attempt(reference, avoid)) is not None:
                self._client.failed(self._replica, error)
                if self._over or not self._may_move(error, avoid):
                    break
                avoid.append(self._replica)
                self._replica = ""
                self._lost = None
            if error is not None and not self._over:
                self.speech.fail(error)
        finally:
            if self._answers is not None and not self._over:
                self._answers.cancel()
            self._over = True
            self._client.end(self)

    def _may_move(self, error: ApiError, avoid: list[str]) -> bool:
        if self._begun or error.code not in ELSEWHERE or self._kept_chars > _MAX_KEPT_TEXT:
            return False
        if self._replica in {"", *avoid}:  # none other is to have the model
            return False
        return bool({*self._client.replicas.ids()} - {*avoid, self._replica})

    async def _attempt(self, reference: bytes | None, avoid: list[str]) -> ApiError | None:
        """Let one replica speak; None when the speech is complete, else why it failed."""
        replicas, request = self._client.replicas, encode(self.request)[0]
        self._answers = replicas.speak(
            request, reference, ingress=self._client.ingress, model=self.request.model, avoid=avoid
        )
        try:
            async for batch in self._answers:
                if self._lost is not None:
                    break
                if not self._replica:
                    (name,) = batch.pop(0)
                    self._chosen(name.decode())
                for frames in batch:
                    message, payload = decode_from_worker(frames)
                    if isinstance(message, Failed):
                        return error_of(message)
                    problem = self._receive(message, payload)
                    if problem is not None:
                        self.speech.abort(ApiError("synthesis_failed", problem))
                    if isinstance(message, Finished):
                        self._over = True
                        return None
        except ReplicaLostError as lost:
            log.warning("replica_lost", replica=self._replica, reason=str(lost))
            return unavailable_error("The GPU worker went away.")
        except ProtocolError as error:
            return ApiError("synthesis_failed", f"The GPU worker's answer was {error}.")
        return self._lost or ApiError("synthesis_failed", "The GPU worker sent no final message.")

    def lose(self, replica: str) -> None:
        """The replica lacks a message of the request, so the request ends there."""
        if replica == self._replica and self._answers is not None and not self._over:
            self._lost = unavailable_error("The GPU worker did not take all messages.")
            self._answers.cancel()

    def _receive(self, message: FromWorker, payload: bytes | None) -> str | None:
        if isinstance(message, Started | Audio | Finished) and not self._over:
            self._begun = True
            self._written.clear()
            return self.speech.receive(message, payload)
        return None

    def _chosen(self, replica: str) -> None:
        self._replica = replica
        for message in [self._cancel] if self._cancel else self._written:
            self._client.post(replica, message)

    def _write(self, message: Append | EndText) -> None:
        # Before a replica is chosen there is nowhere else to keep them.
        if not self._replica or (not self._begun and self._kept_chars <= _MAX_KEPT_TEXT):
            self._written.append(message)
            self._kept_chars += len(message.text) if isinstance(message, Append) else 0
        if self._replica:
            self._client.post(self._replica, message)

    def _grant(self, request_id: str, chunks: int) -> None:
        self._client.post(self._replica, Credit(id=request_id, chunks=chunks))

    def _abort(self, request_id: str, error: ApiError | None) -> None:
        if not self._over:
            self.speech.fail(error or ApiError("synthesis_failed", "The request was aborted."))
            self._over = True
            self._client.end(self)
        reason = SpeechError(code=error.code, message=error.message, param=error.param) if error else None
        self._cancel = Cancel(id=request_id, error=reason)
        if self._replica:
            self._client.post(self._replica, self._cancel)
        elif self._answers is not None:
            self._answers.cancel()


_FOR_ALL: Final = (UnloadModel, PinModel, Cleanup, EmptyCache, FindSpeech, FindUsage)
"""Actions that concern every GPU worker, or the one of which only it knows."""


def merge_replies(action: Action, replies: list[Reply]) -> Reply:
    """One reply of those that several replicas gave to the same action."""
    if isinstance(action, FindUsage):
        return merge_usage(replies)
    return replies[0]


def unavailable_error(message: str, retry_after_s: float = _RETRY_AFTER_S) -> ApiError:
    """The error of a request that finds no GPU worker."""
    return ApiError("worker_unavailable", message, retry_after_s=min(max(1.0, retry_after_s), _LONGEST_RETRY_S))
