"""The contract of every EngineClient, with a fake GPU worker on a real socket: speech, calls, pings and losses."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from server.engine import WebProcess
from server.engine.client import PIECE_INTERVAL_S, EngineClient, Speech
from server.engine.outage import Outage, OutageFile
from server.http.errors import ApiError
from shared.protocol import (
    Append,
    Call,
    Cancel,
    Cleanup,
    CleanupPass,
    Credit,
    EndText,
    Failed,
    FindVoice,
    Hello,
    LimitName,
    Reload,
    Reply,
    SavedVoice,
    Speak,
    SpeechError,
)
from tests.fakes import FakeWorker, tone
from tests.server.engine.transports import TIMEOUT_S, TRANSPORTS, Open, a_speak, reason
from tests.server.running import becomes
from tests.system.service import stretched


@pytest.fixture(params=TRANSPORTS)
def connect(request: pytest.FixtureRequest) -> Open:
    """Opens a client of a GPU worker."""
    return TRANSPORTS[request.param]


@pytest_asyncio.fixture
async def client(worker: FakeWorker, connect: Open) -> AsyncIterator[EngineClient]:
    """A client that is connected to the worker."""
    async with connect(worker.url, "", timeout_s=TIMEOUT_S) as engine:
        await becomes(lambda: engine.unavailable() is None)
        yield engine


@pytest.mark.slow
async def test_refusals_are_reported_once(worker: FakeWorker, connect: Open) -> None:
    """The GPU worker learns of what a web process has refused by itself, and adds it up."""
    refused: Counter[LimitName] = Counter(recordings=2)
    async with connect(worker.url, "", timeout_s=TIMEOUT_S, web=WebProcess(limit_hits=refused)):
        await becomes(lambda: worker.snapshot.limit_hits == {"recordings": 2})
        refused["recordings"] += 1
        await becomes(lambda: worker.snapshot.limit_hits == {"recordings": 3})
    assert not refused


@pytest.mark.slow
async def test_the_catalogue_is_asked_for_again(client: EngineClient, worker: FakeWorker) -> None:
    """When an admin has emptied that cache, by whichever web worker."""
    worker.catalog = worker.catalog[:1]
    assert len(client.catalog) > 1
    worker.snapshot = msgspec.structs.replace(worker.snapshot, emptied={"catalog": 1})
    await becomes(lambda: len(client.catalog) == 1)
    await becomes(lambda: client.snapshot and client.snapshot.web_caches)
    assert client.snapshot
    assert client.snapshot.web_caches["catalog"].hits > 0


async def test_every_gpu_worker_takes_the_variables(client: EngineClient, worker: FakeWorker) -> None:
    """The one that is there, whose settings are known then, and one that comes later; none is told without any."""
    await client.use_variables({})
    assert not worker.of(Call)
    worker.on_call = lambda call, _payload: Reply(id=call.id, settings={"max_queue": 3})
    told = Reload(variables={"TTS_MAX_QUEUE": "3"})
    await client.use_variables(told.variables)
    assert [call.action for call in worker.of(Call)] == [told]
    assert client.worker_settings == {"max_queue": 3}
    worker.stop()
    worker.restart("boot-2")
    await becomes(lambda: [call.action for call in worker.of(Call)] == [told, told])


async def test_a_gpu_worker_that_refuses_the_variables(client: EngineClient, worker: FakeWorker) -> None:
    """It keeps its settings, and nobody else is held up."""
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="invalid_value", message="no")
    await client.use_variables({"TTS_MAX_QUEUE": "3"})
    assert client.worker_settings == worker.settings


async def test_chunks_come_in_order(client: EngineClient, worker: FakeWorker) -> None:
    """The chunks come in order, then None; then `finished` tells how the request ended."""
    speech = client.speak(a_speak())
    chunks = []
    while (chunk := await speech.chunk()) is not None:
        chunks.append(chunk)
    assert [chunk.pcm for chunk in chunks] == tone("hello", 3)
    assert {chunk.rate for chunk in chunks} == {1.0}
    assert speech.finished is not None
    assert speech.finished.usage.output_tokens == 3
    assert not worker.of(Cancel)
    for _ in range(2):
        speech.abort(ApiError("internal_error", "the encoder failed", param="speed"))
    await client.fresh_snapshot(0)
    error = SpeechError(code="internal_error", message="the encoder failed", param="speed")
    assert worker.of(Cancel) == [Cancel(id="r1", error=error)]


async def test_a_slow_consumer_holds_the_worker_back(client: EngineClient, worker: FakeWorker) -> None:
    """Credit is granted only for chunks that were taken, so memory holds at most the initial credit."""
    worker.chunks = 100
    speech = client.speak(a_speak())
    await client.fresh_snapshot(0)
    await client.fresh_snapshot(0)
    assert not worker.of(Credit)
    for _ in range(40):
        await speech.chunk()
    assert sum(credit.chunks for credit in await asyncio.to_thread(worker.wait_for, Credit, 10)) == 40


async def test_text_in_pieces(client: EngineClient, worker: FakeWorker) -> None:
    """The first piece leaves at once, later ones together; the end takes what is left. Text behind it is dropped."""
    speech = client.speak(msgspec.structs.replace(a_speak(), open=True, segments=[]))
    for piece in ("a", "b", "c"):
        speech.append(piece)
    appended = await asyncio.to_thread(worker.wait_for, Append, 2)
    assert [message.text for message in appended] == ["a", "bc"]
    speech.append("d", flush=True)
    speech.append("e")
    speech.end_text()
    speech.append("f")
    speech.end_text()
    chunks = [chunk async for chunk in _chunks(speech)]
    assert chunks == [*tone("a", 3), *tone("bc", 3), *tone("d", 3), *tone("e", 3)]
    assert [message.flush for message in worker.of(Append)] == [False, False, True, False]
    assert len(worker.of(EndText)) == 1


async def test_a_request_that_is_over_takes_no_text(client: EngineClient, worker: FakeWorker) -> None:
    """No message of it follows its end, whichever that is."""
    aborted, lost = (client.speak(msgspec.structs.replace(a_speak(number), open=True)) for number in (1, 2))
    await asyncio.to_thread(worker.wait_for, Speak, 2)
    for speech in (aborted, lost):
        speech.append("a")
        speech.append("b")
    aborted.abort()
    lost.fail(ApiError("worker_unavailable", "gone"))
    for speech in (aborted, lost):
        speech.append("c", flush=True)
        speech.end_text()
    await asyncio.sleep(3 * PIECE_INTERVAL_S)
    await client.fresh_snapshot(0)
    assert {message.text for message in worker.of(Append)} == {"a"}
    assert not worker.of(EndText)


async def _chunks(speech: Speech) -> AsyncIterator[bytes]:
    while (chunk := await speech.chunk()) is not None:
        yield chunk.pcm


@pytest.mark.slow
async def test_without_a_worker(tmp_path: Path, connect: Open) -> None:
    """The client starts, gives a reason, and refuses every request at once."""
    async with connect(f"ipc://{tmp_path}/none.ipc", "", timeout_s=TIMEOUT_S) as engine:
        assert engine.unavailable() is not None
        assert engine.catalog == []
        began = time.monotonic()
        with pytest.raises(ApiError) as caught:
            engine.speak(a_speak())
        assert caught.value.code == "worker_unavailable"
        with pytest.raises(ApiError):
            await engine.call(Cleanup(), client="me", timeout_s=1)
        with pytest.raises(ApiError):
            await engine.fresh_snapshot(1)
        assert time.monotonic() - began < stretched(0.5)


@pytest.mark.slow
async def test_a_worker_may_start_later(tmp_path: Path, connect: Open) -> None:
    """Client and worker may start in any order."""
    fake = FakeWorker(tmp_path / "w.ipc")
    async with connect(fake.url, "", timeout_s=TIMEOUT_S) as engine:
        with fake:
            await becomes(lambda: engine.unavailable() is None)
            assert [spec.id for spec in engine.catalog] == [spec.id for spec in fake.catalog]
            assert engine.worker_settings == fake.settings


@pytest.mark.slow
async def test_a_dead_worker_fails_everything_in_flight(client: EngineClient, worker: FakeWorker) -> None:
    """Speeches and calls fail at once, the catalogue stays known, and the client connects to the next worker."""
    worker.hold = True
    speech = client.speak(a_speak())
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
    assert client.unavailable() is not None
    assert client.catalog
    worker.restart("boot-2")
    await becomes(lambda: client.unavailable() is None)
    assert client.snapshot is not None
    assert client.snapshot.boot_id == "boot-2"


@pytest.mark.slow
async def test_another_protocol_version_is_refused(tmp_path: Path, connect: Open) -> None:
    """Requests are refused where the worker has another protocol version."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        fake.version = 999
        async with connect(fake.url, "", timeout_s=TIMEOUT_S) as engine:
            await becomes(lambda: "version" in reason(engine))
            with pytest.raises(ApiError, match="999"):
                engine.speak(a_speak())


@pytest.mark.slow
async def test_a_wrong_token_is_a_reason(tmp_path: Path, connect: Open) -> None:
    """If the worker refuses the Hello, `unavailable` gives its message."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        fake.token = "right"  # noqa: S105 - a test's token
        async with connect(fake.url, "wrong", timeout_s=TIMEOUT_S) as engine:
            await becomes(lambda: "wrong token" in reason(engine))
            assert fake.of(Hello)[0].token == "wrong"  # noqa: S105 - a test's token


@pytest.mark.slow
async def test_the_supervisor_gives_the_reason(tmp_path: Path, connect: Open) -> None:
    """While no worker is there, reason and Retry-After are those of the outage file, within what clients obey."""
    url = f"ipc://{tmp_path}/none.ipc"
    async with connect(url, "", timeout_s=TIMEOUT_S) as engine:

        def shows(retry_after_s: float) -> bool:
            error: ApiError = engine.unavailable()
            near = pytest.approx(retry_after_s, abs=stretched(0.5))
            return error.message == "It died." and bool(error.retry_after_s == near)

        for back_in_s, retry_after_s in ((-3.0, 1.0), (12.0, 12.0), (600.0, 60.0)):
            OutageFile(url).write(Outage(reason="It died.", back_at=time.time() + back_in_s))
            await becomes(partial(shows, retry_after_s))
        (tmp_path / "none.ipc.outage").write_bytes(b"{")
        await becomes(lambda: "starting, or it has died" in reason(engine))


async def test_a_gap_is_an_error(client: EngineClient, worker: FakeWorker) -> None:
    """A missing sequence number fails the request and cancels it at the worker."""
    worker.skip_seq = True
    speech = client.speak(a_speak())
    assert await speech.chunk() is not None
    with pytest.raises(ApiError) as caught:
        await speech.chunk()
    assert caught.value.code == "synthesis_failed"
    await asyncio.to_thread(worker.wait_for, Cancel)


async def test_abort_is_synchronous_and_idempotent(client: EngineClient, worker: FakeWorker) -> None:
    """Any number of aborts sends one Cancel; a consumer that still waits gets an ApiError."""
    worker.hold = True
    speech = client.speak(a_speak())
    await asyncio.to_thread(worker.wait_for, Speak)
    speech.abort()
    speech.abort()
    with pytest.raises(ApiError):
        await speech.chunk()
    await client.fresh_snapshot(0)
    assert [cancel.id for cancel in worker.of(Cancel)] == ["r1"]


async def test_closing_cancels(worker: FakeWorker, connect: Open) -> None:
    """Closing the client cancels the requests in flight at the worker."""
    worker.hold = True
    async with connect(worker.url, "", timeout_s=TIMEOUT_S) as engine:
        await becomes(lambda: engine.unavailable() is None)
        engine.speak(a_speak())
        await asyncio.to_thread(worker.wait_for, Speak)
    await asyncio.to_thread(worker.wait_for, Cancel)


async def test_calls_get_their_own_reply(client: EngineClient, worker: FakeWorker) -> None:
    """A Reply goes to the call with its id; a Failed raises an ApiError with its code."""
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


async def test_a_call_times_out(client: EngineClient, worker: FakeWorker) -> None:
    """A call without a reply fails after `timeout_s` and is cancelled at the worker."""
    worker.on_call = lambda call, _payload: Failed(id="someone else", code="x", message=call.id)
    with pytest.raises(ApiError) as caught:
        await client.call(Cleanup(), client="me", timeout_s=0.05)
    assert caught.value.code == "worker_unavailable"
    [cancel] = await asyncio.to_thread(worker.wait_for, Cancel)
    assert cancel.id == worker.of(Call)[0].id


async def test_a_cancelled_call_is_cancelled_at_the_worker(client: EngineClient, worker: FakeWorker) -> None:
    """A call whose caller was cancelled sends a Cancel; a call that was answered sends none."""
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


@pytest.mark.slow
async def test_the_snapshot_is_kept_fresh(client: EngineClient, worker: FakeWorker) -> None:
    """Regular pings renew `snapshot`; `fresh_snapshot` pings at once."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, running=3)
    assert (await client.fresh_snapshot(0)).running == 3
    worker.snapshot = msgspec.structs.replace(worker.snapshot, running=4)
    await becomes(lambda: client.snapshot is not None and client.snapshot.running == 4)
