"""What holds for every request whatever its path: HEAD, bodies that are none, refusals that arrive and are logged."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from shared.protocol import Failed
from tests.fakes import FakeWorker
from tests.server.running import SPEECH, serving

JSON = {"content-type": "application/json"}
HEAD = f"POST {SPEECH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A GPU worker that speaks canned tones."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        yield fake


async def _raw(client: httpx.AsyncClient, request: str) -> tuple[int, Any]:
    """Status and error of the answer to `request`, sent as it is and read until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        writer.write(request.encode())
        async with asyncio.timeout(30):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int(head.split()[1]), json.loads(body)["error"]


async def test_head_is_get_without_a_body(worker: FakeWorker) -> None:
    """Monitors ask by HEAD: the same status, type and length, and no byte of a body; what has no GET has no HEAD."""
    paths = ["/", "/health", "/ready", "/docs", "/redoc", "/openapi.json", "/v1/models", "/v1/audio/voices", "/nothing"]
    async with serving(worker.url) as client:
        for path in paths:
            asked, got = await client.head(path), await client.get(path)
            assert asked.status_code == got.status_code, path
            assert asked.content == b"", path
            assert asked.headers["content-type"] == got.headers["content-type"]
            assert asked.headers["x-request-id"]
            if path != "/health":  # whose time may have another number of digits
                assert asked.headers["content-length"] == got.headers["content-length"]
        assert (await client.head(SPEECH)).status_code == 405


async def test_a_packed_body_is_refused(worker: FakeWorker) -> None:
    """Nothing here unpacks: 415 says so, where the bytes would otherwise be called no JSON."""
    async with serving(worker.url) as client:
        body = gzip.compress(b'{"input": "hello"}')
        answer = await client.post(SPEECH, content=body, headers={**JSON, "content-encoding": "gzip"})
        plain = await client.post(SPEECH, json={"input": "hello"}, headers={"content-encoding": "identity"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert plain.status_code == 200


async def test_a_refused_preflight_is_told_in_our_shape(worker: FakeWorker) -> None:
    """A page of a site that is not listed gets the envelope, and a listed one its permission."""
    asked = {"access-control-request-method": "POST"}
    async with serving(worker.url, cors_origins=["https://good.example"]) as client:
        refused = await client.options(SPEECH, headers={"origin": "https://evil.example", **asked})
        allowed = await client.options(SPEECH, headers={"origin": "https://good.example", **asked})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
    assert refused.headers["x-request-id"]
    assert allowed.status_code == 204


async def test_a_form_of_too_many_parts(worker: FakeWorker) -> None:
    """It is refused as too large, and the client that still sends its parts gets to read that."""
    async with serving(worker.url) as client:
        answer = await client.post("/v1/audio/voices", files={f"part-{number}": b"x" for number in range(1_200)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("chunks", ["ZZ\r\n{}\r\n0\r\n\r\n", "2\r\n{}XX\r\n0\r\n\r\n"])
async def test_malformed_chunks(worker: FakeWorker, chunks: str) -> None:
    """Who sends them is still there, and is told."""
    async with serving(worker.url) as client:
        status, error = await _raw(client, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{chunks}")
    assert (status, error["code"]) == (400, "invalid_body")


@pytest.mark.parametrize("path", [SPEECH, "/v1/audio/voices"])
async def test_a_body_that_stalls(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Six bytes of fifty hold no connection for ever: the client is told, and the connection is closed."""
    kind = "application/json" if path == SPEECH else "multipart/form-data; boundary=x"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: 50\r\n\r\n"
    async with serving(worker.url) as client:
        with monkeypatch.context() as impatient:
            impatient.setattr("server.http.middleware.BODY_TIMEOUT_S", 0.2)
            status, error = await _raw(client, head + '{"inpu')
        assert (await client.post(SPEECH, json={"input": "hello"})).status_code == 200
    assert (status, error["code"]) == (408, "request_timeout")


async def test_a_refusal_reaches_who_is_still_sending(worker: FakeWorker) -> None:
    """Whatever is refused before the body was read, the client reads an answer and not a reset connection."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 500_000

    async with serving(worker.url, api_keys=["key"]) as client:
        for path, status in ((SPEECH, 401), ("/nothing", 404), ("/health", 405)):
            assert (await client.post(path, content=pieces(), headers=JSON)).status_code == status


async def test_a_path_cannot_steer_the_terminal(worker: FakeWorker) -> None:
    """Escape sequences and line ends in a path are logged as they were sent: in hexadecimal."""
    async with serving(worker.url) as client:
        with structlog.testing.capture_logs() as logged:
            await client.get("/no%1B[2J%0Athing")
    assert [line["path"] for line in logged if line["event"] == "request_refused"] == ["/no%1B[2J%0Athing"]


async def test_refusals_are_logged(worker: FakeWorker) -> None:
    """One line for each: which request, where, what; never what was said or which key was shown."""
    headers = {"x-request-id": "abc-1", "authorization": "Bearer sk-secret"}
    async with serving(worker.url) as client:
        with structlog.testing.capture_logs() as logged:
            await client.post(SPEECH, json={"input": "the text", "voice": "the voice"}, headers=headers)
            worker.fail_with = Failed(id="", code="synthesis_failed", message="the text could not be spoken")
            await client.post(SPEECH, json={"input": "the text", "stream": False}, headers=headers)
            await client.get("/health")
    refused, failed = [line for line in logged if line["event"] == "request_refused"]
    assert refused == {
        "event": "request_refused",
        "log_level": "info",
        "request_id": "abc-1",
        "method": "POST",
        "path": SPEECH,
        "status": 400,
        "code": "voice_not_found",
    }
    assert (failed["log_level"], failed["status"], failed["code"]) == ("warning", 500, "synthesis_failed")
    assert not [word for word in ("the text", "the voice", "sk-secret") if word in str(logged)]
