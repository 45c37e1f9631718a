"""The middleware of Serve's HTTP proxy: it sees each request before the proxy does.

Serve finds `middlewares` by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH in the environment of Ray's processes.
"""

from typing import Any

from litestar.datastructures import MutableScopeHeaders
from litestar.types import ASGIApp, Receive, Scope, Send
from starlette.middleware import Middleware

from server.http.request_scope import request_id_of


def middlewares() -> list[Middleware]:
    """The ASGI middlewares around the proxy."""
    return [Middleware(RequestIds)]


class RequestIds:
    """Gives each request a sane id: Serve puts the one that it finds into its log and its answer, whatever it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if "headers" in scope:
            request: Any = {**scope, "state": {}}
            MutableScopeHeaders(scope)["x-request-id"] = request_id_of(request)
        await self._app(scope, receive, send)
