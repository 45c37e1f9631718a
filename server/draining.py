"""Refusing a body that is too large, in a way that the client gets to read.

A client that is still sending when the connection is closed sees a reset and not the answer;
hence what it sends is read, within bounds, and thrown away first.
"""

import asyncio
from typing import Any, Final

from litestar import Response
from litestar.types import Receive, Scope, Send

_MAX_BYTES: Final = 256 * 1024 * 1024
_MAX_S: Final = 10.0


class DrainingResponse(Response[Any]):
    """A Response that first lets the client finish sending: at most 256 MiB, and for at most 10 s."""

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> Any:
        """The ASGI application that drains and then answers."""
        answer = super().to_asgi_response(*args, **kwargs)

        async def drain_and_answer(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                async with asyncio.timeout(_MAX_S):
                    await _drain(receive)
            except TimeoutError:
                pass  # who sends so slowly gets the reset after all
            await answer(scope, receive, send)

        return drain_and_answer


async def _drain(receive: Receive) -> None:
    drained = 0
    more = True
    while more and drained < _MAX_BYTES:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)
        drained += len(message.get("body", b"")) if message["type"] == "http.request" else 0
