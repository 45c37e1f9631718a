"""Running the web application for a test: on a real socket, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from granian.constants import Interfaces
from granian.server.embed import Server

from server.app import create_app
from server.http.middleware import HttpMiddleware
from shared.settings import Settings
from tests.ports import free_port

SPEECH = "/v1/audio/speech"


@asynccontextmanager
async def serving(url: str, *, ready: bool = True, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application whose GPU worker is at `url`; by default once that one has been met."""
    app = create_app(Settings(worker_url=url, **settings))
    async with listening(app) as base_url, httpx.AsyncClient(base_url=base_url, timeout=20) as client:
        await until(lambda: answers(client, "/ready" if ready else "/health"))
        yield client


@asynccontextmanager
async def listening(app: HttpMiddleware) -> AsyncIterator[str]:
    """The base URL of `app`, served by granian."""
    port = free_port()
    server = Server(app, port=port, interface=Interfaces.ASGI, log_enabled=False, websockets=False)
    serving_task = asyncio.create_task(server.serve())
    try:
        await until(lambda: _connects(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
        await serving_task


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait until the coroutine function `condition` gives something true; a busy machine takes its time."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - what is waited for is in another thread or process
            await asyncio.sleep(0.01)  # between two looks; nothing depends on how long it is


async def becomes(check: Any, timeout_s: float = 20.0) -> None:
    """Wait until the plain function `check` gives something true."""

    async def checked() -> bool:
        return bool(check())

    await until(checked, timeout_s)


async def answers(client: httpx.AsyncClient, path: str, status: int = httpx.codes.OK) -> bool:
    """Whether a GET of `path` has that status, by default 200."""
    try:
        return (await client.get(path)).status_code == status
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
