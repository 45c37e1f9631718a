"""Answers that leave while they are made: a client that goes away, and a transfer that must not end cleanly.

It owns what ASGI and Litestar do around a stream; it knows nothing of audio.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from litestar import Request
from litestar.response.streaming import Stream
from litestar.types import Receive, Scope, Send

from server.http.errors import CLIENT_GONE, ApiError

T = TypeVar("T")


class BrokenTransferError(Exception):
    """Raised inside a stream: the client must see that the rest is missing."""


async def until_gone(request: Request[Any, Any, Any], work: "asyncio.Task[T]", timeout_s: float | None = None) -> bool:
    """Wait for `work`; whether it is done, once `timeout_s` is over. Its result or error is the caller's to take.

    A client that goes away meanwhile cancels the work and raises ApiError (499, which nobody reads):
    Litestar by itself lets a handler run on for a client that has left.
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
        raise ApiError("client_gone", "The client went away.", status=CLIENT_GONE)
    return False


async def while_there(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; ApiError as of `until_gone` where the client goes away before."""
    task = asyncio.create_task(work)
    await until_gone(request, task)
    return task.result()


async def _disconnected(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def can_break(request: Request[Any, Any, Any]) -> bool:
    """Whether the client can tell a broken transfer from a complete one where no length was announced.

    HTTP/1.0 has no chunks: there the end of the connection is the end of the body, also when its maker has died.
    """
    # The ASGI specification says "1.0"; granian says "1".
    return str(request.scope["http_version"]) not in {"1.0", "1"}


class ClosingStream(Stream):
    """A Stream that calls `on_close` (synchronous) however it ends, even where its iterator was never begun.

    A BrokenTransferError of the iterator leaves the body without its end: no last chunk of the chunked encoding is
    sent and the connection is closed, so that no client can take it for complete.
    """

    def __init__(self, content: AsyncIterator[bytes], *, on_close: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(content, **kwargs)
        self.on_close = on_close

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> Any:
        """The ASGI application that sends this stream."""
        send_stream = super().to_asgi_response(*args, **kwargs)
        on_close = self.on_close

        async def send_and_close(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await send_stream(scope, receive, send)
            except* BrokenTransferError:
                # Returning without the last body message is what breaks the transfer.
                pass
            finally:
                on_close()

        return send_and_close
