"""Streamed responses: stopping the work when a client disconnects, and breaking a transfer after a failure.

It owns the ASGI and Litestar side of a stream; it knows nothing of audio.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from litestar import Request
from litestar.response.streaming import Stream
from litestar.types import Message, Receive, Scope, Send

from server.http.connection_reset import can_reset, resettable_connection
from server.http.errors import CLIENT_GONE, ApiError

T = TypeVar("T")

SLOW_FLUSH_S: Final = 5.0
"""How long a reader of lines may take to receive the rest of a broken answer; a slower one sees no reset."""


class BrokenTransferError(Exception):
    """Raised inside a stream: the client must notice that the rest is missing."""


async def cancel_on_disconnect(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, `work` is cancelled and ApiError (499) is raised.

    Litestar by itself lets a handler run on after its client has disconnected.
    """
    task = asyncio.create_task(work)
    await wait_while_connected(request, task)
    return task.result()


async def wait_while_connected(
    request: Request[Any, Any, Any], work: "asyncio.Task[T]", timeout_s: float | None = None
) -> bool:
    """Wait until `work` is done (True) or `timeout_s` is over (False). The caller takes the result or the error.

    If the client disconnects first, `work` is cancelled and ApiError (499) is raised.
    """
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        work.cancel()
        raise
    finally:
        gone.cancel()
    if work.done():
        return True
    if gone.done():
        work.cancel()
        raise ApiError("client_gone", "The client disconnected.", status=CLIENT_GONE)
    return False


async def _disconnected(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def can_break(request: Request[Any, Any, Any]) -> bool:
    """True if the client can tell a broken transfer from a complete one without a Content-Length.

    HTTP/1.0 has no chunks: the end of the connection is the end of the body. Only a reset is no end.
    """
    return not _is_http_1_0(request.scope) or can_reset(request.scope)


def _is_http_1_0(scope: Any) -> bool:
    # The ASGI specification says "1.0"; granian says "1".
    return str(scope["http_version"]) in {"1.0", "1"}


class ClosingStream(Stream):
    """A Stream that calls the synchronous `on_close` at its end, even if its iterator never began.

    A BrokenTransferError of the iterator leaves the body without its end: the last chunk of the chunked encoding
    is not sent and the connection is closed, so that no client can take the body for complete.
    A connection with HTTP/1.0 is reset instead. With `of_lines`, a connection with HTTP/1.1 is reset as well:
    Python's http.client, which notices a missing chunk otherwise, takes it for the end if it reads line by line.
    """

    def __init__(
        self, content: AsyncIterator[bytes], *, on_close: Callable[[], None], of_lines: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(content, **kwargs)
        self.on_close = on_close
        self.of_lines = of_lines

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> Any:
        """The ASGI application that sends this stream."""
        send_stream = super().to_asgi_response(*args, **kwargs)
        on_close, of_lines = self.on_close, self.of_lines

        async def send_and_close(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                async with _reset_on_failure(scope, send) as send_part:
                    await send_stream(scope, receive, send_part)
            except* BrokenTransferError:
                # Returning without the last body message is what breaks the transfer.
                if of_lines and scope["http_version"] == "1.1" and can_reset(scope):
                    await _reset_when_received(scope)
            finally:
                on_close()

        return send_and_close


@asynccontextmanager
async def _reset_on_failure(scope: Any, send: Send) -> AsyncIterator[Send]:
    """A `send` for a stream. A connection with HTTP/1.0 is reset if the stream ends without its last message."""
    if not _is_http_1_0(scope) or not can_reset(scope):
        yield send
        return
    # Among 20,000 connections the search takes a tenth of a second.
    connection = await asyncio.to_thread(resettable_connection, scope)
    if connection is None:
        raise BrokenTransferError("the client has closed its connection")
    complete = False

    async def send_part(message: Message) -> None:
        nonlocal complete
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            complete = True
            connection.finish()
        await send(message)

    try:
        yield send_part
    finally:
        try:
            if not complete:
                await connection.flush()
        finally:
            connection.close()


async def _reset_when_received(scope: Any) -> None:
    """Let the connection end with a reset, unless that would discard something that the client has not received."""
    connection = await asyncio.to_thread(resettable_connection, scope)
    if connection is None:
        return
    try:
        if not await connection.flush(SLOW_FLUSH_S):
            connection.finish()
    finally:
        connection.close()
