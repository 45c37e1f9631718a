"""The web application behind Serve's proxy: what differs where another process owns the clients' connections."""

from typing import Any

import structlog
from litestar.exceptions import LitestarException
from litestar.types import Receive, Scope, Send

from server.http.middleware import HttpMiddleware
from server.http.request_scope import RELAYED, request_id_of

log = structlog.get_logger(__name__)


class RelayedApplication:
    """ASGI: `application`, whose requests and answers a proxy relays."""

    def __init__(self, application: HttpMiddleware) -> None:
        self.application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. The proxy adds the request's id to the answer, so the application's is left out."""
        if scope["type"] == "lifespan":  # type: ignore[comparison-overlap]
            await self.application(scope, receive, send)
            return
        scope.setdefault("state", {})[RELAYED] = True

        started = False

        async def send_without_id(message: Any) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.application(scope, receive, send_without_id)
        except LitestarException as error:
            # Litestar wraps what ends a response that has begun. The proxy breaks the transfer, as it must.
            if not started:
                raise
            log.info("response_broken", request_id=request_id_of(scope), cause=type(error.__cause__).__name__)
