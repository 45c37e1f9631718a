"""GET /admin/events: what the GPU worker does, as server-sent events for dashboards.

`EventFeed` renders the snapshot at most four times a second for all dashboards of this web worker together.
The snapshot comes with the pings that every web worker sends anyway, so a dashboard costs the GPU worker nothing.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, get
from litestar.datastructures import State
from litestar.params import QueryParameter
from litestar.response import Stream

from server.dependencies import EngineDependency, SettingsDependency
from server.engine import EngineClient
from server.http.errors import ApiError, documented
from server.http.request_scope import is_head
from server.http.streaming import ClosingStream
from server.routes.admin import CleanupReport, Stats, Vram, cleanup_report_of, stats_of, vram_of
from server.routes.replicas import ModelPerformance, models_of
from shared.protocol import LimitName
from shared.settings import Settings

INTERVAL_S: Final = 0.25
KEEPALIVE_S: Final = 10.0
"""The pause between two comments while nothing changes; proxies give up after 30 s of silence."""

MAX_SUBSCRIBERS: Final = 200
"""Of one web worker. One costs a connection, and a copy of the latest event while it is sent."""

_RETRY_AFTER_S: Final = 5.0
_MEMORY_STEPS: Final = 1_000
"""Memory has changed if it has by a thousandth of the whole: the RAM that others use changes all the time."""

_encode = msgspec.json.Encoder().encode


class DashboardEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the service; the fields are those of /admin/stats, /admin/vram, /admin/performance, /admin/cleanup.

    `time` is in Unix seconds. `problem` says why the GPU worker cannot be used. Before its first report all of the
    other fields are null or empty; later they are as of its last report.
    """

    time: float
    problem: str | None
    stats: Stats | None
    vram: Vram | None
    performance: list[ModelPerformance]
    cleanup: CleanupReport | None


def event_of(engine: EngineClient, settings: Settings) -> DashboardEvent:
    """The state as of the latest snapshot."""
    snapshot, problem, reports = engine.snapshot, engine.unavailable(), engine.reports()
    return DashboardEvent(
        time=round(time.time(), 3),
        problem=problem.message if problem else None,
        stats=stats_of(snapshot, reports) if snapshot else None,
        vram=vram_of(snapshot, reports) if snapshot else None,
        performance=models_of(snapshot) if snapshot else [],
        cleanup=cleanup_report_of(engine, settings, snapshot) if snapshot else None,
    )


class EventFeed:
    """The latest event, for any number of subscribers; it works only while there are some.

    A subscriber gets the latest event when it asks for the next one: those that it was too slow for are left out.
    `read_state` returns the state of this moment. `stopping` is set when the process ends, and ends every subscription.
    `limit_hits` counts the subscribers that are refused.
    """

    def __init__(
        self,
        read_state: Callable[[], DashboardEvent],
        stopping: asyncio.Event,
        *,
        limit_hits: Counter[LimitName] | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._read_state = read_state
        self._stopping = stopping
        self._limit_hits = Counter() if limit_hits is None else limit_hits
        self._interval_s = interval_s
        self._news = asyncio.Event()
        """Set, and replaced, by the next event and by the end."""
        self._number = 0
        self._latest = b""
        self._last_state: Any = None
        self._polling: asyncio.Task[None] | None = None
        self.subscribers = 0

    def subscribe(self) -> None:
        """Begin a subscription; ApiError (`rate_limit_exceeded`) if there are too many."""
        if self._stopping.is_set():
            raise ApiError("shutting_down", "The server is shutting down.", retry_after_s=_RETRY_AFTER_S)
        if self.subscribers >= MAX_SUBSCRIBERS:
            self._limit_hits["dashboards"] += 1
            message = f"{MAX_SUBSCRIBERS} dashboards watch this web worker, as many as it serves."
            raise ApiError("rate_limit_exceeded", message, retry_after_s=_RETRY_AFTER_S)
        self.subscribers += 1
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll_forever(), name="events")

    def unsubscribe(self) -> None:
        """End a subscription."""
        self.subscribers -= 1
        if not self.subscribers and self._polling is not None:
            self._polling.cancel()
            self._polling, self._last_state, self._latest = None, None, b""

    async def events(self) -> AsyncIterator[bytes]:
        """The lines for one subscriber, until the process ends: events, and comments while nothing changes."""
        yield b"retry: 2000\n\n"
        sent = 0
        while not self._stopping.is_set():
            if self._latest and self._number != sent:
                sent = self._number
                yield self._latest
                continue
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    await self._news.wait()
            except TimeoutError:
                if self._polling is not None and self._polling.done():
                    self._polling.result()  # it has failed, and a stream that goes on would look alive
                yield b": keepalive\n\n"

    async def _poll_forever(self) -> None:
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                self._poll()
                await asyncio.wait({stopped}, timeout=self._interval_s)
            self._notify_subscribers()
        finally:
            stopped.cancel()

    def _poll(self) -> None:
        event = self._read_state()
        state = _without_clocks(event)
        if state != self._last_state:
            self._last_state, self._number, self._latest = state, self._number + 1, line_of(event)
            self._notify_subscribers()

    def _notify_subscribers(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def line_of(event: DashboardEvent) -> bytes:
    """The event on the wire."""
    return b"data: " + _encode(event) + b"\n\n"


def _without_clocks(event: DashboardEvent) -> Any:
    """The part of an event that must differ for it to be sent: no clocks that go on by themselves, memory in steps."""
    stats, vram = event.stats, event.vram
    if stats is not None:
        streams = [msgspec.structs.replace(stream, age_s=0.0) for stream in stats.streams]
        replicas = [_without_uptime(replica) for replica in stats.replicas]
        stats = msgspec.structs.replace(_without_uptime(stats), streams=streams, replicas=replicas)
    if vram is not None:
        vram = msgspec.structs.replace(
            _memory_in_steps(vram), replicas=[_memory_in_steps(one) for one in vram.replicas]
        )
    return msgspec.structs.replace(event, time=0.0, stats=stats, vram=vram)


def _without_uptime(stats: Any) -> Any:
    return msgspec.structs.replace(stats, worker=msgspec.structs.replace(stats.worker, uptime_s=0.0))


def _memory_in_steps(vram: Any) -> Any:
    models = [msgspec.structs.replace(model, idle_s=None) for model in vram.models]
    return msgspec.structs.replace(vram, models=models, device=_in_steps(vram.device), host=_in_steps(vram.host))


def _in_steps(memory: Any) -> Any:
    step = max(1, memory.total_bytes // _MEMORY_STEPS)
    sizes = {name: getattr(memory, name) // step for name in memory.__struct_fields__ if name.endswith("_bytes")}
    return msgspec.structs.replace(memory, **sizes)


@get(
    "/events",
    operation_id="getEvents",
    summary="Watch the service",
    tags=["Admin"],
    responses=documented(400, 401, 403, 429, 500, 503),
)
async def events(
    request: Request[Any, Any, Any],
    state: State,
    engine: EngineDependency,
    settings: SettingsDependency,
    *,
    once: Annotated[bool, QueryParameter(description="Send the state of this moment, and end.")] = False,
) -> Response[Any]:
    """Server-sent events: the whole state at once and whenever it changes, four times a second at most.

    Between events come comments. A reader that is too slow for an event gets the next one instead.
    """
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    if once:
        return Response(line_of(event_of(engine, settings)), media_type="text/event-stream", headers=headers)
    if is_head(request.scope):  # a stream has no length
        return Stream(iter(()), media_type="text/event-stream", headers=headers, status_code=200)
    feed: EventFeed = state.event_feed
    feed.subscribe()
    return ClosingStream(
        feed.events(), on_close=feed.unsubscribe, media_type="text/event-stream", headers=headers, status_code=200
    )
