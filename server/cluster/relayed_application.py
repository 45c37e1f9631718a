"""The web application behind Serve's proxy: what differs where another process owns the clients' connections."""

from typing import Any

from litestar.types import Receive, Scope, Send

from server.http.middleware import HttpMiddleware
from server.http.request_scope import RELAYED


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

        async def send_without_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self.application(scope, receive, send_without_id)
