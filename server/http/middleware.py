"""The ASGI middleware around the Litestar application: rules that hold for every HTTP request, whatever its path.

It gives each response a request id and the API's version, answers HEAD like GET, refuses compressed bodies and foreign
preflights, bounds the time and the memory of bodies, lets a client that is still sending read its refusal, and logs
each refusal.
It knows no path and no field.
"""

import asyncio
import http
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog
from litestar import Litestar, Request
from litestar.datastructures import Headers, MutableScopeHeaders
from litestar.enums import ScopeType
from litestar.routes import HTTPRoute
from litestar.types import HTTPReceiveMessage, Message, Receive, Scope, Send

from server.http.body_budget import BodyBudget
from server.http.elevenlabs_errors import elevenlabs_error, is_elevenlabs
from server.http.errors import ApiError, ErrorEnvelope, error_response
from server.http.forwarded import client_view, strip_root_path
from server.http.open_requests import OpenRequest, OpenRequests
from server.http.open_sockets import OpenSockets
from server.http.origins import foreign_origin
from server.http.request_scope import (
    ASKED_WITH_HEAD,
    BODY_ERROR,
    ERROR_CODE,
    SOCKET_ERROR,
    printable_path,
    request_id_of,
)
from server.http.request_traces import trace_request
from server.http.versions import API_VERSION, VERSION_HEADER, refuse_other_version, version_hint
from shared.protocol import LimitName

log = structlog.get_logger(__name__)

_PART_BYTES: Final = 16_384
"""Granian copies each part of a response, and takes another part when the client has taken most of it.

1,000 clients that asked for a megabyte and read nothing cost 1.4 GB in one part, and 170 MB in parts of this size.
"""

_UNREADABLE: Final = 1002
"""The code of a close after a frame that breaks the protocol: text that is no UTF-8, or more than granian takes."""

_CROWDED_OUT_FOR_S: Final = 5.0
"""Seconds until a client may send a body again that was crowded out."""

_BACK_AFTER_S: Final = 5.0
"""Seconds until a client may try again that met the end of the service."""

_MIB: Final = 1024 * 1024
_MAX_DRAINED_BYTES: Final = 256 * _MIB
_MAX_DRAIN_S: Final = 10.0


class HttpMiddleware:
    """The outermost ASGI application; `app` is the Litestar application within it."""

    def __init__(self, app: Litestar) -> None:
        self.app = app
        self.open_requests = OpenRequests()
        self.open_sockets: OpenSockets = app.state.open_sockets
        self._limit_hits: Counter[LimitName] = app.state.limit_hits
        self.body_budget = BodyBudget(app.state.settings.body_buffer_mb * _MIB, self._limit_hits)
        self.refuses_requests = False
        """True if the service stops: it takes no more requests, but those of /health."""

        self.closes_connections = False
        """True if a connection of HTTP/1 ends with the response to its next request."""
        self._unavailable: dict[str, str | None] = {}
        """By route: the error code of the 503 that was the last answer to a reading request."""
        self._methods = {route.path_format: _methods_of(route) for route in app.routes if isinstance(route, HTTPRoute)}
        """By route: what the response to OPTIONS allows. Litestar lists the methods of one handler of a path there."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. The lifespan scope passes through."""
        traces = self.app.state.traces
        if traces is not None and scope["type"] in {ScopeType.HTTP, ScopeType.WEBSOCKET}:
            await trace_request(traces, self._serve, scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            answer = self._open_websocket if scope["type"] == ScopeType.WEBSOCKET else self.app
            await answer(scope, receive, send)
            return
        strip_root_path(scope, self.app.state.settings.root_path)
        if self.closes_connections and scope["http_version"].startswith("1"):
            send = _closing(send)
        request = self.open_requests.begin(scope, has_body=_expects_body(scope))
        try:
            await self._answer(scope, self._body(scope, receive, request), send)
        finally:
            self.open_requests.end(request)
            self.body_budget.release(request)

    def _body(self, scope: Any, receive: Receive, request: OpenRequest) -> "_RequestBody":
        return _RequestBody(scope, receive, request, self.body_budget, self.open_requests.clock)

    async def _answer(self, scope: Any, body: "_RequestBody", send: Send) -> None:
        response = _ResponseSender(scope, body, send, self._unavailable)
        error = self._objection(scope, body)
        if error is not None:
            refusal = error_response(error).to_asgi_response(app=None, request=Request(scope))
            await refusal(scope, body.receive, response.send)
            return
        if response.method == "HEAD":
            # The response is the one to a GET; _ResponseSender leaves its body out.
            scope["method"] = "GET"
            scope.setdefault("state", {})[ASKED_WITH_HEAD] = True
        answered = self._with_methods(scope, response.send) if response.method == "OPTIONS" else response.send
        await self.app(scope, body.receive, answered)

    def _with_methods(self, scope: Any, send: Send) -> Send:
        """`send`, with all methods of the path in the header Allow."""

        async def listing(message: Message) -> None:
            if message["type"] == "http.response.start" and "allow" in (headers := MutableScopeHeaders(message)):
                headers["allow"] = self._methods.get(scope.get("path_template", ""), headers["allow"])
            await send(message)

        return listing

    async def _open_websocket(self, scope: Any, receive: Receive, send: Send) -> None:
        """Let the application take a WebSocket, or answer its handshake with an HTTP error.

        The handler raises an ApiError, or sets SOCKET_ERROR and accepts nothing, to refuse. A path without a handler is
        a 404: Litestar's close would be a bare 403.
        """
        strip_root_path(scope, self.app.state.settings.root_path)
        handshake: Any = {**scope, "type": "http", "method": "GET", "state": scope.setdefault("state", {})}
        request = self.open_requests.begin(handshake, has_body=False)
        try:
            body = self._body(handshake, receive, request)
            error = self._objection(handshake, body) or await _taken(self.app, scope, receive, send)
            if error is None:
                return

            async def deny(message: Any) -> None:
                await send({**message, "type": f"websocket.{message['type']}"})  # type: ignore[typeddict-item]

            response = _ResponseSender(handshake, body, deny, self._unavailable)
            answer = error_response(error)
            if is_elevenlabs(handshake) and error.code != "not_found":
                handshake["state"][ERROR_CODE] = error.code
                answer = elevenlabs_error(error, request_id_of(handshake))
            refusal = answer.to_asgi_response(app=None, request=Request(handshake))
            await refusal(handshake, receive, response.send)
        finally:
            self.open_requests.end(request)

    def _objection(self, scope: Any, body: "_RequestBody") -> ApiError | None:
        """The refusal of a request by its headers alone, or by the number of its client's requests; None to go on."""
        settings, peer = self.app.state.settings, body.request.peer
        if self.refuses_requests and scope["path"] != "/health":
            return ApiError("shutting_down", "The service is shutting down.", retry_after_s=_BACK_AFTER_S)
        if (
            peer
            and self.open_requests.of_address(peer[0]) > settings.max_connections_per_address
            and not client_view(settings, scope).through_proxy
        ):
            self._limit_hits["requests_of_address"] += 1
            message = (
                f"{settings.max_connections_per_address} requests from this address are in progress, as many as this "
                "server takes from one (TTS_MAX_CONNECTIONS_PER_ADDRESS)."
            )
            return ApiError("rate_limit_exceeded", message)
        headers = Headers.from_scope(scope)
        if body.expected and headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            return ApiError("unsupported_media_type", "Send the body as it is, without a Content-Encoding.")
        origin = headers.get("origin")
        cors = self.app.cors_config
        # Litestar would refuse a preflight in plain text.
        if scope["method"] == "OPTIONS" and origin and cors and not cors.is_origin_allowed(origin):
            return foreign_origin(origin)
        return refuse_other_version(headers)


def _methods_of(route: HTTPRoute) -> str:
    """The methods of a path. HEAD is answered like GET."""
    return ", ".join(sorted(route.methods | ({"HEAD"} if "GET" in route.methods else set())))


def _closing(send: Send) -> Send:
    """`send`, with a header that has granian close the connection after the response."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableScopeHeaders(message)["connection"] = "close"
        await send(message)

    return closing


async def _taken(app: Litestar, scope: Any, receive: Receive, send: Send) -> ApiError | None:
    """Let `app` take a WebSocket; the error if it has refused the handshake."""
    accepted = False

    async def pass_on(message: Any) -> None:
        nonlocal accepted
        accepted = accepted or message["type"] == "websocket.accept"
        if accepted:
            await send(message)

    async def pass_in() -> Any:
        message: Any = await receive()
        if message["type"] == "websocket.disconnect" and accepted:
            # If granian could not read a frame, the client still waits, and would see an end without any code.
            await send({"type": "websocket.close", "code": _UNREADABLE, "reason": "a frame could not be read"})
        return message

    await app(scope, pass_in, pass_on)
    if accepted:
        return None
    path = printable_path(scope)
    hint = version_hint(path) or "/asyncapi.json describes those that do"
    error: ApiError | None = scope["state"].get(SOCKET_ERROR)
    return error or ApiError("not_found", f"{path} takes no WebSocket; {hint}.")


class _RequestBody:
    """A request's body on its way in: whether it is complete, and bounds on its time and on the memory of all."""

    def __init__(
        self, scope: Any, receive: Receive, request: OpenRequest, budget: BodyBudget, clock: Callable[[], float]
    ) -> None:
        self.expected = not request.body_complete
        self.request = request
        self._budget = budget
        self._clock = clock
        self._complete = False
        self._asked = False
        self._scope = scope
        self._receive = receive

    async def receive(self) -> HTTPReceiveMessage:
        """The next message. A body that is given up counts as one whose client has left."""
        if self._complete:
            return await self._receive()  # type: ignore[return-value]  # it is an HTTP request
        try:
            async with asyncio.timeout(self.request.body_patience_s(self._clock())) as self.request.waiting:
                message = await self._next()
        except TimeoutError:
            return self._give_up()
        finally:
            self.request.waiting = None
        self._budget.check(self.request, self._clock())
        return message

    async def _next(self) -> HTTPReceiveMessage:
        self._asked = True
        message: HTTPReceiveMessage = await self._receive()  # type: ignore[assignment]  # it is an HTTP request
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        self.request.body_complete = self._complete
        self.request.body_bytes += len(message["body"]) if message["type"] == "http.request" else 0
        return message

    def _give_up(self) -> HTTPReceiveMessage:
        if self.request.crowded_out:
            message = "The bodies of other requests take all the memory that this server has for them."
            error = ApiError("rate_limit_exceeded", message, retry_after_s=_CROWDED_OUT_FOR_S)
        else:
            error = ApiError("request_timeout", "The rest of the body did not arrive in time.")
            self._complete = True  # there is no use in waiting for the rest
        self._scope.setdefault("state", {})[BODY_ERROR] = error
        return {"type": "http.disconnect"}

    async def drain(self) -> None:
        """Read the rest of the body, within bounds, and throw it away.

        If the connection were closed while the client is still sending, the client would see a reset
        instead of the response. A client that waits for the 100 of its Expect sends nothing, unless it gets that.
        """
        self._budget.release(self.request)
        expect = Headers.from_scope(self._scope).get("expect", "")
        if expect.lower() == "100-continue" and not self._asked:
            return
        drained = 0
        try:
            async with asyncio.timeout(_MAX_DRAIN_S):
                while self.expected and not self._complete and drained < _MAX_DRAINED_BYTES:
                    message = await self._next()
                    drained += len(message["body"]) if message["type"] == "http.request" else 0
        except TimeoutError:
            pass  # a client that sends so slowly gets the reset


class _ResponseSender:
    """A response on its way out: it gets the request's id; a refusal waits for the body's end, and is logged."""

    def __init__(self, scope: Any, body: _RequestBody, send: Send, unavailable: dict[str, str | None]) -> None:
        self._scope = scope
        self._body = body
        self._send = send
        self._unavailable = unavailable
        self.method = scope["method"]
        self._reads = self.method in {"GET", "HEAD"}
        self._refused: int | None = None
        self._ended = False  # a response to HEAD ends with the first part of its body

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            headers = MutableScopeHeaders(message)
            headers["x-request-id"] = request_id_of(self._scope)
            headers[VERSION_HEADER] = API_VERSION
            if message["status"] >= http.HTTPStatus.BAD_REQUEST:
                self._refused = message["status"]
                await self._body.drain()
            elif self._reads:
                self._unavailable.pop(self._scope.get("path_template", ""), None)
        elif message["type"] == "http.response.body" and self._refused is not None:
            self._log(self._refused, message["body"])
            self._refused = None
        if message["type"] == "http.response.body" and self.method == "HEAD":
            # HTTP/2 forbids a body here, and granian sends the one that it gets.
            if self._ended:
                return
            self._ended = True
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        body = message["body"]
        last = max(0, len(body) - 1) // _PART_BYTES * _PART_BYTES
        for start in range(0, last, _PART_BYTES):
            part = body[start : start + _PART_BYTES]
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
        await self._send({**message, "body": body[last:]})

    def _log(self, status: int, body: bytes) -> None:
        """Log a refusal without its message, which may quote what the client sent."""
        try:
            code = msgspec.json.decode(body, type=ErrorEnvelope).error.code
        except msgspec.DecodeError:
            code = self._scope.get("state", {}).get(ERROR_CODE)
        if self._reads and status == http.HTTPStatus.SERVICE_UNAVAILABLE:
            # Health checks and dashboards ask every second while the GPU worker starts: a line for each new answer.
            route = self._scope.get("path_template", "")
            if self._unavailable.get(route) == code:
                return
            self._unavailable[route] = code
        # A 503 is temporary: only a 500 needs an operator's eye.
        write = log.warning if status == http.HTTPStatus.INTERNAL_SERVER_ERROR else log.info
        write(
            "request_refused",
            request_id=request_id_of(self._scope),
            method=self.method,
            path=printable_path(self._scope),
            status=int(status),  # an HTTPStatus prints its name
            code=code,
        )


def _expects_body(scope: Any) -> bool:
    """True if a body may follow the headers. HTTP/2 has no chunks, so no header announces a body without a length."""
    headers = Headers.from_scope(scope)
    default = "unknown" if scope["http_version"] == "2" else "0"
    return headers.get("content-length", default) != "0" or "transfer-encoding" in headers
