"""WebSockets of a running application, by the `websockets` library."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import websockets

from shared.protocol import Append, Speak
from tests.fakes import FakeWorker, text_of

STREAM: Final = "/v1/audio/speech/stream"
PATIENCE_S: Final = 20.0


class Talk:
    """A socket, and what the server says in it."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self.socket = socket

    async def say(self, *messages: Any) -> None:
        """Send JSON, or strings and bytes as they are."""
        for message in messages:
            await self.socket.send(message if isinstance(message, str | bytes) else json.dumps(message))

    async def hear(self) -> Any:
        """The next message: decoded JSON, or bytes."""
        async with asyncio.timeout(PATIENCE_S):
            message = await self.socket.recv()
        return json.loads(message) if isinstance(message, str) else message

    async def until(self, kind: str) -> list[Any]:
        """All messages up to the first of that type."""
        heard = [await self.hear()]
        while not is_a(heard[-1], kind):
            heard.append(await self.hear())
        return heard

    async def end(self) -> tuple[list[Any], int, str]:
        """All messages that still come, and the code and the reason of the close."""
        heard = []
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                heard.append(await self.hear())
        return heard, self.socket.close_code or 0, self.socket.close_reason or ""


def said(worker: FakeWorker) -> list[str]:
    """The text of each request, with what was appended to it."""
    texts = {speak.id: text_of(speak) for speak in worker.of(Speak)}
    for piece in worker.of(Append):
        texts[piece.id] += piece.text
    return list(texts.values())


def is_a(message: Any, kind: str) -> bool:
    """Whether a message is JSON of that type."""
    return isinstance(message, dict) and message.get("type") == kind


def audio(messages: list[Any]) -> bytes:
    """All binary messages, joined."""
    return b"".join(message for message in messages if isinstance(message, bytes))


@asynccontextmanager
async def talk(client: httpx.AsyncClient, path: str = STREAM, **options: Any) -> AsyncIterator[Talk]:
    """A socket to the application of `client`; its headers are those of `additional_headers` alone."""
    url = f"ws://{client.base_url.host}:{client.base_url.port}{path}"
    async with websockets.connect(url, proxy=None, max_size=None, **options) as socket:
        yield Talk(socket)
