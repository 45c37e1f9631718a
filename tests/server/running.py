"""The web application on a real socket, in the event loop of a test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from granian.constants import Interfaces
from granian.server.embed import Server

from server.app import create_app
from server.http.errors import ApiError
from server.http.middleware import HttpMiddleware
from server.processes.web_workers import HTTP1, HTTP2
from shared.settings import Settings
from tests.ports import free_port

SPEECH = "/v1/audio/speech"
VOICES = "/v1/audio/voices"
HANDSHAKE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}
"""The headers of a WebSocket handshake."""

SHARED_LOOP = pytest.mark.asyncio(loop_scope="session")
"""The mark of the tests that use the fixtures of conftest.py."""

Serve = Callable[..., Awaitable[httpx.AsyncClient]]
"""The type of the fixture `serve`."""


@asynccontextmanager
async def serving(url: str, *, ready: bool = True, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a new application whose GPU worker is at `url`; by default, wait until the application is ready."""
    async with _client_of(create_app(Settings(worker_url=url, **settings)), "/ready" if ready else "/health") as client:
        yield client


@asynccontextmanager
async def _client_of(app: HttpMiddleware, path: str) -> AsyncIterator[httpx.AsyncClient]:
    async with listening(app) as base_url, plain_client(base_url) as client:
        await until(lambda: responds(client, path))
        yield client


def plain_client(base_url: str | httpx.URL, **options: Any) -> httpx.AsyncClient:
    """A client without TLS: reading the certificates of this machine would take longer than most tests."""
    return httpx.AsyncClient(base_url=base_url, timeout=20, verify=False, **options)  # noqa: S501 -- plain HTTP


class Services:
    """Running applications of one GPU worker: one for each configuration, started when a test first asks for it."""

    def __init__(self, stack: AsyncExitStack, url: str) -> None:
        self._stack = stack
        self._url = url
        self._running: dict[str, tuple[HttpMiddleware, httpx.AsyncClient]] = {}

    async def client(self, **settings: Any) -> httpx.AsyncClient:
        """A client of the application with those settings, which has a snapshot of this moment."""
        name = repr(sorted(settings.items()))
        if name not in self._running:
            app = create_app(Settings(worker_url=self._url, **settings))
            self._running[name] = app, await self._stack.enter_async_context(_client_of(app, "/ready"))
        app, client = self._running[name]
        engine = app.app.state.engine

        async def fresh() -> bool:
            try:
                await engine.fresh_snapshot(0)
            except ApiError:  # the event loop has stood still since the last test: the worker seems to be gone
                return False
            return engine.unavailable() is None

        await until(fresh)
        return client


@asynccontextmanager
async def listening(app: HttpMiddleware, port: int | None = None, **options: Any) -> AsyncIterator[str]:
    """Serve `app` with granian; the base URL."""
    port = port or free_port()
    limits = {"http1_settings": HTTP1, "http2_settings": HTTP2}
    server = Server(app, port=port, interface=Interfaces.ASGI, log_enabled=False, **limits, **options)
    serving_task = asyncio.create_task(server.serve())
    try:
        await until(lambda: _connects(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
        await serving_task


async def exchange(client: httpx.AsyncClient, request: bytes) -> tuple[int, httpx.Headers, list[bytes]]:
    """Send exactly these bytes; the status, the headers and the pieces of the answer, as its chunks cut it."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    try:
        writer.write(request)
        status = int((await reader.readline()).split()[1])
        headers = httpx.Headers()
        while line := (await reader.readline()).strip().decode():
            name, _, value = line.partition(": ")
            headers[name] = value
        if "content-length" in headers:
            return status, headers, [await reader.readexactly(int(headers["content-length"]))]
        pieces = []
        while size := int(await reader.readline(), 16):
            pieces.append(await reader.readexactly(size))
            await reader.readline()
        return status, headers, pieces
    finally:
        writer.close()


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    """Poll until the coroutine function `condition` returns a true value."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - the condition changes in another thread or process
            await asyncio.sleep(0.01)  # between two polls; no result depends on its length


async def becomes(check: Any, timeout_s: float = 20.0) -> None:
    """Poll until the plain function `check` returns a true value."""

    async def checked() -> bool:
        return bool(check())

    await until(checked, timeout_s)


async def responds(client: httpx.AsyncClient, path: str, status: int = httpx.codes.OK, **options: Any) -> bool:
    """True if a GET of `path` has that status, by default 200."""
    try:
        return (await client.get(path, **options)).status_code == status
    except httpx.TransportError:
        return False


async def _connects(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True
