"""One WebSocket as this server uses it: JSON comes in as text, JSON and bytes go out, and each close says why.

It knows no dialect and no audio. Granian answers pings, but only while a message is awaited, so a message always is.
Granian shows no ping and sends none: whether a silent client is still there is read from the kernel.
It closes a connection right behind a close, also one on which messages arrive: `JsonSocket.close` reads these first.
"""

import asyncio
import contextlib
import socket
import sys
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import WebSocket

from server.http.connections import connection_of, read_to_end, seconds_since_received
from server.http.errors import ApiError

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""Of one message: a configuration may hold a recording. Granian itself ends a socket at a frame of 16 MiB."""

NORMAL: Final = 1000
GOING_AWAY: Final = 1001
NO_TEXT: Final = 1003
POLICY: Final = 1008
TOO_LARGE: Final = 1009
FAILED: Final = 1011
TRY_LATER: Final = 1013

CLOSE_S: Final = 2.0
"""How long a last message, and the close behind it, may take: a client that reads nothing gets neither."""

_LONGEST_REASON: Final = 123
"""Bytes of a close's reason that the protocol allows."""

_refusals: Final = asyncio.Semaphore(32)
"""Sockets that are closed with an error at the same time, and whose clients are read to their end.

More of them (a GPU worker is lost) are closed at once: to find the connections of thousands would take seconds.
"""

_encode = msgspec.json.Encoder().encode


class SocketClosedError(Exception):
    """The client has closed the socket, or its connection is gone."""


class JsonSocket:
    """An accepted WebSocket. One task calls `receive`; any task may send.

    `send_timeout_s`: how long a client may take nothing of what is sent.
    """

    def __init__(self, websocket: WebSocket[Any, Any, Any], *, send_timeout_s: float) -> None:
        self.websocket = websocket
        self._send_timeout_s = send_timeout_s
        self._sending = asyncio.Lock()

    async def receive(self) -> str:
        """The next message. Raises SocketClosedError, and ApiError for one that is no text or is too large."""
        message = await self.websocket.receive()
        if message["type"] != "websocket.receive":
            raise SocketClosedError
        text = message.get("text")
        if text is None:
            raise ApiError("unsupported_media_type", "Messages are text frames with JSON; this one was binary.")
        if len(text) > MAX_MESSAGE_BYTES or (
            len(text) * 4 > MAX_MESSAGE_BYTES and len(text.encode()) > MAX_MESSAGE_BYTES
        ):
            raise ApiError("request_too_large", f"A message has at most {MAX_MESSAGE_BYTES} bytes.")
        return text

    async def send(self, message: bytes | msgspec.Struct | dict[str, Any]) -> None:
        """Send bytes as they are, and everything else as JSON. Returns when the client has taken most of it.

        Raises ApiError (`client_too_slow`) if the client takes nothing, and SocketClosedError.
        """
        event: Any = {"type": "websocket.send"}
        if isinstance(message, bytes):
            event["bytes"] = message
        else:
            event["text"] = _encode(message).decode()
        try:
            async with asyncio.timeout(self._send_timeout_s), self._sending:
                await self.websocket.send(event)
        except TimeoutError:
            raise ApiError("client_too_slow", "The client has not read what was sent.") from None
        except Exception as error:  # Litestar's or granian's own: the connection is gone
            raise SocketClosedError from error

    async def close(self, code: int, reason: str = "") -> None:
        """Close the socket; a client that reads nothing sees its connection end."""
        while len(reason.encode()) > _LONGEST_REASON:
            reason = reason[:-1]
        close: Any = {"type": "websocket.close", "code": code, "reason": reason}
        if code in {NORMAL, GOING_AWAY} or _refusals.locked():
            await self._send_close(close)
            return
        async with _refusals:  # the client may be sending: it knows of no error yet
            connection = await asyncio.to_thread(self._connection)
            try:
                await self._send_close(close, connection)
            finally:
                if connection is not None:
                    connection.close()

    async def _send_close(self, close: Any, connection: socket.socket | None = None) -> None:
        with contextlib.suppress(Exception):  # there is no more to be said
            async with asyncio.timeout(CLOSE_S), self._sending:
                await self.websocket.send(close)
                if connection is not None:
                    await read_to_end(connection)

    def _connection(self) -> socket.socket | None:
        scope = self.websocket.scope
        return connection_of(scope) if sys.platform == "linux" and scope.get("client") else None

    async def silent_s(self) -> float:
        """For how many seconds not a byte has come from the client: pings count as signs of life."""
        return await asyncio.to_thread(seconds_since_received, self.websocket.scope)


def close_code(error: ApiError) -> int:
    """The code of a close after `error`: never that of a normal end."""
    match error.code:
        case "shutting_down":
            return GOING_AWAY
        case "unsupported_media_type":
            return NO_TEXT
        case "request_too_large":
            return TOO_LARGE
        case "worker_unavailable":
            return FAILED
    if error.status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
        return TRY_LATER
    return FAILED if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else POLICY
