"""Spans of requests: one for each that does something, from its arrival to the last byte of its answer.

A client's `traceparent` is its parent. Reading requests have none: probes, scrapes and dashboards ask every second.
"""

import http
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from litestar.datastructures import Headers
from litestar.types import ASGIApp, Receive, Send

from server.http.request_scope import request_id_of

if TYPE_CHECKING:
    from shared.traces import Traces

_METHODS: Final = {"POST", "PUT", "PATCH", "DELETE"}
_UNTRACED: Final = {"GET", "HEAD", "OPTIONS"}
_context: ContextVar[str] = ContextVar("traceparent", default="")


def traceparent() -> str:
    """The W3C context of the request in progress; "" if no trace of it is kept."""
    return _context.get()


async def trace_request(traces: "Traces", app: ASGIApp, scope: Any, receive: Receive, send: Send) -> None:
    """Let `app` answer a request, within a span if it is one that is traced."""
    method = "GET" if scope["type"] == "websocket" else scope["method"]
    if scope["type"] == "http" and method in _UNTRACED:
        await app(scope, receive, send)
        return
    from opentelemetry.trace import SpanKind, StatusCode  # noqa: PLC0415 -- an optional extra, and traces are on

    from shared.traces import context_of  # noqa: PLC0415 -- as above

    # A method may be any word of the client's.
    method = method if method in {*_METHODS, "GET"} else "_OTHER"
    span = traces.begin(
        method,
        Headers.from_scope(scope).get("traceparent", ""),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": method, "tts.request_id": request_id_of(scope)},
    )
    has_begun = False

    async def record(message: Any) -> None:
        nonlocal has_begun
        if message["type"].endswith("response.start"):
            span.set_attribute("http.response.status_code", message["status"])
            if message["status"] >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
                span.set_status(StatusCode.ERROR)
        elif not has_begun and (message.get("body") or message.get("bytes")):
            has_begun = True
            span.add_event("first_bytes")
        await send(message)

    token = _context.set(context_of(span))
    try:
        await app(scope, receive, record)
    except BaseException as error:
        span.set_status(StatusCode.ERROR)
        span.set_attribute("error.type", type(error).__name__)
        raise
    finally:
        _context.reset(token)
        if route := scope.get("path_template"):
            span.set_attribute("http.route", route)
            span.update_name(f"{method} {route}")
        span.end()
