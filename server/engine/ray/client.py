"""EngineClient over replicas: it sends speech and calls to them, by what their reports say."""

import asyncio
import contextlib
import contextvars
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, Final, Self

import structlog

from server.engine.client import Speech
from server.engine.outage import RETRY_AFTER_S, unavailable_error
from server.engine.ray.calls import FOR_ALL, ReplicaCalls
from server.engine.ray.interface import EngineReplicas
from server.engine.ray.outbox import Outboxes
from server.engine.ray.polling import FRESH_WITHIN_S, STALE_AFTER_S, ReplicaPolling
from server.engine.ray.stream import RelayedStream
from server.engine.reports import ReplicaReport
from server.engine.web_process import WebProcess
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import (
    SHARED_VOICES,
    Action,
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

    _polling_task: asyncio.Task[None]
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
        self._start_timeout_s = start_timeout_s
        self._max_waiting = max_waiting
        self._web = web or WebProcess()
        self._id = uuid.uuid4().hex
        self._variables: dict[str, str] = {}
        """Settings that each new GPU worker gets."""

        self._streams: dict[str, RelayedStream] = {}
        self._polling = ReplicaPolling(
            replicas,
            ingress=self._id,
            timeout_s=timeout_s,
            scales_to_zero=max_waiting is not None,
            clock=clock,
            web=self._web,
            start=self._start,
            streaming=lambda: {stream.replica for stream in self._streams.values()},
            on_new_worker=self._on_new_worker,
        )
        self._calls = ReplicaCalls(replicas)
        self._outboxes = Outboxes(replicas, timeout_s, start=self._start, on_lost=self._on_lost)
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what routes use ---------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> list[ModelSpec]:
        catalog = self._polling.catalog
        self._web.count_catalog(hit=bool(catalog))
        return catalog

    @property
    def snapshot(self) -> Snapshot | None:
        return self._polling.snapshot

    @property
    def worker_settings(self) -> dict[str, Any]:
        return self._polling.settings

    def reports(self) -> dict[str, ReplicaReport]:
        return self._polling.reports()

    def unavailable(self) -> ApiError | None:
        return self._polling.outage(STALE_AFTER_S)

    async def worker_loss(self) -> ApiError:
        return await self._polling.loss()

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        return await self._polling.fresh_snapshot(max_age_s)

    def speak(self, request: Speak, reference: bytes | None = None) -> Speech:
        self._polling.require_worker()
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
        alive = self._polling.alive()
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
        self._polling.require_worker()
        if self._polling.is_at_zero() and isinstance(action, FOR_ALL):
            raise unavailable_error(_AT_ZERO)
        message = encode(Call(id=uuid.uuid4().hex, client=client, access=access, action=action))[0]
        try:
            async with asyncio.timeout(timeout_s):
                return await self._calls.call(action, message, payload)
        except TimeoutError:
            did_not = "start" if self._polling.is_at_zero() else "answer"
            raise unavailable_error(f"The GPU worker did not {did_not} within {timeout_s:.0f} s.") from None

    async def use_variables(self, variables: dict[str, str]) -> None:
        self._variables = variables
        if variables:
            await asyncio.gather(*(self._send_variables(name) for name in self._replicas.ids()))

    async def _send_variables(self, replica: str) -> None:
        message = encode(Call(id=uuid.uuid4().hex, client="", action=Reload(variables=self._variables)))[0]
        try:
            async with asyncio.timeout(_RELOAD_TIMEOUT_S):
                self._polling.settings = (await self._calls.call_replica(replica, message, None)).settings
        except (ApiError, TimeoutError) as error:
            log.warning("worker_keeps_its_settings", replica=replica, reason=str(error))

    # --- the client's life -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._context = contextvars.copy_context()
        self._polling_task = asyncio.create_task(self._polling.poll_forever())
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not self._polling.available:
                    await self._polling.next_report()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.abort_all()
        self._polling_task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FRESH_WITHIN_S):
                await self._outboxes.flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._polling_task, *self._tasks, return_exceptions=True)
        self._polling.close("The server is shutting down.")

    def abort_all(self) -> None:
        """Break every speech, because this process ends."""
        for stream in list(self._streams.values()):
            stream.speech.abort(ApiError("shutting_down", "The server is shutting down."))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the context of this client: Ray cancels what was begun in that of a request with the request.

        An answer to one request may carry the credit of others.
        """
        task = asyncio.create_task(work, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- requests and replicas ---------------------------------------------------------------------------------------

    def _require_place(self) -> None:
        """Raise if as many requests as may do so wait for the first replica."""
        if self._max_waiting is None or not self._polling.is_at_zero():
            return
        waiting = sum(not stream.replica for stream in self._streams.values())
        if waiting >= self._max_waiting:
            self._web.count_refusal("queue")
            message = f"{waiting} requests wait for the first GPU worker to start, as many as may (TTS_MAX_QUEUE)."
            raise ApiError("queue_full", message, retry_after_s=RETRY_AFTER_S)

    def _forget_stream(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def _on_new_worker(self, replica: str) -> None:
        if self._variables:
            self._start(self._send_variables(replica))

    def _on_lost(self, request_id: str, replica: str) -> None:
        if request_id in self._streams:
            self._streams[request_id].lose(replica)

    def _on_failed(self, replica: str, error: ApiError) -> None:
        """The replica takes no more requests if it has failed one because its GPU worker is away."""
        if error.code == "worker_unavailable":
            self._polling.lose(replica, error)
