"""Requests that granian refuses before the application sees them, as the API's description names them, and others."""

import asyncio
import json
from typing import Any, Final

import httpx
import pytest

from tests.server.running import HANDSHAKE, SHARED_LOOP, SPEECH, Serve, plain_client

pytestmark = SHARED_LOOP

HOST: Final = b"Host: 127.0.0.1\r\nConnection: close\r\n"
POST: Final = b"POST %s HTTP/1.1\r\nContent-Type: application/json\r\n" % SPEECH.encode() + HOST

BARE: Final[dict[str, tuple[int, bytes]]] = {
    "no request line": (400, b"hello\r\n\r\n"),
    "a method that is no token": (400, b"G@T /health HTTP/1.1\r\n" + HOST + b"\r\n"),
    "TLS on a plain port": (400, bytes.fromhex("16030100c8010000c403")),
    "another version": (400, b"GET /health HTTP/3.0\r\n" + HOST + b"\r\n"),
    "a header without a colon": (400, b"GET /health HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n"),
    "a NUL in a header": (400, b"GET /health HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n"),
    "two lengths": (400, POST + b"Content-Length: 14\r\nContent-Length: 15\r\n\r\n"),
    "a length that is no number": (400, POST + b"Content-Length: abc\r\n\r\n"),
    "an unknown transfer encoding": (400, POST + b"Transfer-Encoding: gzip\r\n\r\n"),
    "a long URI": (414, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "large headers": (431, b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 140_000 + b"\r\n\r\n"),
    "many headers": (431, b"GET /health HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 150 + b"\r\n"),
}
"""Requests that granian's HTTP library answers by itself, and with which status."""

OURS: Final[dict[str, tuple[int, str, bytes]]] = {
    "malformed chunks": (400, "invalid_body", POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "a URI just short enough": (404, "not_found", b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an unknown method": (405, "method_not_allowed", b"FOO /health HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method in lower case": (405, "method_not_allowed", b"get /health HTTP/1.1\r\n" + HOST + b"\r\n"),
    "CONNECT": (405, "method_not_allowed", b"CONNECT x:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "OPTIONS *": (404, "not_found", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a malformed escape": (404, "not_found", b"GET /%zz HTTP/1.1\r\n" + HOST + b"\r\n"),
}
"""Odd requests that reach the application: status and code of the answer."""


async def _answer(client: httpx.AsyncClient, request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Send `request` as it is and read until the server closes the connection: status, headers and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        writer.write(request)
        async with asyncio.timeout(20):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    status, *headers = head.split(b"\r\n")
    parted = [line.partition(b": ") for line in headers]
    return int(status.split()[1]), {name.lower(): value for name, _, value in parted}, body


@pytest.mark.slow
@pytest.mark.parametrize(("status", "request_"), BARE.values(), ids=BARE)
async def test_what_the_http_layer_refuses(client: httpx.AsyncClient, status: int, request_: bytes) -> None:
    """It is answered, with the status that the description names, with an empty body, and the service goes on."""
    got, headers, body = await _answer(client, request_)
    assert (got, body) == (status, b"")
    assert b"x-request-id" not in headers
    described = (await client.get("/openapi.json")).json()["info"]["description"]
    assert str(status) in described
    assert (await client.get("/health")).status_code == httpx.codes.OK


@pytest.mark.parametrize(("status", "code", "request_"), OURS.values(), ids=OURS)
async def test_odd_requests_get_the_usual_error(
    client: httpx.AsyncClient, status: int, code: str, request_: bytes
) -> None:
    """A bad request that reaches the application is refused in the shape of every error."""
    got, headers, body = await _answer(client, request_)
    assert (got, headers[b"content-type"]) == (status, b"application/json")
    assert json.loads(body)["error"]["code"] == code
    assert headers[b"x-request-id"]
    assert (b"allow" in headers) == (status == httpx.codes.METHOD_NOT_ALLOWED)


@pytest.mark.parametrize("missing", ["sec-websocket-key", "sec-websocket-version"])
async def test_a_malformed_handshake(client: httpx.AsyncClient, missing: str) -> None:
    """The HTTP layer refuses it with a sentence of plain text that names the header."""
    handshake = dict(HANDSHAKE)
    del handshake[missing]
    answer = await client.get("/nothing", headers=handshake)
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert missing in answer.text.lower()


@pytest.mark.slow
@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/nothing", {}, 404),
        ("/health", {}, 405),
        (SPEECH, {"content-type": "application/json"}, 413),
        (SPEECH, {"content-type": "application/json", "content-encoding": "gzip"}, 415),
    ],
)
async def test_a_client_that_is_still_sending_reads_its_refusal(
    serve: Serve, path: str, headers: dict[str, str], status: int, *, http2: bool
) -> None:
    """A body of 12 MB to a request that is refused by its head: the answer arrives, and no reset."""
    client = await serve(max_body_mb=1)

    async def body() -> Any:
        for _ in range(12):
            yield b" " * 1_000_000

    async with plain_client(client.base_url, http1=not http2, http2=http2) as sending:
        answer = await sending.post(path, content=body(), headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["code"]
        assert (await sending.get("/health")).status_code == httpx.codes.OK


async def test_expect_continue(client: httpx.AsyncClient) -> None:
    """A client that waits for 100 before it sends its body gets it, then the answer."""
    body = b'{"input": "hello"}'
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        writer.write(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        async with asyncio.timeout(20):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
            writer.write(body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    finally:
        writer.close()
