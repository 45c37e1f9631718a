"""Speech over a real socket: the three forms of an answer, clients that leave, failures before and after the start."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import msgspec
import openai
import pytest

from shared.protocol import Cancel, Credit, Failed, Speak
from tests.fakes import FakeWorker, tone
from tests.server.running import SPEECH, answers, becomes, serving, until
from tests.system.service import stretched

LEFT_S = 1.0
"""Within 500 ms a client that leaves is forgotten; as long again for a machine that others use as well."""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A GPU worker that speaks canned tones."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        yield fake


async def test_pcm_is_streamed_by_default(worker: FakeWorker) -> None:
    """What the worker made arrives unchanged, without Content-Length and with the headers of the contract."""
    async with serving(worker.url) as client:
        answer = await client.post(SPEECH, json={"input": "hello", "response_format": "pcm"})
    assert answer.status_code == 200
    assert answer.content == b"".join(tone("hello", 3))
    assert answer.headers["content-type"] == "audio/pcm"
    assert "content-length" not in answer.headers
    assert answer.headers["x-sample-rate"] == "24000"
    assert answer.headers["x-model"] == "espeak-ng"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"]


async def test_a_whole_body_has_its_length_and_says_how_it_ended(worker: FakeWorker) -> None:
    """stream=false gives Content-Length, x-finish-reason and where the time went."""
    async with serving(worker.url) as client:
        answer = await client.post(SPEECH, json={"input": "hello", "response_format": "wav", "stream": False})
    assert int(answer.headers["content-length"]) == len(answer.content) == 44 + 3 * 3840
    assert answer.headers["x-finish-reason"] == "stop"
    assert answer.headers["server-timing"] == "queue;dur=1.0, load;dur=0.0, first_audio;dur=2.0, total;dur=3.0"


async def test_events_carry_the_audio_and_its_usage(worker: FakeWorker) -> None:
    """SSE: deltas that add up to the PCM, then done with the tokens; and nothing after that."""
    body = {"input": "hello", "response_format": "pcm", "stream_format": "sse"}
    async with serving(worker.url) as client:
        answer = await client.post(SPEECH, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *deltas, done = _events(answer.text)
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == b"".join(tone("hello", 3))
    usage = {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}
    assert done == {"type": "speech.audio.done", "usage": usage}


async def test_many_chunks_cross_on_credit(worker: FakeWorker) -> None:
    """An answer far longer than the first credit arrives whole, and the worker never had too much."""
    worker.chunks = 200
    async with serving(worker.url) as client:
        answer = await client.post(SPEECH, json={"input": "long", "response_format": "pcm"})
    assert answer.content == b"".join(tone("long", 200))
    assert sum(credit.chunks for credit in worker.of(Credit)) <= 200


async def test_concurrent_answers_are_not_mixed_up(worker: FakeWorker) -> None:
    """Forty requests at once each get their own speech."""
    worker.chunks = 30
    async with serving(worker.url) as client:
        texts = [f"text number {number}" for number in range(40)]
        asked = [client.post(SPEECH, json={"input": text, "response_format": "pcm"}) for text in texts]
        answers = await asyncio.gather(*asked)
    assert [answer.content for answer in answers] == [b"".join(tone(text, 30)) for text in texts]


REFUSALS = {
    "queue_full": (429, "rate_limit_error"),
    "insufficient_vram": (503, "server_error"),
    "model_unavailable": (503, "server_error"),
    "shutting_down": (503, "server_error"),
    "invalid_value": (400, "invalid_request_error"),
    "synthesis_failed": (500, "server_error"),
    "no_such_code": (500, "server_error"),
}


async def test_a_refusal_is_a_status(worker: FakeWorker) -> None:
    """What the worker refuses at once is a status in every form, with Retry-After or x-should-retry as it should be."""
    async with serving(worker.url) as client:
        for code, (status, kind) in REFUSALS.items():
            worker.fail_with = Failed(id="", code=code, message="no", param="input", retry_after_s=2.2)
            for form in ({}, {"stream": False}, {"stream_format": "sse"}):
                answer = await client.post(SPEECH, json={"input": "hello", **form})
                assert answer.status_code == status
                error = answer.json()["error"]
                assert error == {"message": "no", "type": kind, "param": "input", "code": code}
                assert answer.headers["content-type"] == "application/json"
                assert answer.headers.get("retry-after") == ("3" if status in {429, 503} else None)
                hopeless = status == 500 or code == "model_unavailable"
                assert answer.headers.get("x-should-retry") == ("false" if hopeless else None)


async def test_a_failure_after_the_first_byte_breaks_the_transfer(worker: FakeWorker) -> None:
    """A byte client never takes half a speech for a whole one."""
    worker.chunks, worker.break_after = 10, 2
    worker.fail_with = Failed(id="", code="synthesis_failed", message="broke")
    async with serving(worker.url) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(SPEECH, json={"input": "hello", "response_format": "pcm"})


async def test_a_failure_after_the_first_event_is_an_event(worker: FakeWorker) -> None:
    """An SSE client is told what happened, in OpenAI's shape of an error."""
    worker.chunks, worker.break_after = 10, 2
    worker.fail_with = Failed(id="", code="synthesis_failed", message="broke")
    body = {"input": "hello", "response_format": "pcm", "stream_format": "sse"}
    async with serving(worker.url) as client:
        events = _events((await client.post(SPEECH, json=body)).text)
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 2 + ["speech.audio.error"]
    assert events[-1]["error"] == {
        "message": "broke",
        "type": "server_error",
        "param": None,
        "code": "synthesis_failed",
    }


async def test_a_gap_in_the_sound_breaks_the_transfer(worker: FakeWorker) -> None:
    """A lost piece is an error, never a click, and the worker is told to stop."""
    worker.chunks, worker.skip_seq = 40, True
    async with serving(worker.url) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(SPEECH, json={"input": "hello", "response_format": "pcm"})
    worker.wait_for(Cancel)


async def test_queued_events_are_kept_alive(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the queue holds the request, an SSE client hears comments."""
    monkeypatch.setattr("server.http.speech_response.SSE_GRACE_S", 0.01)
    monkeypatch.setattr("server.http.speech_response.KEEPALIVE_S", 0.01)
    worker.hold = True
    body = {"input": "hello", "response_format": "pcm", "stream_format": "sse"}
    async with serving(worker.url) as client, client.stream("POST", SPEECH, json=body) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == ": keepalive"
        worker.hold = False
        rest = [line async for line in lines]
    assert _events("\n".join(rest))[-1]["type"] == "speech.audio.done"


async def test_the_sdk_does_not_wait_for_weights(worker: FakeWorker) -> None:
    """With its own two retries OpenAI's SDK tells of missing weights at once, and asks for them once."""
    worker.fail_with = Failed(id="", code="model_unavailable", message="no weights", param="model", retry_after_s=60)
    async with serving(worker.url) as client:
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none")
        assert sdk.max_retries > 0
        async with asyncio.timeout(10), sdk:
            with pytest.raises(openai.InternalServerError, match="no weights") as caught:
                await sdk.audio.speech.create(model="tts-1", voice="alloy", input="hello")
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("model_unavailable", "60")
    assert len(worker.of(Speak)) == 1


async def test_http_1_0_gets_a_length(worker: FakeWorker) -> None:
    """Without chunks a body of no known length cannot be seen to break: there it is whole, and says how long it is."""
    async with serving(worker.url) as client:
        head, body = await _http_1_0(client, response_format="wav")
        assert head.startswith("HTTP/1.")
        assert " 200 " in head.splitlines()[0]
        assert f"content-length: {len(body)}" in head.lower().splitlines()
        assert "transfer-encoding" not in head.lower()
        assert body[40:44] == (3 * 3840).to_bytes(4, "little")
        head, body = await _http_1_0(client, response_format="pcm", stream_format="sse")
        assert b"speech.audio.done" in body


async def test_http_1_0_sees_a_failure(worker: FakeWorker) -> None:
    """What fails in the middle is a status there, never a 200 that ends early and cleanly."""
    worker.chunks = 10
    worker.break_after = 5
    worker.fail_with = Failed(id="", code="synthesis_failed", message="the device broke")
    async with serving(worker.url) as client:
        head, body = await _http_1_0(client, response_format="pcm")
        assert " 500 " in head.splitlines()[0]
        assert json.loads(body)["error"]["code"] == "synthesis_failed"
        worker.break_after = worker.fail_with = None
        worker.chunks = 100_000
        asking = asyncio.create_task(_http_1_0(client, response_format="pcm"))
        await asyncio.to_thread(worker.wait_for, Credit)
        await asyncio.to_thread(worker.stop)
        head, body = await asking
    assert " 503 " in head.splitlines()[0]
    assert json.loads(body)["error"]["code"] == "worker_unavailable"


@pytest.mark.parametrize("form", [{}, {"stream": False}, {"stream_format": "sse"}])
async def test_a_client_that_leaves_the_queue_is_forgotten(worker: FakeWorker, form: dict[str, object]) -> None:
    """Whatever the form, a client that leaves before the first sound frees its place at once."""
    worker.hold = True
    async with serving(worker.url) as client:
        asking = asyncio.create_task(client.post(SPEECH, json={"input": "hello", **form}))
        await asyncio.to_thread(worker.wait_for, Speak)
        left = await _leave(asking)
        await becomes(lambda: worker.busy == 0)
    assert time.monotonic() - left < stretched(LEFT_S)
    assert [cancel.id for cancel in worker.of(Cancel)] == [worker.of(Speak)[0].id]


@pytest.mark.parametrize("form", [{}, {"stream_format": "sse"}])
async def test_a_client_that_leaves_a_stream_is_forgotten(worker: FakeWorker, form: dict[str, object]) -> None:
    """A client that leaves in the middle of a stream frees its place at once."""
    worker.chunks = 100_000
    async with serving(worker.url) as client:
        async with client.stream("POST", SPEECH, json={"input": "x", "response_format": "pcm", **form}) as answer:
            await anext(answer.aiter_bytes())
        left = time.monotonic()
        await becomes(lambda: worker.busy == 0)
    assert time.monotonic() - left < stretched(LEFT_S)


async def test_a_client_that_leaves_a_whole_body_is_forgotten(worker: FakeWorker) -> None:
    """Nothing has been sent yet, but the speech has begun: it ends when the client leaves."""
    worker.chunks = 100_000
    async with serving(worker.url) as client:
        asking = asyncio.create_task(
            client.post(SPEECH, json={"input": "x", "response_format": "pcm", "stream": False})
        )
        await asyncio.to_thread(worker.wait_for, Credit)
        left = await _leave(asking)
        await becomes(lambda: worker.busy == 0)
    assert time.monotonic() - left < stretched(LEFT_S)


async def test_a_reader_that_stalls_gets_no_more_than_its_credit(worker: FakeWorker) -> None:
    """A client that reads nothing stops its own request, bounded, while others are served."""
    worker.chunks = 3_000
    async with serving(worker.url) as client:
        body = {"input": "stalled", "response_format": "pcm"}
        async with client.stream("POST", SPEECH, json=body):
            worker.chunks = 30
            for _ in range(10):
                answer = await client.post(SPEECH, json={"input": "other", "response_format": "pcm"})
                assert answer.status_code == 200
            given = sum(credit.chunks for credit in worker.of(Credit) if credit.id == worker.of(Speak)[0].id)
            # 3,000 chunks are 11.5 MB; what the sockets' buffers take is about 4 MB.
            assert given < 2_000


async def test_the_worker_dies_in_the_middle(worker: FakeWorker) -> None:
    """Every stream in flight breaks, a new request is refused at once, and the next worker is used when it comes."""
    worker.chunks = 100_000
    async with serving(worker.url) as client:
        body = {"input": "x", "response_format": "pcm"}
        async with client.stream("POST", SPEECH, json=body) as answer:
            pieces = answer.aiter_bytes()
            await anext(pieces)
            await asyncio.to_thread(worker.stop)
            began = time.monotonic()
            with pytest.raises(httpx.RemoteProtocolError):
                await _drain(pieces)
            refused = await client.post(SPEECH, json=body)
            assert time.monotonic() - began < stretched(1)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "worker_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        began = time.monotonic()
        assert (await client.post(SPEECH, json=body)).status_code == 503
        assert time.monotonic() - began < stretched(0.2)
        worker.chunks = 3
        worker.restart("boot-2")
        await until(lambda: answers(client, "/ready"))
        answer = await client.post(SPEECH, json=body)
        assert answer.content == b"".join(tone("x", 3))
        assert (await client.get("/admin/stats")).json()["worker"] == {
            "pid": 4711,
            "boot_id": "boot-2",
            "uptime_s": 12.5,
            "restarts": 1,
        }


async def test_what_the_fields_mean_reaches_the_worker(worker: FakeWorker) -> None:
    """Names are resolved, defaults filled in, and the client is known by its address."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model="qwen3-tts-1.7b-customvoice")
    body = {"text": "hi", "speaker": "ALLOY", "instruct": "softly", "language": "en-GB", "seed": 7, "keep_alive": "5m"}
    async with serving(worker.url) as client:
        answer = await client.post(SPEECH, json={"model": "tts-1-hd", "nonsense": {"a": 1}, **body})
    assert answer.status_code == 200
    [speak] = worker.of(Speak)
    assert (speak.text, speak.voice, speak.instructions, speak.language) == ("hi", "ryan", "softly", "english")
    assert (speak.model, speak.task, speak.sampling.seed) == ("qwen3-tts-1.7b-customvoice", "CustomVoice", 7)
    assert (speak.keep_alive_s, speak.client) == (300.0, "peer:127.0.0.1")


def _events(text: str) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


async def _http_1_0(client: httpx.AsyncClient, **fields: object) -> tuple[str, bytes]:
    """Head and body of an answer to a client of HTTP/1.0, read to the end of the connection."""
    body = json.dumps({"input": "hello", **fields}).encode()
    head = f"POST {SPEECH} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        writer.write(head.encode() + body)
        answer = await reader.read()
    finally:
        writer.close()
    answered, _, content = answer.partition(b"\r\n\r\n")
    return answered.decode(), content


async def _leave(asking: "asyncio.Task[httpx.Response]") -> float:
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    return time.monotonic()


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    async for _ in pieces:
        pass
