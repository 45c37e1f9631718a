"""What every HTTP request passes before Litestar routes it, and every answer on its way out.

HEAD as GET, bodies that stall or are packed, preflights that are refused, refusals that a client who is still sending
gets to read, and a line in the log for each of them. It knows no path and no field.
"""

import asyncio
import http
from typing import Any, Final

import msgspec
import structlog
from litestar import Request
from litestar.config.cors import CORSConfig
from litestar.datastructures import Headers
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPReceiveMessage, Message, Receive, Scope, Send

from server.http.errors import BODY_STALLED, ApiError, ErrorEnvelope, answer, shown_path
from server.http.origins import foreign_origin
from server.http.request_ids import request_id_of

_log = structlog.stdlib.get_logger(__name__)

BODY_TIMEOUT_S: Final = 60.0
"""How long a body that is not complete may bring nothing: clients pause for seconds, stalled ones for ever."""

_MAX_DRAINED_BYTES: Final = 256 * 1024 * 1024
_MAX_DRAIN_S: Final = 10.0


class Edge:
    """The ASGI application around another one; `cors` says whose preflights are refused."""

    def __init__(self, inner: ASGIApp, cors: CORSConfig | None) -> None:
        self._inner = inner
        self._cors = cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != ScopeType.HTTP:
            await self._inner(scope, receive, send)
            return
        body = _Body(scope, receive)
        reply = _Reply(scope, body, send)
        error = self._objection(scope, body)
        if error is not None:
            await _answer(error, scope, body.receive, reply.send)
            return
        if reply.method == "HEAD":
            # The answer is that to a GET; granian leaves its body out.
            scope["method"] = "GET"
        await self._inner(scope, body.receive, reply.send)

    def _objection(self, scope: Any, body: "_Body") -> ApiError | None:
        """What is wrong with a request by its headers alone."""
        headers = Headers.from_scope(scope)
        if body.announced and headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            return ApiError("unsupported_media_type", "Send the body as it is, without a Content-Encoding.")
        origin = headers.get("origin")
        # Litestar would refuse in plain text.
        if scope["method"] == "OPTIONS" and origin and self._cors and not self._cors.is_origin_allowed(origin):
            return foreign_origin(origin)
        return None


class _Body:
    """A request's body on its way in: whether all of it has come, and that it does not keep anyone waiting for ever."""

    def __init__(self, scope: Any, receive: Receive) -> None:
        headers = Headers.from_scope(scope)
        self.announced = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self._complete = False
        self._scope = scope
        self._receive = receive

    async def receive(self) -> HTTPReceiveMessage:
        """The next message; a body that stalls is taken for one whose sender has left."""
        if self._complete:
            return await self._receive()  # type: ignore[return-value]  # it is an HTTP request
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await self._receive()
        except TimeoutError:
            self._complete = True
            self._scope["state"][BODY_STALLED] = True
            return {"type": "http.disconnect"}
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message  # type: ignore[return-value]  # it is an HTTP request

    async def drain(self) -> None:
        """Read what is still to come, within bounds, and throw it away.

        A client that is still sending when the connection is closed sees a reset and not the answer.
        """
        drained = 0
        try:
            async with asyncio.timeout(_MAX_DRAIN_S):
                while self.announced and not self._complete and drained < _MAX_DRAINED_BYTES:
                    message = await self.receive()
                    drained += len(message["body"]) if message["type"] == "http.request" else 0
        except TimeoutError:
            pass  # who sends so slowly gets the reset after all


class _Reply:
    """An answer on its way out: a refusal waits until the client has finished sending, and is logged."""

    def __init__(self, scope: Any, body: _Body, send: Send) -> None:
        self._scope = scope
        self._body = body
        self._send = send
        self.method = scope["method"]
        self._refused: int | None = None

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start" and message["status"] >= http.HTTPStatus.BAD_REQUEST:
            self._refused = message["status"]
            await self._body.drain()
        elif message["type"] == "http.response.body" and self._refused is not None:
            self._log(self._refused, message["body"])
            self._refused = None
        await self._send(message)

    def _log(self, status: int, body: bytes) -> None:
        """The message stays out of the log: it may quote what a client sent."""
        try:
            code = msgspec.json.decode(body, type=ErrorEnvelope).error.code
        except msgspec.DecodeError:
            code = None
        # A 503 passes, and whoever waits for /ready makes many of them: a 500 is what somebody has to look at.
        write = _log.warning if status == http.HTTPStatus.INTERNAL_SERVER_ERROR else _log.info
        write(
            "refused",
            request_id=request_id_of(self._scope),
            method=self.method,
            path=shown_path(self._scope),
            status=status,
            code=code,
        )


async def _answer(error: ApiError, scope: Any, receive: Receive, send: Send) -> None:
    request: Request[Any, Any, Any] = Request(scope)
    await answer(error).to_asgi_response(app=None, request=request)(scope, receive, send)
