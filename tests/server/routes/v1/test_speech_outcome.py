"""GET /v1/audio/speech/{id}, and what the GPU worker is told of a response that its client has not received."""

import asyncio
import contextlib
from typing import Any

import httpx
import pytest
import structlog

from server.audio import Encoder
from server.engine import Chunk, Speech
from shared.protocol import (
    Call,
    Cancel,
    Failed,
    FindSpeech,
    Reply,
    Speak,
    SpeechError,
    SpeechOutcome,
    Spoken,
    Timings,
    Usage,
    speech_id_of,
)
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, Serve, becomes

pytestmark = SHARED_LOOP

TIMINGS = Timings(queue_s=0.1, load_s=0.0, first_audio_s=0.2, total_s=0.9)
DONE = SpeechOutcome(
    id="mine.5f",
    client="peer:127.0.0.1",
    status="done",
    model="espeak-ng",
    voice="en-us+f2",
    finish_reason="length",
    usage=Usage(input_tokens=2, output_tokens=3),
    timings=TIMINGS,
)
FORMS: list[dict[str, Any]] = [{}, {"stream": False}, {"stream_format": "sse"}]


class BrokenEncoder(Encoder):
    """Fails at the end of the speech."""

    def finish(self) -> bytes:
        """Fail."""
        raise RuntimeError


def outcomes(worker: FakeWorker, known: dict[str, SpeechOutcome]) -> list[FindSpeech]:
    """Let `worker` know these outcomes; the list of what it is asked."""
    asked: list[FindSpeech] = []

    def find(call: Call, _payload: bytes | None) -> Reply | Failed:
        assert isinstance(call.action, FindSpeech)
        asked.append(call.action)
        if call.action.id in known:
            return Reply(id=call.id, speech=known[call.action.id])
        return Failed(id=call.id, code="not_found", message="none of the last requests has this id")

    worker.on_call = find
    return asked


async def test_a_request_that_is_done(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Finish reason, usage and timings, under the id that the response had."""
    outcomes(worker, {"mine": DONE})
    answer = await client.get(f"{SPEECH}/mine")
    assert answer.status_code == 200
    assert answer.json() == {
        "id": "5f",
        "object": "audio.speech",
        "status": "done",
        "model": "espeak-ng",
        "voice": "en-us+f2",
        "finish_reason": "length",
        "usage": {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5},
        "timings": {"queue_s": 0.1, "load_s": 0.0, "first_audio_s": 0.2, "total_s": 0.9},
        "error": None,
        "queue_position": None,
    }


async def test_a_request_that_failed(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The error has the shape that every error has."""
    error = SpeechError(code="queue_full", message="3 requests wait", param="model")
    outcomes(worker, {"x": SpeechOutcome(id="x.1", client="", status="failed", model="m", voice="", error=error)})
    answer = (await client.get(f"{SPEECH}/x")).json()
    assert (answer["status"], answer["finish_reason"], answer["usage"]) == ("failed", None, None)
    assert answer["error"] == {
        "message": "3 requests wait",
        "type": "rate_limit_error",
        "param": "model",
        "code": "queue_full",
    }


@pytest.mark.parametrize("name", ["unknown", "..%2F..%2Fetc%2Fpasswd", "%00", "%F0%9F%A6%86", "a" * 5000, "x y", "%2e"])
async def test_an_id_that_nobody_has(client: httpx.AsyncClient, worker: FakeWorker, name: str) -> None:
    """Any id but a known one is a 404 in the usual shape."""
    outcomes(worker, {})
    answer = await client.get(f"{SPEECH}/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("form", FORMS)
async def test_every_response_names_its_speech(
    client: httpx.AsyncClient, worker: FakeWorker, form: dict[str, Any]
) -> None:
    """The request id is the client's own, and the speech id is of the server's making: 32 digits, never twice."""
    for _ in range(2):
        answer = await client.post(SPEECH, json={"input": "hello", **form}, headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
        assert len(answer.headers["x-speech-id"]) == 32
    first, second = worker.of(Speak)
    assert speech_id_of(first.id) != speech_id_of(second.id) == answer.headers["x-speech-id"]
    assert second.id == f"mine.{answer.headers['x-speech-id']}"
    assert not worker.of(Cancel)


@pytest.mark.parametrize("form", FORMS)
async def test_an_encoder_that_fails(
    client: httpx.AsyncClient, worker: FakeWorker, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU worker has sent all of it; it is told that the response failed, and by which code."""
    monkeypatch.setattr("server.routes.speech_start.Encoder", BrokenEncoder)
    try:
        answer = await client.post(SPEECH, json={"input": "hello", **form})
        assert answer.status_code == 500
    except httpx.RemoteProtocolError:
        assert form != {"stream": False}
    [cancel] = await asyncio.to_thread(worker.wait_for, Cancel)
    assert (cancel.id, cancel.error.code) == (worker.of(Speak)[0].id, "internal_error")


async def test_a_client_that_leaves_is_no_failure(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A Cancel without an error. The log says that the client left."""
    worker.chunks = 100_000
    with structlog.testing.capture_logs() as logs:
        async with client.stream("POST", SPEECH, json={"input": "x", "response_format": "pcm"}) as answer:
            await anext(answer.aiter_bytes())
        [cancel] = await asyncio.to_thread(worker.wait_for, Cancel)
        await becomes(lambda: logs)
    assert cancel.error is None
    assert [(line["event"], line["reason"]) for line in logs] == [("speech_broken_off", "client_gone")]


@pytest.mark.parametrize("form", [{}, {"stream_format": "sse"}])
async def test_the_log_says_why_a_stream_broke(
    client: httpx.AsyncClient, worker: FakeWorker, form: dict[str, Any]
) -> None:
    """The code of the error that the GPU worker has sent."""
    worker.chunks, worker.break_after = 10, 2
    worker.fail_with = Failed(id="", code="client_too_slow", message="it read nothing")
    with structlog.testing.capture_logs() as logs, contextlib.suppress(httpx.TransportError):
        await client.post(SPEECH, json={"input": "hello", **form})
    assert [line["reason"] for line in logs if line["event"] == "speech_broken_off"] == ["client_too_slow"]


async def test_a_client_that_leaves_when_all_was_sent(
    client: httpx.AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU worker is done, and the web worker has not passed on the last of it."""
    asked: list[Speech] = []
    next_chunk = Speech.chunk

    async def first_chunk_alone(speech: Speech) -> Chunk | None:
        asked.append(speech)
        if len(asked) > 1:
            await asyncio.Event().wait()  # until the client leaves
        return await next_chunk(speech)

    monkeypatch.setattr(Speech, "chunk", first_chunk_alone)
    async with client.stream("POST", SPEECH, json={"input": "x", "response_format": "pcm"}) as answer:
        parts = answer.aiter_bytes()  # an iterator that nothing holds closes the connection
        await anext(parts)
        await becomes(lambda: len(asked) > 1 and asked[0].finished)
        assert not worker.of(Cancel)
    [cancel] = await asyncio.to_thread(worker.wait_for, Cancel)
    assert cancel.error is None


async def test_a_text_without_anything_speakable(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The GPU worker does not speak it, and keeps its outcome all the same."""
    answer = await client.post(SPEECH, json={"input": "…", "voice": "alloy"})
    [spoken] = await asyncio.to_thread(worker.wait_for, Spoken)
    outcome = spoken.outcome
    assert speech_id_of(outcome.id) == answer.headers["x-speech-id"]
    assert (outcome.status, outcome.finish_reason, outcome.voice) == ("done", "empty", "en-us+f2")
    assert outcome.usage == Usage(input_tokens=0, output_tokens=0)


async def test_with_keys_a_client_sees_its_own_requests(serve: Serve, worker: FakeWorker) -> None:
    """A key is required, and the GPU worker is asked for that key's requests; without keys for everybody's."""
    asked = outcomes(worker, {"mine": DONE})
    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
    assert (await client.get(f"{SPEECH}/mine", headers={"authorization": "Bearer wrong"})).status_code == 401
    owners = set()
    for key in ("user-1", "user-2"):
        headers = {"authorization": f"Bearer {key}"}
        assert (await client.get(f"{SPEECH}/mine", headers=headers)).status_code == 200
        await client.post(SPEECH, json={"input": "hello"}, headers=headers)
        owners.add(asked[-1].client)
    assert owners == {speak.client for speak in worker.of(Speak)}
    assert len(owners) == 2
    await (await serve()).get(f"{SPEECH}/mine")
    assert asked[-1].client == ""
