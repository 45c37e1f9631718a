"""The response to a speech request: its three forms, clients that disconnect, failures before and after the start."""

import asyncio
import base64
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import soundfile

from shared.pcm import seconds_of
from shared.protocol import Cancel, Credit, Failed, Segment, Speak
from tests.audio import decode, peak
from tests.fakes import FakeWorker, tone
from tests.server.running import SHARED_LOOP, SPEECH, becomes, exchange, plain_client, responds, serving, until
from tests.system.service import stretched

pytestmark = SHARED_LOOP

LARGE = "qwen3-tts-1.7b-customvoice"

CANCELLED_WITHIN_S = 1.0
"""The request of a client that disconnects ends within 0.5 s; twice that, for a machine that others use as well."""


@pytest.fixture
def own_worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A FakeWorker for one test, which may stop it."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        yield fake


async def test_pcm_is_streamed_by_default(client: httpx.AsyncClient) -> None:
    """The worker's PCM arrives unchanged, without Content-Length and with the headers of the contract."""
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


@pytest.mark.slow
@pytest.mark.parametrize("rate", [8_000, 11_025, 24_000, 44_100])
@pytest.mark.parametrize("speed", [0.7, 1.0, 1.3])
async def test_pieces_of_pcm_are_whole_samples(
    client: httpx.AsyncClient, worker: FakeWorker, rate: int, speed: float
) -> None:
    """Clients take each chunk of the transfer and each event for samples; both ways are the whole answer's bytes."""
    worker.chunks = 20
    body = {"input": "One.[pause:75ms] Two.", "response_format": "pcm", "sample_rate": rate, "speed": speed}
    data = json.dumps(body).encode()
    head = f"POST {SPEECH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    _, headers, pieces = await exchange(client, head.encode() + data)
    *deltas, _ = _events((await client.post(SPEECH, json=body | {"stream_format": "sse"})).text)
    events = [base64.b64decode(delta["audio"]) for delta in deltas]
    assert headers["x-sample-rate"] == str(rate)
    for parts in (pieces, events):
        assert len(parts) > 3
        assert not [len(part) for part in parts if len(part) % 2]
    whole = (await client.post(SPEECH, json=body | {"stream": False})).content
    assert b"".join(pieces) == b"".join(events) == whole


async def test_a_whole_body(client: httpx.AsyncClient) -> None:
    """stream=false adds Content-Length, x-finish-reason and Server-Timing."""
    answer = await client.post(SPEECH, json={"input": "hello", "response_format": "wav", "stream": False})
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert len(answer.content.partition(b"LIST")[0]) == 44 + 3 * 3840
    assert answer.headers["x-finish-reason"] == "stop"
    assert answer.headers["server-timing"] == "queue;dur=1.0, load;dur=0.0, first_audio;dur=2.0, total;dur=3.0"


async def test_events(client: httpx.AsyncClient) -> None:
    """The deltas add up to the PCM; the last event is done, with the token counts."""
    body = {"input": "hello", "response_format": "pcm", "stream_format": "sse"}
    answer = await client.post(SPEECH, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *deltas, done = _events(answer.text)
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == b"".join(tone("hello", 3))
    usage = {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}
    assert done == {"type": "speech.audio.done", "usage": usage, "finish_reason": "stop"}


@pytest.mark.parametrize("text", ["…", "---\n", "*", "()", "\U0001f60a", '"', "!?", "<|im_end|>"])
async def test_a_text_without_anything_speakable_is_silence(
    client: httpx.AsyncClient, worker: FakeWorker, text: str
) -> None:
    """It is 100 ms of silence for every model, at any speed, marked in the header, and the GPU worker is not asked."""
    for form in ({"model": "espeak-ng"}, {"model": LARGE, "speed": 4.0}, {"stream": False, "speed": 0.25}):
        answer = await client.post(SPEECH, json={"input": text, "response_format": "pcm", **form})
        assert (answer.status_code, answer.headers["x-finish-reason"]) == (200, "empty")
        assert answer.content == bytes(4800)
    answer = await client.post(SPEECH, json={"input": text, "response_format": "pcm", "stream_format": "sse"})
    delta, done = _events(answer.text)
    assert base64.b64decode(delta["audio"]) == bytes(4800)
    assert done["finish_reason"] == answer.headers["x-finish-reason"] == "empty"
    assert done["usage"] == {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    assert worker.of(Speak) == []


async def test_pauses_alone_are_as_long_as_they_say(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Streamed and whole; nothing was speakable all the same."""
    for stream in (False, True):
        body = {"input": "[pause:1.5s] … [pause:20ms]", "response_format": "pcm", "stream": stream, "speed": 2.0}
        answer = await client.post(SPEECH, json=body)
        assert answer.content == bytes(2 * 24 * 1520)
        assert answer.headers["x-finish-reason"] == "empty"
    assert worker.of(Speak) == []


async def test_pauses_reach_the_worker_and_keep_their_length(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The text goes to the worker in segments. Silence that the worker marks as a pause has its length at any speed."""
    body = {"input": "One.[pause:1.5s] Two.", "response_format": "pcm", "speed": 2.0}
    answer = await client.post(SPEECH, json=body)
    [speak] = worker.of(Speak)
    assert speak.segments == [Segment(text="One.", pause_ms=1500), Segment(text=" Two.")]
    assert len(answer.content) == 2 * (3 * 3840 // 2) + 72_000
    assert bytes(72_000) in answer.content


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_silence_opens_in_every_format(client: httpx.AsyncClient, *, stream: bool) -> None:
    """FFmpeg finds a tenth of a second of silence in each, and so does libsndfile where it knows the format."""
    for audio_format in ("mp3", "opus", "aac", "flac", "wav", "pcm"):
        answer = await client.post(SPEECH, json={"input": "…", "response_format": audio_format, "stream": stream})
        pcm = decode(answer.content, audio_format)
        assert 0.08 <= seconds_of(pcm) < 0.2, audio_format  # AAC has packets of 43 ms
        assert peak(pcm) == 0
        if audio_format in {"mp3", "opus"} or (audio_format in {"wav", "flac"} and not stream):
            samples, rate = soundfile.read(io.BytesIO(answer.content))
            assert 0.08 <= len(samples) / rate < 0.2, audio_format


async def test_errors_come_before_silence(client: httpx.AsyncClient) -> None:
    """A blank text is an error, and so is a wrong field beside a text without anything speakable."""
    for body in ({"input": " \n\u200b"}, {"input": "…", "voice": "nobody"}, {"input": "…", "model": "nothing"}):
        answer = await client.post(SPEECH, json=body)
        assert answer.status_code in {400, 404}
        assert answer.json()["error"]["param"] in {"input", "voice", "model"}


async def test_many_chunks_cross_on_credit(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A response far longer than the first credit is complete, and the worker never gets more credit than chunks."""
    worker.chunks = 200
    answer = await client.post(SPEECH, json={"input": "long", "response_format": "pcm"})
    assert answer.content == b"".join(tone("long", 200))
    assert sum(credit.chunks for credit in worker.of(Credit)) <= 200


@pytest.mark.slow
async def test_concurrent_responses_are_not_mixed_up(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Each of forty concurrent requests gets its own speech."""
    worker.chunks = 30
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


async def test_a_refusal_is_a_status(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A refusal by the worker is a status in every form, with the right Retry-After and x-should-retry."""
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


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
async def test_a_failure_after_the_first_byte_breaks_the_transfer(
    client: httpx.AsyncClient, worker: FakeWorker, *, http2: bool
) -> None:
    """A client that reads bytes cannot take half a speech for a whole one; HTTP/2 resets the stream."""
    worker.chunks, worker.break_after = 10, 2
    worker.fail_with = Failed(id="", code="synthesis_failed", message="broke")
    async with plain_client(client.base_url, http1=not http2, http2=http2) as speaking:
        with pytest.raises(httpx.RemoteProtocolError, match="StreamReset" if http2 else "incomplete"):
            await speaking.post(SPEECH, json={"input": "hello", "response_format": "pcm"})
        # Only the one stream is broken: HTTP/2 keeps the connection.
        assert (await speaking.get("/health")).status_code == httpx.codes.OK


async def _read(answer: httpx.Response, parts: list[str]) -> None:
    """Put the text of `answer` into `parts` as it comes."""
    async for part in answer.aiter_text():
        parts.append(part)


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
async def test_a_failure_after_the_first_event_is_an_event_and_breaks_the_transfer(
    client: httpx.AsyncClient, worker: FakeWorker, *, http2: bool
) -> None:
    """An SSE client gets the error in OpenAI's shape, as the last event; then the transfer breaks.

    A client that ignores the event must not take half a speech for a whole one.
    """
    worker.chunks, worker.break_after = 10, 2
    worker.fail_with = Failed(id="", code="synthesis_failed", message="broke")
    body = {"input": "hello", "response_format": "pcm", "stream_format": "sse"}
    parts: list[str] = []
    async with (
        plain_client(client.base_url, http1=not http2, http2=http2) as speaking,
        speaking.stream("POST", SPEECH, json=body) as answer,
    ):
        with pytest.raises(httpx.RemoteProtocolError if http2 else httpx.ReadError):  # a reset of stream or connection
            await _read(answer, parts)
    events = _events("".join(parts))
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 2 + ["speech.audio.error"]
    assert events[-1]["error"] == {
        "message": "broke",
        "type": "server_error",
        "param": None,
        "code": "synthesis_failed",
    }


async def test_a_gap_in_the_audio_breaks_the_transfer(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A lost message is an error, never a click, and the request is cancelled at the worker."""
    worker.chunks, worker.skip_seq = 40, True
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post(SPEECH, json={"input": "hello", "response_format": "pcm"})
    worker.wait_for(Cancel)


async def test_queued_events_are_kept_alive(
    client: httpx.AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the request is queued, an SSE client gets comments."""
    monkeypatch.setattr("server.routes.speech_response.SSE_GRACE_S", 0.01)
    monkeypatch.setattr("server.routes.speech_response.KEEPALIVE_S", 0.01)
    worker.hold = True
    body = {"input": "hello", "response_format": "pcm", "stream_format": "sse"}
    async with client.stream("POST", SPEECH, json=body) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == ": keepalive"
        worker.hold = False
        rest = [line async for line in lines]
    assert _events("\n".join(rest))[-1]["type"] == "speech.audio.done"


async def test_the_sdk_does_not_retry_missing_weights(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """OpenAI's SDK raises the error for missing weights at once, without its two retries."""
    worker.fail_with = Failed(id="", code="model_unavailable", message="no weights", param="model", retry_after_s=60)
    sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    assert sdk.max_retries > 0
    async with asyncio.timeout(10), sdk:
        with pytest.raises(openai.InternalServerError, match="no weights") as caught:
            await sdk.audio.speech.create(model="tts-1", voice="alloy", input="hello")
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("model_unavailable", "60")
    assert len(worker.of(Speak)) == 1


async def test_http_1_0_is_streamed(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The body ends with the connection, which ends normally, and begins before all is said."""
    head, body = await _http_1_0(client, response_format="pcm")
    assert " 200 " in head.splitlines()[0]
    assert not {"transfer-encoding", "content-length"} & {line.partition(":")[0] for line in head.lower().splitlines()}
    assert body == b"".join(tone("hello", 3))
    head, body = await _http_1_0(client, response_format="pcm", stream_format="sse")
    assert b"speech.audio.done" in body
    worker.chunks = 100_000
    reader, writer = await _ask_with_http_1_0(client, response_format="pcm")
    assert b" 200 " in await reader.readline()
    writer.close()
    await asyncio.to_thread(worker.wait_for, Cancel)


async def test_http_1_0_sees_a_reset_after_a_failure(own_worker: FakeWorker) -> None:
    """All that came before the failure arrives; then the read fails, so the part is not taken for the whole."""
    own_worker.chunks = 10
    own_worker.break_after = 5
    own_worker.fail_with = Failed(id="", code="synthesis_failed", message="the device broke")
    async with serving(own_worker.url) as client:
        reader, writer = await _ask_with_http_1_0(client, response_format="pcm")
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5 * 3840) == b"".join(tone("hello", 5))
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        own_worker.break_after = own_worker.fail_with = None
        own_worker.chunks = 100_000
        reader, writer = await _ask_with_http_1_0(client, response_format="pcm")
        await reader.readuntil(b"\r\n\r\n")  # before that, it would be a 503 and a normal end
        await asyncio.to_thread(own_worker.stop)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_http_1_0_through_dockers_relay_gets_a_length(
    own_worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay on the gateway of a container would make a normal end of a reset, so the body is sent whole."""
    monkeypatch.setattr("server.http.connection_reset._default_gateways", lambda: {"127.0.0.1"})
    async with serving(own_worker.url) as client:
        head, body = await _http_1_0(client, response_format="wav")
        assert f"content-length: {len(body)}" in head.lower().splitlines()
        assert body[40:44] == (3 * 3840).to_bytes(4, "little")
        own_worker.chunks = 10
        own_worker.break_after = 5
        own_worker.fail_with = Failed(id="", code="synthesis_failed", message="the device broke")
        head, body = await _http_1_0(client, response_format="pcm")
    assert " 500 " in head.splitlines()[0]
    assert json.loads(body)["error"]["code"] == "synthesis_failed"


@pytest.mark.parametrize("form", [{}, {"stream": False}, {"stream_format": "sse"}])
async def test_disconnecting_while_queued_cancels(
    client: httpx.AsyncClient, worker: FakeWorker, form: dict[str, object]
) -> None:
    """If the client disconnects before the first audio, its request is cancelled at once, in every form."""
    worker.hold = True
    asking = asyncio.create_task(client.post(SPEECH, json={"input": "hello", **form}))
    await asyncio.to_thread(worker.wait_for, Speak)
    left = await _disconnect(asking)
    await becomes(lambda: worker.busy == 0)
    assert time.monotonic() - left < stretched(CANCELLED_WITHIN_S)
    assert [cancel.id for cancel in worker.of(Cancel)] == [worker.of(Speak)[0].id]


@pytest.mark.parametrize("form", [{}, {"stream_format": "sse"}])
async def test_disconnecting_within_a_stream_cancels(
    client: httpx.AsyncClient, worker: FakeWorker, form: dict[str, object]
) -> None:
    """If the client disconnects in the middle of a stream, its request is cancelled at once."""
    worker.chunks = 100_000
    async with client.stream("POST", SPEECH, json={"input": "x", "response_format": "pcm", **form}) as answer:
        await anext(answer.aiter_bytes())
    left = time.monotonic()
    await becomes(lambda: worker.busy == 0)
    assert time.monotonic() - left < stretched(CANCELLED_WITHIN_S)


async def test_disconnecting_before_a_whole_body_cancels(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """If the client disconnects before a whole body is sent, its request is cancelled."""
    worker.chunks = 100_000
    asking = asyncio.create_task(client.post(SPEECH, json={"input": "x", "response_format": "pcm", "stream": False}))
    await asyncio.to_thread(worker.wait_for, Credit)
    left = await _disconnect(asking)
    await becomes(lambda: worker.busy == 0)
    assert time.monotonic() - left < stretched(CANCELLED_WITHIN_S)


async def test_a_stalled_reader_stalls_its_request_only(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A client that reads nothing stalls its own request, with bounded memory, and no other one."""
    worker.chunks = 3_000
    body = {"input": "stalled", "response_format": "pcm"}
    async with client.stream("POST", SPEECH, json=body):
        worker.chunks = 30
        for _ in range(10):
            answer = await client.post(SPEECH, json={"input": "other", "response_format": "pcm"})
            assert answer.status_code == 200
        given = sum(credit.chunks for credit in worker.of(Credit) if credit.id == worker.of(Speak)[0].id)
        # 3,000 chunks are 11.5 MB; what the sockets' buffers take is about 4 MB.
        assert given < 2_000


async def test_the_worker_dies(own_worker: FakeWorker) -> None:
    """Streams break, new requests are refused at once, and the next worker is used as soon as it is there."""
    own_worker.chunks = 100_000
    async with serving(own_worker.url) as client:
        body = {"input": "x", "response_format": "pcm"}
        async with client.stream("POST", SPEECH, json=body) as answer:
            pieces = answer.aiter_bytes()
            await anext(pieces)
            await asyncio.to_thread(own_worker.stop)
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
        own_worker.chunks = 3
        own_worker.restart("boot-2")
        await until(lambda: responds(client, "/ready"))
        answer = await client.post(SPEECH, json=body)
        assert answer.content == b"".join(tone("x", 3))
        assert (await client.get("/admin/stats")).json()["worker"] == {
            "pid": 4711,
            "boot_id": "boot-2",
            "uptime_s": 12.5,
            "restarts": 1,
        }


def _events(text: str) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


async def _ask_with_http_1_0(
    client: httpx.AsyncClient, **fields: object
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection with HTTP/1.0 that has asked for speech."""
    body = json.dumps({"input": "hello", **fields}).encode()
    head = f"POST {SPEECH} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(head.encode() + body)
    return reader, writer


async def _http_1_0(client: httpx.AsyncClient, **fields: object) -> tuple[str, bytes]:
    """Head and body of a response over HTTP/1.0, read to the end of the connection."""
    reader, writer = await _ask_with_http_1_0(client, **fields)
    try:
        answer = await reader.read()
    finally:
        writer.close()
    answered, _, content = answer.partition(b"\r\n\r\n")
    return answered.decode(), content


async def _disconnect(asking: "asyncio.Task[httpx.Response]") -> float:
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    return time.monotonic()


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    async for _ in pieces:
        pass
