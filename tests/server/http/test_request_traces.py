"""Spans of requests in a running web worker, and the context that the GPU worker gets."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from server.app import create_app
from server.http.middleware import HttpMiddleware
from shared.protocol import Failed, Speak
from shared.settings import Settings
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, VOICES, becomes, listening, plain_client, responds, until
from tests.server.sockets import STREAM, talk
from tests.spans import CLIENT, TRACE, TRACEPARENT, KeptTraces, attributes, parent_id, span_id, trace_id

pytestmark = SHARED_LOOP

PCM = {"type": "session.config", "response_format": "pcm"}
KEY = "sk-tts-secret-key"
TEXT = "A secret sentence."
HEADERS = {"authorization": f"Bearer {KEY}", "traceparent": TRACEPARENT, "x-request-id": "mine"}


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def app(shared_worker: FakeWorker) -> HttpMiddleware:
    """An application with a key."""
    return create_app(Settings(worker_url=shared_worker.url, api_keys=[KEY]))


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def running(app: HttpMiddleware) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the running application."""
    async with listening(app) as url, plain_client(url, headers=HEADERS) as client:
        await until(lambda: responds(client, "/ready"))
        yield client


@pytest.fixture
def kept(app: HttpMiddleware, running: httpx.AsyncClient, worker: FakeWorker) -> KeptTraces:
    """The spans of the application, from now on."""
    _ = running, worker
    kept = KeptTraces()
    app.app.state.traces = kept.traces
    return kept


async def _ended(kept: KeptTraces, count: int = 1) -> None:
    """A span ends a moment after its answer."""
    await becomes(lambda: len(kept.spans) >= count)


async def test_speech(kept: KeptTraces, running: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The client's span is the parent of the request's, and that one of what the GPU worker will make."""
    assert (await running.post(SPEECH, json={"input": TEXT})).status_code == 200
    await _ended(kept)
    span = kept.one(f"POST {SPEECH}")
    assert (trace_id(span), parent_id(span)) == (TRACE, CLIENT)
    assert attributes(span) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": SPEECH,
        "tts.request_id": "mine",
    }
    assert [event.name for event in span.events] == ["first_bytes"]
    assert span.status.is_ok
    (speak,) = worker.wait_for(Speak)
    assert speak.traceparent == f"00-{TRACE}-{span_id(span)}-01"


async def test_nothing_of_the_client_is_in_a_span(kept: KeptTraces, running: httpx.AsyncClient) -> None:
    """Neither text, key, voice nor path, whatever the request makes of them."""
    secrets = {"traceparent": "", "x-api-version": KEY, "tracestate": f"a={KEY}", "x-request-id": KEY}
    await running.post(SPEECH, json={"input": TEXT, "voice": "my-voice"})
    await running.post(SPEECH, json={"input": TEXT}, headers=secrets)
    await running.post(f"/{KEY}?key={KEY}", json={"input": TEXT})
    await running.request(f"{KEY}", SPEECH)
    await running.delete(f"{VOICES}/my-voice")
    await _ended(kept, 5)
    for secret in (KEY, TEXT, "secret", "my-voice"):
        assert secret not in kept.text()
    assert sorted(kept.names()) == [
        "DELETE /v1/audio/voices/{voice_id}",
        "POST",
        "POST",
        f"POST {SPEECH}",
        "_OTHER",
    ]


async def test_reading_is_not_traced(kept: KeptTraces, running: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Probes and scrapes come every second."""
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        assert (await running.get(path)).status_code == 200
    await running.head("/health")
    await running.post(SPEECH, json={"input": TEXT})
    await _ended(kept)
    assert kept.names() == [f"POST {SPEECH}"]
    assert worker.of(Speak)[0].traceparent


async def test_errors(kept: KeptTraces, running: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A refusal is no error of the service; a failure is."""
    await running.post(SPEECH, json={"input": ""})
    worker.fail_with = Failed(id="", code="synthesis_failed", message="m")
    await running.post(SPEECH, json={"input": TEXT})
    await _ended(kept, 2)
    told = [(attributes(span)["http.response.status_code"], span.status.is_ok) for span in kept.spans]
    assert told == [(400, True), (500, False)]


async def test_a_client_that_leaves(kept: KeptTraces, running: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The span ends, too."""
    worker.hold = True
    asked = asyncio.create_task(running.post(SPEECH, json={"input": TEXT}))
    await becomes(lambda: worker.of(Speak))
    asked.cancel()
    await _ended(kept)
    assert kept.names() == [f"POST {SPEECH}"]
    worker.hold = False


async def test_without_a_context(kept: KeptTraces, running: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Each request begins a trace of its own; one that the client does not keep reaches no one."""
    for context in ("", "nonsense", TRACEPARENT[:-2] + "00"):
        await running.post(SPEECH, json={"input": TEXT}, headers={"traceparent": context})
    await _ended(kept, 2)
    contexts = [speak.traceparent for speak in worker.wait_for(Speak, 3)]
    assert [context[3:35] for context in contexts] == [*map(trace_id, kept.spans), ""]
    assert len(set(contexts)) == 3


async def test_a_websocket(kept: KeptTraces, running: httpx.AsyncClient, worker: FakeWorker) -> None:
    """One span for the socket; each of its utterances is below that."""
    async with talk(running, additional_headers=HEADERS) as talking:
        await talking.say(PCM, {"type": "input.text", "text": TEXT}, {"type": "input.commit"})
        await talking.until("audio.done")
        await talking.say({"type": "input.text", "text": TEXT}, {"type": "input.done"})
        await talking.until("session.done")
    await _ended(kept)
    span = kept.one(f"GET {STREAM}")
    assert (trace_id(span), parent_id(span)) == (TRACE, CLIENT)
    contexts: set[Any] = {speak.traceparent for speak in worker.wait_for(Speak, 2)}
    assert contexts == {f"00-{TRACE}-{span_id(span)}-01"}
    assert "secret" not in kept.text()


async def test_off(app: HttpMiddleware, running: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Then the client's context goes nowhere."""
    app.app.state.traces = None
    await running.post(SPEECH, json={"input": TEXT})
    assert worker.wait_for(Speak)[0].traceparent == ""
