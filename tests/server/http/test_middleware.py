"""Rules for every request, whatever its path: ids, HEAD, bodies that stall, refusals that arrive and are logged."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import httpx
import msgspec
import pytest
import structlog

from server.app import create_app
from server.routes import docs
from shared.protocol import Failed
from shared.settings import Settings
from tests.fakes import FakeWorker
from tests.server.running import HANDSHAKE, SHARED_LOOP, SPEECH, VOICES, Serve, plain_client, responds, until

pytestmark = SHARED_LOOP

JSON = {"content-type": "application/json"}
HEAD = f"POST {SPEECH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


async def _raw(client: httpx.AsyncClient, request: str) -> tuple[int, Any]:
    """Send `request` as it is and read until the server closes the connection; status and error of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        writer.write(request.encode())
        async with asyncio.timeout(30):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int(head.split()[1]), json.loads(body)["error"]


async def _is_limited(client: httpx.AsyncClient) -> bool:
    """Whether a request gets the 429 of an address that has too many, whatever its headers say."""
    answer = await client.get("/health", headers={"x-forwarded-for": "127.0.0.1"})
    if answer.status_code == httpx.codes.OK:
        return False
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    return int(answer.headers["retry-after"]) >= 1


async def _counts_refusals(client: httpx.AsyncClient) -> bool:
    """Whether /metrics has counted a request of an address that has too many."""
    lines = (await client.get("/metrics")).text.splitlines()
    (count,) = (
        line.split()[1] for line in lines if line.startswith('tts_limit_hits_total{limit="requests_of_address"')
    )
    return float(count) > 0


async def test_request_ids(client: httpx.AsyncClient) -> None:
    """A sane id of the client's is used, another one is replaced; errors have an id, too."""
    assert (await client.get("/", headers={"x-request-id": "abc-1.2"})).headers["x-request-id"] == "abc-1.2"
    replaced = (await client.get("/none", headers={"x-request-id": "a b"})).headers["x-request-id"]
    assert len(replaced) == 32


@pytest.mark.slow
@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
async def test_head_is_get_without_a_body(client: httpx.AsyncClient, *, http2: bool) -> None:
    """HEAD has the status, type and length of GET and no body; a path without GET has no HEAD."""
    pages = ("/", "/health", "/ready", "/docs", "/redoc", "/openapi.json", "/metrics", "/docs/static/swagger-ui.css")
    lists = ("/v1/models", "/v1/models/espeak-ng", "/v1/audio/models", VOICES, "/v1/test", "/nothing")
    administration = ("/admin/config", "/admin/stats", "/admin/vram")
    async with plain_client(client.base_url, http1=not http2, http2=http2) as asking:
        for path in (*pages, *lists, *administration):
            head, get = await asking.head(path), await asking.get(path)
            assert head.status_code == get.status_code, path
            assert head.content == b"", path
            assert head.headers["content-type"] == get.headers["content-type"]
            assert head.headers["x-request-id"]
            if path in {"/", "/docs", "/redoc", "/openapi.json", "/docs/static/swagger-ui.css", "/v1/models", VOICES}:
                assert head.headers["content-length"] == get.headers["content-length"]  # others change with the time
        assert (await asking.head(SPEECH)).status_code == 405
        assert (await asking.head(SPEECH)).headers["allow"] == (await asking.get(SPEECH)).headers["allow"]


@pytest.mark.parametrize("path", ["/nothing", SPEECH, "/health", f"{SPEECH}/batch"])
async def test_a_websocket_where_there_is_none(client: httpx.AsyncClient, path: str) -> None:
    """The handshake is answered with a 404 in the shape of every error, even where another method has an answer."""
    with structlog.testing.capture_logs() as logs:
        answer = await client.get(path, headers={**HANDSHAKE, "x-request-id": "ws-1"})
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "ws-1"
    assert answer.json()["error"]["code"] == "not_found"
    assert path in answer.json()["error"]["message"]
    (line,) = [line for line in logs if line["event"] == "request_refused"]
    assert (line["path"], line["status"]) == (path, 404)


async def test_a_compressed_body_is_refused(client: httpx.AsyncClient) -> None:
    """The answer is 415, not an error about the JSON."""
    body = gzip.compress(b'{"input": "hello"}')
    answer = await client.post(SPEECH, content=body, headers={**JSON, "content-encoding": "gzip"})
    plain = await client.post(SPEECH, json={"input": "hello"}, headers={"content-encoding": "identity"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert plain.status_code == 200


@pytest.mark.parametrize(("path", "status"), [(SPEECH, 413), ("/nothing", 404)])
async def test_a_refusal_of_a_client_that_asks_before_it_sends(
    client: httpx.AsyncClient, path: str, status: int
) -> None:
    """It gets the refusal in the place of the 100, and never sends its 40 MB."""
    expects = "Host: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 40000000\r\n\r\n"
    assert (await _raw(client, f"POST {path} HTTP/1.1\r\n{expects}"))[0] == status


@pytest.mark.slow
async def test_a_form_of_too_many_parts(client: httpx.AsyncClient) -> None:
    """The form is refused as too large; the client, which is still sending, can read that."""
    answer = await client.post(VOICES, files={f"part-{number}": b"x" for number in range(1_200)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("chunks", ["ZZ\r\n{}\r\n0\r\n\r\n", "2\r\n{}XX\r\n0\r\n\r\n"])
async def test_malformed_chunks(client: httpx.AsyncClient, chunks: str) -> None:
    """The client is still connected, and gets a 400."""
    status, error = await _raw(client, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{chunks}")
    assert (status, error["code"]) == (400, "invalid_body")


@pytest.mark.parametrize("path", [SPEECH, VOICES])
async def test_a_body_that_stalls(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A client that sends six bytes of fifty gets a 408, and the connection is closed."""
    kind = "application/json" if path == SPEECH else "multipart/form-data; boundary=x"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: 50\r\n\r\n"
    with monkeypatch.context() as impatient:
        impatient.setattr("server.http.open_requests.BODY_TIMEOUT_S", 0.1)
        status, error = await _raw(client, head + '{"inpu')
    assert (await client.post(SPEECH, json={"input": "hello"})).status_code == 200
    assert (status, error["code"]) == (408, "request_timeout")


async def test_a_body_that_drips(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte prolongs the time of a body by its own time only, so a client that drips gets a 408 as well."""
    head = f"{HEAD}Content-Length: 1000\r\n\r\n"
    monkeypatch.setattr("server.http.open_requests.BODY_TIMEOUT_S", 0.4)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(head.encode())
    answer = asyncio.create_task(reader.read())
    for _ in range(100):
        writer.write(b" ")
        await asyncio.wait({answer}, timeout=0.1)
        if answer.done():
            break
    writer.close()
    assert (await answer).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("path", [SPEECH, VOICES])
async def test_a_body_that_is_crowded_out(serve: Serve, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Where bodies take more memory than they may, the slowest gets a 429, and the others arrive.

    Of the slow one less arrives than of the fast one, which begins later, so it is slower on any machine.
    """
    monkeypatch.setattr("server.http.middleware._MAX_DRAIN_S", 0.1)
    client = await serve(body_buffer_mb=16)
    kind = "application/json" if path == SPEECH else "multipart/form-data; boundary=x"
    heads = [HEAD, f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"]
    fast, slow = [head.encode() + b"Connection: close\r\nContent-Length: 15000000\r\n\r\n" for head in heads]
    from_slow, to_slow = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    to_slow.write(slow + b" " * 5_000_000)
    from_fast, to_fast = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    to_fast.write(fast + b" " * 14_000_000)
    async with asyncio.timeout(60):
        refusal = await from_slow.read()
        to_fast.write(b'{"input": "hello"}'.rjust(1_000_000))
        answer = await from_fast.read()
    to_slow.close()
    to_fast.close()
    assert refusal.startswith(b"HTTP/1.1 429")
    assert b"\r\nretry-after: 5\r\n" in refusal
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.slow
async def test_too_many_requests_of_one_address(serve: Serve) -> None:
    """A second request of an address that may have one gets a 429; a trusted proxy has any number of them."""
    client = await serve(max_connections_per_address=1, trusted_proxies=["127.0.0.1"])
    writers = []
    for address in ("127.0.0.1", "127.0.0.1", "127.0.0.2"):
        _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port, local_addr=(address, 0))
        writer.write(f"{HEAD}Content-Length: 5\r\n\r\n{{".encode())
        writers.append(writer)
    transport = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    async with httpx.AsyncClient(base_url=client.base_url, transport=transport) as stranger:
        await until(lambda: _is_limited(stranger))
        await until(lambda: _counts_refusals(client))
        assert not await _is_limited(client)
        for writer in writers:
            writer.close()
        await until(lambda: responds(stranger, "/health"))


async def test_a_large_response_is_sent_in_parts(tmp_path: Path) -> None:
    """Granian keeps what it gets until the client has read it, so no part of a response is large."""
    app = create_app(Settings(worker_url=f"ipc://{tmp_path}/none"))
    parts: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            parts.append(message["body"])

    path = "/docs/static/redoc.standalone.js"
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    await app({**scope, "headers": [], "http_version": "1.1"}, AsyncMock(), send)  # type: ignore[typeddict-item]
    assert max(map(len, parts)) < 100_000
    assert b"".join(parts) == (Path(docs.__file__).parents[1] / "web/vendor/redoc.standalone.js").read_bytes()


@pytest.mark.parametrize(("path", "status"), [(SPEECH, 401), ("/nothing", 404), ("/health", 405)])
async def test_a_refusal_reaches_a_client_that_is_still_sending(serve: Serve, path: str, status: int) -> None:
    """If a request is refused before its body was read, the client reads the answer and sees no reset."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 500_000

    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
    assert (await client.post(path, content=pieces(), headers=JSON)).status_code == status


async def test_a_path_cannot_steer_the_terminal(client: httpx.AsyncClient) -> None:
    """Escape sequences and line ends in a path are logged in hexadecimal."""
    with structlog.testing.capture_logs() as logged:
        await client.get("/no%1B[2J%0Athing")
    assert [line["path"] for line in logged if line["event"] == "request_refused"] == ["/no%1B[2J%0Athing"]


async def test_polls_are_logged_once_a_change(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A client that polls writes one line for each new answer of 503, whatever others ask; requests for speech all."""

    async def poll(**changes: Any) -> None:
        worker.snapshot = msgspec.structs.replace(worker.snapshot, **changes)
        assert await responds(client, "/v1/audio/voices/none", 404)  # waits for a fresh snapshot
        for method in ("GET", "HEAD", "GET"):
            await client.request(method, "/ready")
            await client.get("/health")

    usual = worker.snapshot
    with structlog.testing.capture_logs() as logged:
        await poll(accepting=False)
        await poll(accepting=True, default_model="none")
        await poll(default_model=usual.default_model)
        await poll(accepting=False)
    lines = [(line["path"], line["code"]) for line in logged if line.get("status") == 503]
    assert lines == [("/ready", "shutting_down"), ("/ready", "model_unavailable"), ("/ready", "shutting_down")]
    with structlog.testing.capture_logs() as logged:
        for _ in range(2):
            worker.fail_with = Failed(id="", code="shutting_down", message="soon over")
            await client.post(SPEECH, json={"input": "x", "stream": False})
    assert [line["status"] for line in logged if line["event"] == "request_refused"] == [503, 503]


async def test_refusals_are_logged(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Each refusal has one line with request id, path and code, and without text, voice or key."""
    headers = {"x-request-id": "abc-1", "authorization": "Bearer sk-secret"}
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
