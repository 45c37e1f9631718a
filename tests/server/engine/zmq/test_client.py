"""ZmqEngineClient against a fake GPU worker over the real socket: handshake, speech, calls, pings and losses."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import structlog

from server.engine.zmq import ZmqEngineClient
from server.engine.zmq.session import STALE_AFTER_S
from server.http.errors import ApiError
from shared.protocol import (
    Cancel,
    Failed,
    Hello,
    Segment,
    Speak,
)
from shared.sockets import MAX_MESSAGE_BYTES
from tests.fakes import FakeWorker
from tests.server.engine.transports import TIMEOUT_S, a_speak, reason
from tests.server.running import becomes


class Clock:
    """The real time, plus what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.monotonic() + self.ahead


@pytest.fixture
def clock() -> Clock:
    """The client's clock."""
    return Clock()


@pytest_asyncio.fixture
async def client(worker: FakeWorker, clock: Clock) -> AsyncIterator[ZmqEngineClient]:
    """A client that is connected to the worker."""
    async with ZmqEngineClient(worker.url, "", timeout_s=TIMEOUT_S, clock=clock) as engine:
        await becomes(lambda: engine.unavailable() is None)
        yield engine


def open_descriptors() -> int:
    """The number of open files and sockets of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_the_first_request_finds_the_worker(worker: FakeWorker) -> None:
    """A web worker that has just started refuses nothing while a GPU worker is there."""
    async with ZmqEngineClient(worker.url, "", timeout_s=TIMEOUT_S) as engine:
        assert engine.unavailable() is None
        engine.speak(a_speak())
        await becomes(lambda: worker.of(Speak))


async def test_without_a_worker_a_web_process_starts(tmp_path: Path) -> None:
    """It refuses requests, and says why."""
    async with ZmqEngineClient(f"ipc://{tmp_path}/nobody.ipc", "", timeout_s=TIMEOUT_S) as engine:
        assert "it is starting, or it has died" in reason(engine)


async def test_a_start_that_is_cancelled_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits for a GPU worker: no task goes on, and the socket is closed."""
    monkeypatch.setattr("server.engine.zmq.client._WELCOME_S", 60.0)
    descriptors = open_descriptors()
    client = ZmqEngineClient(f"ipc://{tmp_path}/nobody.ipc", "", timeout_s=TIMEOUT_S)
    starting = asyncio.create_task(client.__aenter__())
    await becomes(lambda: len(asyncio.all_tasks()) > len({starting, asyncio.current_task()}))
    starting.cancel()
    await asyncio.wait({starting})
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert open_descriptors() <= descriptors


async def test_a_pause_of_the_worker_costs_no_request(
    client: ZmqEngineClient, worker: FakeWorker, clock: Clock
) -> None:
    """After five seconds without a Pong the service is not ready; requests are still sent, and answered later."""
    worker.mute = True
    await asyncio.to_thread(_one_more_ping_is_out, client)
    clock.ahead += STALE_AFTER_S + 0.1
    assert "has not answered for 5 s; it is replaced after 20 s" in reason(client)
    speech = client.speak(a_speak())
    assert await speech.chunk() is not None
    clock.ahead += TIMEOUT_S
    with pytest.raises(ApiError) as caught:
        client.speak(a_speak(2))
    assert caught.value.code == "worker_unavailable"


async def test_long_silence_fails_what_is_in_flight(client: ZmqEngineClient, worker: FakeWorker, clock: Clock) -> None:
    """After the timeout without a Pong, requests fail and are cancelled at the worker."""
    worker.hold = worker.mute = True
    speech = client.speak(a_speak())
    await asyncio.to_thread(worker.wait_for, Speak)
    # In steps below a second: a jump would look like a pause of this process itself.
    while clock.ahead < TIMEOUT_S + 1:
        clock.ahead += 0.5
        client._tick()
    with pytest.raises(ApiError) as caught:
        await speech.chunk()
    assert caught.value.code == "worker_unavailable"
    await asyncio.to_thread(worker.wait_for, Cancel)


async def test_a_pause_of_this_process_is_not_silence(
    client: ZmqEngineClient, worker: FakeWorker, clock: Clock
) -> None:
    """After a pause of this process, requests do not fail before the waiting messages were read."""
    worker.hold = True
    speech = client.speak(a_speak())
    clock.ahead += TIMEOUT_S + 60
    client._tick()
    await becomes(lambda: client.unavailable() is None)
    client._tick()
    worker.hold = False
    assert await speech.chunk() is not None


async def test_an_ended_lease_is_a_lost_connection(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """The worker has cancelled the requests of a process that was stopped: they fail, and Hello is said again."""
    worker.hold = True
    speech = client.speak(a_speak())
    await asyncio.to_thread(worker.wait_for, Speak)
    said = len(worker.of(Hello))
    client._handle(Failed(id="", code="hello_expected", message="the lease has ended"), None)
    with pytest.raises(ApiError):
        await speech.chunk()
    await becomes(lambda: client.unavailable() is None)
    assert len(worker.of(Hello)) > said


async def test_a_mistake_of_ours_ends_no_task(
    client: ZmqEngineClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged. The next message is handled, the next ping is sent, and the loss of the worker is seen."""
    failing = {"_record_snapshot", "tick", "disconnect"}

    def fail_once(name: str) -> Any:
        method = getattr(client._session, name)

        def fails(*arguments: Any) -> Any:
            if name in failing:
                failing.remove(name)
                raise KeyError(name)
            return method(*arguments)

        return fails

    for name in sorted(failing):
        monkeypatch.setattr(client._session, name, fail_once(name))
    with structlog.testing.capture_logs() as logs:
        await becomes(lambda: failing == {"disconnect"})
        assert (await client.fresh_snapshot(0)).boot_id == "boot-1"
        worker.stop()
        await becomes(lambda: not failing)
        worker.restart("boot-2")
        await becomes(lambda: client.snapshot and client.snapshot.boot_id == "boot-2")
    events = [line["event"] for line in logs if line["log_level"] == "error"]
    assert sorted(events) == ["worker_event_not_handled", "worker_message_not_handled", "worker_tick_failed"]


async def test_a_mistake_of_ours_fails_its_request_alone(
    client: ZmqEngineClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for ever for what is lost. The worker is told, and others are spoken."""
    worker.hold = True
    lost, other = client.speak(a_speak(1)), client.speak(a_speak(2))

    def fails(*_arguments: Any) -> None:
        raise KeyError("one")

    monkeypatch.setattr(lost, "receive", fails)
    worker.hold = False
    with pytest.raises(ApiError) as caught:
        await lost.chunk()
    assert caught.value.code == "internal_error"
    while await other.chunk() is not None:
        pass
    assert [cancel.id for cancel in await asyncio.to_thread(worker.wait_for, Cancel)] == ["r1"]


async def test_a_message_that_is_too_large_costs_no_other_request(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """It is refused here: the GPU worker would cut the connection, and with it every stream."""
    worker.hold = True
    speech = client.speak(a_speak())
    await asyncio.to_thread(worker.wait_for, Speak)
    segments = [Segment(text="x" * MAX_MESSAGE_BYTES)]
    with pytest.raises(ApiError, match="more than 16777216 bytes") as caught:
        client.speak(msgspec.structs.replace(a_speak(2), segments=segments))
    assert caught.value.code == "internal_error"
    worker.hold = False
    while await speech.chunk() is not None:
        pass


async def test_a_pong_to_an_older_ping_is_not_fresh(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """`fresh_snapshot` ignores a Pong that arrives later but answers a ping from before the call."""
    worker.late = True
    await becomes(lambda: worker.pongs)
    worker.snapshot = msgspec.structs.replace(worker.snapshot, running=3)
    asking = asyncio.create_task(client.fresh_snapshot(0))
    await asyncio.sleep(0)  # `asking` runs until it waits
    worker.late = False
    assert (await asking).running == 3


@pytest.mark.slow
async def test_a_slow_step_of_the_worker_costs_no_figures(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """A CPU may need more than a second for a step, and answers behind it."""
    worker.late = True
    asking = asyncio.create_task(client.fresh_snapshot(0))
    await asyncio.wait({asking}, timeout=1.2)
    worker.late = False
    assert (await asking).boot_id == worker.snapshot.boot_id


def _one_more_ping_is_out(client: ZmqEngineClient) -> None:
    deadline = time.monotonic() + 10
    while not client._session._ping_out:
        assert time.monotonic() < deadline, "no ping was sent"
        time.sleep(0.01)  # the other thread runs meanwhile
