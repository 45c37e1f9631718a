"""GET /admin/events: what dashboards see, how often, and what they cost."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from server.http.errors import ApiError
from server.routes import events
from server.routes.events import MAX_SUBSCRIBERS, DashboardEvent, EventFeed
from shared.protocol import Call, LimitName, StreamState
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, Serve, becomes, serving, until

pytestmark = SHARED_LOOP

STREAM = StreamState(id="r", model="espeak-ng", client="peer:::1", state="generating", age_s=1.5, audio_s=2.5)


class FakeService:
    """A service whose `problem` a test changes; it counts the looks at it."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self.looks = 0

    def __call__(self) -> DashboardEvent:
        """The state now; the clock never stands still."""
        self.looks += 1
        return DashboardEvent(
            time=float(self.looks), problem=self.problem, stats=None, vram=None, performance=[], cleanup=None
        )


@pytest.fixture
def service() -> FakeService:
    """A service without problems."""
    return FakeService()


@pytest.fixture
def feed(service: FakeService) -> EventFeed:
    """A feed that looks as often as the event loop turns."""
    return EventFeed(service, asyncio.Event(), interval_s=0.0)


async def _next(lines: AsyncIterator[bytes]) -> Any:
    """The next event, past comments."""
    async with asyncio.timeout(20):
        async for line in lines:
            if line.startswith(b"data: "):
                return json.loads(line.removeprefix(b"data: "))
    return None


class TestFeed:
    """EventFeed."""

    async def test_only_changes(self, feed: EventFeed, service: FakeService) -> None:
        """The state comes at once, and again only when more than a clock has changed."""
        feed.subscribe()
        async with aclosing(feed.events()) as lines:
            assert (await _next(lines))["problem"] is None
            coming = asyncio.create_task(_next(lines))
            looks = service.looks
            await becomes(lambda: service.looks > looks + 20)
            assert not coming.done()
            service.problem = "it is gone"
            assert (await coming)["problem"] == "it is gone"
        feed.unsubscribe()

    async def test_slow_reader(self, feed: EventFeed, service: FakeService) -> None:
        """A reader that was away for a thousand events gets the last one alone; another one is not held up."""
        for _ in range(2):
            feed.subscribe()
        async with aclosing(feed.events()) as slow, aclosing(feed.events()) as quick:
            await _next(slow)
            await _next(quick)
            for number in range(1_000):
                service.problem = str(number)
                assert (await _next(quick))["problem"] == str(number)
            assert (await _next(slow))["problem"] == "999"
        for _ in range(2):
            feed.unsubscribe()

    async def test_shared(self, feed: EventFeed, service: FakeService) -> None:
        """A hundred dashboards cause as many looks as one, and without any there are none."""
        assert service.looks == 0
        for _ in range(100):
            feed.subscribe()
        lines = [feed.events() for _ in range(100)]
        assert {(await _next(each))["time"] for each in lines} == {1.0}
        for each in lines:
            await each.aclose()  # type: ignore[attr-defined]
            feed.unsubscribe()
        await asyncio.sleep(0)
        looks = service.looks
        for _ in range(20):
            await asyncio.sleep(0)
        assert service.looks == looks

    async def test_bounded(self, service: FakeService) -> None:
        """One dashboard too many is refused and counted, until another one leaves."""
        limit_hits: Counter[LimitName] = Counter()
        feed = EventFeed(service, asyncio.Event(), limit_hits=limit_hits)
        for _ in range(MAX_SUBSCRIBERS):
            feed.subscribe()
        with pytest.raises(ApiError, match="dashboards") as refused:
            feed.subscribe()
        assert (refused.value.status, bool(refused.value.retry_after_s)) == (429, True)
        assert limit_hits == {"dashboards": 1}
        feed.unsubscribe()
        feed.subscribe()
        for _ in range(MAX_SUBSCRIBERS):
            feed.unsubscribe()

    async def test_keepalive(self, feed: EventFeed, monkeypatch: pytest.MonkeyPatch) -> None:
        """Comments come while nothing changes."""
        monkeypatch.setattr(events, "KEEPALIVE_S", 0.01)
        feed.subscribe()
        async with aclosing(feed.events()) as lines:
            await _next(lines)
            assert [await anext(lines) for _ in range(3)] == [b": keepalive\n\n"] * 3
        feed.unsubscribe()

    async def test_a_mistake_of_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A feed that has failed breaks its streams off, and the next dashboard gets a new one."""
        monkeypatch.setattr(events, "KEEPALIVE_S", 0.01)
        service, failing = FakeService(), True

        def look() -> DashboardEvent:
            if failing and service.looks:
                raise ZeroDivisionError
            return service()

        feed = EventFeed(look, asyncio.Event(), interval_s=0.0)
        feed.subscribe()
        async with aclosing(feed.events()) as lines:
            await _next(lines)
            with pytest.raises(ZeroDivisionError):
                await _next(lines)
        feed.unsubscribe()
        failing = False
        feed.subscribe()
        async with aclosing(feed.events()) as lines:
            assert await _next(lines)
        feed.unsubscribe()

    async def test_stop(self, service: FakeService) -> None:
        """When the process stops, subscriptions end and none begins."""
        stopping = asyncio.Event()
        feed = EventFeed(service, stopping, interval_s=3600.0)
        feed.subscribe()
        async with aclosing(feed.events()) as lines:
            await _next(lines)
            coming = asyncio.create_task(_next(lines))
            await asyncio.sleep(0)
            stopping.set()
            assert await coming is None
        feed.unsubscribe()
        with pytest.raises(ApiError) as refused:
            feed.subscribe()
        assert refused.value.code == "shutting_down"


async def test_events(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The state has what the other operations answer, and a new request shows without being asked for."""
    async with client.stream("GET", "/admin/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        lines = answer.aiter_bytes()
        first = await _next(lines)
        stats, vram = (await client.get("/admin/stats")).json(), (await client.get("/admin/vram")).json()
        assert first["problem"] is None
        assert first["stats"].keys() == stats.keys()
        assert first["vram"] == vram
        assert first["cleanup"] == (await client.post("/admin/cleanup")).json()
        assert first["performance"] == []
        worker.snapshot = msgspec.structs.replace(worker.snapshot, running=1, streams=[STREAM])
        second = await _next(lines)
        assert (second["stats"]["running"], second["stats"]["streams"][0]["id"]) == (1, "r")
    assert not worker.of(Call)


@pytest.mark.slow
async def test_clocks_alone_are_no_event(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Uptime, ages, idle times and a little memory change all the time: the next event is that of a real change."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, streams=[STREAM])
    await client.get("/admin/vram")
    async with client.stream("GET", "/admin/events") as answer:
        lines = answer.aiter_bytes()
        await _next(lines)
        snapshot = worker.snapshot
        later = msgspec.structs.replace(
            snapshot,
            uptime_s=99.0,
            streams=[msgspec.structs.replace(STREAM, age_s=9.0)],
            models=[msgspec.structs.replace(model, idle_s=9.0) for model in snapshot.models],
            device=msgspec.structs.replace(snapshot.device, used_bytes=snapshot.device.used_bytes + 1),
        )
        worker.snapshot = later
        assert (await client.get("/admin/stats")).status_code == 200
        await client.get("/admin/vram")  # the application has that snapshot now
        await asyncio.sleep(2 * events.INTERVAL_S)  # at least one look; no result depends on how many
        worker.snapshot = msgspec.structs.replace(later, queued=1)
        assert (await _next(lines))["stats"]["queued"] == 1


async def test_once_and_head(client: httpx.AsyncClient) -> None:
    """For polling: the state of this moment, and the end. HEAD has no end to wait for either."""
    answer = await client.get("/admin/events?once=true")
    assert json.loads(answer.text.removeprefix("data: "))["stats"]["worker"]["pid"] == 4711
    head = await client.head("/admin/events")
    assert (head.status_code, head.headers["content-type"]) == (200, answer.headers["content-type"])
    assert "content-length" not in head.headers  # a stream has none
    assert (await client.head("/admin/events?once=true")).headers["content-length"]


async def test_a_reader_that_leaves(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dashboard too many is a 429 that says when to try again, and a place is free once a dashboard has left."""
    monkeypatch.setattr(events, "MAX_SUBSCRIBERS", 1)
    async with client.stream("GET", "/admin/events") as answer:
        lines = answer.aiter_bytes()  # without a name it would be closed at once, and the connection with it
        await _next(lines)
        async with client.stream("GET", "/admin/events") as refused:
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert json.loads(await refused.aread())["error"]["code"] == "rate_limit_exceeded"

    async def watched() -> bool:
        async with client.stream("GET", "/admin/events") as answer:
            return answer.status_code == 200

    await until(watched)


@pytest.mark.slow
async def test_without_a_worker(tmp_path: Path) -> None:
    """The stream works, and says what is wrong."""
    async with (
        serving(f"ipc://{tmp_path}/none.ipc", ready=False) as client,
        client.stream("GET", "/admin/events") as answer,
    ):
        event = await _next(answer.aiter_bytes())
    assert event["problem"]
    assert (event["stats"], event["vram"], event["cleanup"]) == (None, None, None)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/events"),
        ("GET", "/admin/performance"),
        ("POST", "/admin/cleanup?trigger=true"),
        ("POST", "/admin/models/espeak-ng/unload"),
    ],
)
@pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"origin": "null"}])
async def test_pages_of_other_sites(
    client: httpx.AsyncClient, worker: FakeWorker, method: str, path: str, headers: dict[str, str]
) -> None:
    """The page of another site can neither watch nor do anything, even where no keys are configured."""
    answer = await client.request(method, path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert not worker.of(Call)


async def test_needs_an_admin_key(serve: Serve) -> None:
    """401 without a key, 403 with one that may only speak; a key in the address counts for nothing."""
    client = await serve(api_keys=["user"], admin_keys=["boss"])
    assert (await client.get("/admin/events")).status_code == 401
    assert (await client.get("/admin/events?key=boss")).status_code == 401
    assert (await client.get("/admin/events", headers={"authorization": "Bearer user"})).status_code == 403
    key = {"authorization": "Bearer boss"}
    async with client.stream("GET", "/admin/events", headers=key) as answer:
        assert await _next(answer.aiter_bytes())
