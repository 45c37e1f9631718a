"""The conversation with the GPU worker, over the real socket: meeting, losing and distrusting it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from server.engine.client import INITIAL_CREDIT
from server.engine.zmq import LOST_AFTER_S, STALE_AFTER_S, ZmqEngineClient
from server.http.errors import ApiError
from shared.protocol import (
    Call,
    Cancel,
    Cleanup,
    CleanupPass,
    Credit,
    Failed,
    FindVoice,
    Hello,
    Reply,
    SavedVoice,
    Speak,
)
from tests.fakes import FakeWorker, tone
from tests.server.running import becomes
from tests.system.service import stretched


class Clock:
    """Time that passes when it is told to, beside the real one."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.monotonic() + self.ahead


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A GPU worker that speaks canned tones."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        yield fake


@pytest.fixture
def clock() -> Clock:
    """The client's clock."""
    return Clock()


@pytest_asyncio.fixture
async def client(worker: FakeWorker, clock: Clock) -> AsyncIterator[ZmqEngineClient]:
    """A client that has met the worker."""
    async with ZmqEngineClient(worker.url, "", clock=clock) as engine:
        await becomes(lambda: engine.trouble() is None)
        yield engine


def _request(number: int = 1) -> Speak:
    return Speak(
        id=f"r{number}", client="me", model="espeak-ng", task="CustomVoice", text="hello", credit=INITIAL_CREDIT
    )


async def test_speech_is_pulled(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """Started, then the sound in order, then None and how it ended."""
    speech = client.speak(_request())
    assert (await speech.started()).sample_rate == 24_000
    chunks = []
    while (chunk := await speech.chunk()) is not None:
        chunks.append(chunk)
    assert chunks == tone("hello", 3)
    assert speech.finished is not None
    assert speech.finished.usage.output_tokens == 3
    speech.abort()
    assert not worker.of(Cancel)


async def test_a_consumer_that_takes_nothing_holds_the_worker_back(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """Credit is granted only for what was taken, so at most the first credit waits in memory."""
    worker.chunks = 100
    speech = client.speak(_request())
    await speech.started()
    await client.fresh_snapshot(0)
    await client.fresh_snapshot(0)
    assert not worker.of(Credit)
    for _ in range(40):
        await speech.chunk()
    assert sum(credit.chunks for credit in await asyncio.to_thread(worker.wait_for, Credit, 10)) == 40


async def test_before_there_is_a_worker(tmp_path: Path) -> None:
    """A client without a worker starts, says so, and refuses at once."""
    async with ZmqEngineClient(f"ipc://{tmp_path}/none.ipc", "") as engine:
        assert engine.trouble() is not None
        assert engine.catalog == []
        began = time.monotonic()
        with pytest.raises(ApiError) as caught:
            engine.speak(_request())
        assert caught.value.code == "worker_unavailable"
        with pytest.raises(ApiError):
            await engine.call(Cleanup(), client="me", timeout_s=1)
        with pytest.raises(ApiError):
            await engine.fresh_snapshot(1)
        assert time.monotonic() - began < stretched(0.5)


async def test_a_worker_that_comes_later_is_met(tmp_path: Path) -> None:
    """The order in which both start does not matter."""
    fake = FakeWorker(tmp_path / "w.ipc")
    async with ZmqEngineClient(fake.url, "") as engine:
        with fake:
            await becomes(lambda: engine.trouble() is None)
            assert [spec.id for spec in engine.catalog] == [spec.id for spec in fake.catalog]
            assert engine.worker_settings == fake.settings


async def test_death_fails_everything_in_flight(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """Speeches and calls fail at once, the catalogue stays known, and the next worker is met."""
    worker.hold = True
    speech = client.speak(_request())
    worker.on_call = lambda call, _payload: Failed(id="someone else", code="x", message=call.id)
    calling = asyncio.create_task(client.call(Cleanup(), client="me", timeout_s=30))
    await asyncio.to_thread(worker.wait_for, Call)
    began = time.monotonic()
    await asyncio.to_thread(worker.stop)
    with pytest.raises(ApiError) as caught:
        await speech.chunk()
    assert caught.value.code == "worker_unavailable"
    with pytest.raises(ApiError):
        await calling
    assert time.monotonic() - began < stretched(1)
    assert client.trouble() is not None
    assert client.catalog
    worker.restart("boot-2")
    await becomes(lambda: client.trouble() is None)
    assert client.snapshot is not None
    assert client.snapshot.boot_id == "boot-2"


async def test_a_worker_of_another_version_is_not_used(tmp_path: Path) -> None:
    """Both sides talk only when they speak the same version."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        fake.version = 999
        async with ZmqEngineClient(fake.url, "") as engine:
            await becomes(lambda: "version" in (engine.trouble() or ""))
            with pytest.raises(ApiError, match="999"):
                engine.speak(_request())


async def test_a_wrong_token_is_told(tmp_path: Path) -> None:
    """A worker that refuses the Hello is trouble with a reason."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        fake.token = "right"  # noqa: S105 - a test's token
        async with ZmqEngineClient(fake.url, "wrong") as engine:
            await becomes(lambda: "wrong token" in (engine.trouble() or ""))
            assert fake.of(Hello)[0].token == "wrong"  # noqa: S105 - a test's token


async def test_silence_refuses_new_requests(client: ZmqEngineClient, worker: FakeWorker, clock: Clock) -> None:
    """Without a Pong for five seconds the worker is not ready; with the next Pong it is again."""
    worker.mute = True
    await asyncio.to_thread(_one_more_ping_is_out, client)
    clock.ahead += STALE_AFTER_S + 0.1
    assert "has not answered" in (client.trouble() or "")
    with pytest.raises(ApiError) as caught:
        client.speak(_request())
    assert caught.value.code == "worker_unavailable"


async def test_long_silence_fails_what_is_in_flight(client: ZmqEngineClient, worker: FakeWorker, clock: Clock) -> None:
    """A worker that stays silent does not let requests hang, and is told to forget them."""
    worker.hold = worker.mute = True
    speech = client.speak(_request())
    await asyncio.to_thread(worker.wait_for, Speak)
    # In steps below a second: a jump would look like a pause of this process itself.
    while clock.ahead < LOST_AFTER_S + 1:
        clock.ahead += 0.5
        client._tick()
    with pytest.raises(ApiError) as caught:
        await speech.chunk()
    assert caught.value.code == "worker_unavailable"
    await asyncio.to_thread(worker.wait_for, Cancel)


async def test_a_pause_of_its_own_is_not_the_workers_silence(
    client: ZmqEngineClient, worker: FakeWorker, clock: Clock
) -> None:
    """After this process was stopped for long, requests in flight are not given up before the socket was read."""
    worker.hold = True
    speech = client.speak(_request())
    clock.ahead += LOST_AFTER_S + 60
    client._tick()
    await becomes(lambda: client.trouble() is None)
    client._tick()
    worker.hold = False
    assert await speech.chunk() is not None


async def test_a_gap_is_an_error(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """A sequence number that is missing fails the request and cancels it."""
    worker.skip_seq = True
    speech = client.speak(_request())
    assert await speech.chunk() is not None
    with pytest.raises(ApiError) as caught:
        await speech.chunk()
    assert caught.value.code == "synthesis_failed"
    await asyncio.to_thread(worker.wait_for, Cancel)


async def test_abort_is_synchronous_and_idempotent(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """One Cancel goes out however often it is said, and whoever still pulls is told."""
    worker.hold = True
    speech = client.speak(_request())
    speech.abort()
    speech.abort()
    client.abort("never heard of")
    with pytest.raises(ApiError):
        await speech.chunk()
    await client.fresh_snapshot(0)
    assert [cancel.id for cancel in worker.of(Cancel)] == ["r1"]


async def test_closing_cancels(worker: FakeWorker) -> None:
    """What is still being spoken when the web worker ends is not spoken on."""
    worker.hold = True
    async with ZmqEngineClient(worker.url, "") as engine:
        await becomes(lambda: engine.trouble() is None)
        engine.speak(_request())
        await asyncio.to_thread(worker.wait_for, Speak)
    await asyncio.to_thread(worker.wait_for, Cancel)


async def test_calls_are_answered(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """A Reply answers its own call, a Failed raises with the worker's code."""
    done = CleanupPass(timestamp=1.0, vram_before_bytes=2, vram_after_bytes=1, models_checked=[], models_unloaded=[])
    voice = SavedVoice(id="v", name="V", kind="clone", created_at=1, seconds=2.0, in_context=True)
    worker.on_call = lambda call, _payload: (
        Reply(id=call.id, cleanup=done) if isinstance(call.action, Cleanup) else Reply(id=call.id, voice=voice)
    )
    cleaned, found = await asyncio.gather(
        client.call(Cleanup(), client="me", timeout_s=5), client.call(FindVoice(name="v"), client="me", timeout_s=5)
    )
    assert cleaned.cleanup == done
    assert found.voice == voice
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="model_busy", message="busy", retry_after_s=4)
    with pytest.raises(ApiError) as caught:
        await client.call(Cleanup(), client="me", timeout_s=5)
    assert (caught.value.status, caught.value.retry_after_s) == (409, 4)


async def test_a_call_that_nobody_answers_ends(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """After its own time a call fails; it never hangs."""
    worker.on_call = lambda call, _payload: Failed(id="someone else", code="x", message=call.id)
    with pytest.raises(ApiError) as caught:
        await client.call(Cleanup(), client="me", timeout_s=0.05)
    assert caught.value.code == "worker_unavailable"
    [cancel] = await asyncio.to_thread(worker.wait_for, Cancel)
    assert cancel.id == worker.of(Call)[0].id


async def test_a_call_that_is_given_up_is_told(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """The worker hears that nobody waits for a call any more; of one that was answered it hears nothing."""
    worker.on_call = lambda call, _payload: Failed(id="someone else", code="x", message=call.id)
    calling = asyncio.create_task(client.call(Cleanup(), client="me", timeout_s=30))
    await asyncio.to_thread(worker.wait_for, Call)
    calling.cancel()
    [cancel] = await asyncio.to_thread(worker.wait_for, Cancel)
    assert cancel.id == worker.of(Call)[0].id
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="model_busy", message="busy")
    with pytest.raises(ApiError):
        await client.call(Cleanup(), client="me", timeout_s=30)
    await client.fresh_snapshot(0)
    assert len(worker.of(Cancel)) == 1


async def test_the_snapshot_is_kept_fresh(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """Pings bring what the worker says about itself without anyone asking; `fresh_snapshot` asks now."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, running=3)
    assert (await client.fresh_snapshot(0)).running == 3
    worker.snapshot = msgspec.structs.replace(worker.snapshot, running=4)
    await becomes(lambda: client.snapshot is not None and client.snapshot.running == 4)


async def test_an_answer_under_way_is_not_fresh(client: ZmqEngineClient, worker: FakeWorker) -> None:
    """What the worker said before it was asked is not taken for its answer, though it arrives later."""
    worker.late = True
    await becomes(lambda: worker.pongs)
    worker.snapshot = msgspec.structs.replace(worker.snapshot, running=3)
    asking = asyncio.create_task(client.fresh_snapshot(0))
    await asyncio.sleep(0)  # the question is asked
    worker.late = False
    assert (await asking).running == 3


def _one_more_ping_is_out(client: ZmqEngineClient) -> None:
    deadline = time.monotonic() + 10
    while not client._ping_out:
        assert time.monotonic() < deadline, "no ping was sent"
        time.sleep(0.01)  # between two looks at another thread
