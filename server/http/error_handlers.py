"""Exceptions -> error responses: our ApiErrors, the exceptions that Litestar raises by itself, and unexpected ones.

Litestar tells some cases apart by a sentence only. Those sentences stand here and nowhere else,
and tests/server/http/test_error_handlers.py fails when an upgrade of Litestar changes one of them.
"""

import http
from typing import Any, Final, get_type_hints

import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, InternalServerException, ValidationException
from litestar.types import ExceptionHandlersMap

from server.http.elevenlabs_errors import elevenlabs_error, is_elevenlabs
from server.http.errors import ApiError, error_response, internal_error
from server.http.request_scope import BODY_ERROR, ERROR_CODE, printable_path, request_id_of
from server.http.versions import version_hint
from shared.validation_messages import choices_in, missing_field, reword

log = structlog.get_logger(__name__)

BODY_INCOMPLETE: Final = "client disconnected prematurely"
"""Litestar's sentence, with status 500, for a body that ends before it is complete.

Either the client has left, or it is still connected and sent malformed chunks: granian reports both alike.
"""

TOO_MANY_PARTS: Final = "Request Entity Too Large"
"""Litestar's sentence, with status 400, for a form of more parts (a thousand), or larger headers, than it reads."""

NOT_A_FILE: Final = "Unsupported type: "
"""How Litestar's sentence begins for a form field that holds text instead of a file."""

_CODE_OF_STATUS: Final = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "insufficient_permissions",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}


def exception_handlers() -> ExceptionHandlersMap:
    """The application's exception handlers."""
    return {ApiError: _handle_api_error, HTTPException: _handle_litestar_error, Exception: handle_unexpected}


def handle_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer 500 without details; the traceback goes to the log."""
    scope = request.scope
    log.error("request_crashed", request_id=request_id_of(scope), path=printable_path(scope), exc_info=error)
    return _response(request, internal_error())


def _response(request: Request[Any, Any, Any], error: ApiError, headers: dict[str, str] | None = None) -> Response[Any]:
    """The response for `error`, in the shape that the client reads."""
    if is_elevenlabs(request.scope):
        request.scope["state"][ERROR_CODE] = error.code
        return elevenlabs_error(error, request_id_of(request.scope), headers)
    return error_response(error, headers)


def _handle_api_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    if not isinstance(error, ApiError):
        raise TypeError(type(error))
    return _response(request, error)


def _handle_litestar_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    if not isinstance(error, HTTPException):
        raise TypeError(type(error))
    if isinstance(error, InternalServerException) and error.detail == BODY_INCOMPLETE:
        ended_early = ApiError("invalid_body", "The body ended too early, or its chunks are malformed.")
        return _response(request, request.scope["state"].get(BODY_ERROR, ended_early))
    if error.status_code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        return handle_unexpected(request, error)
    if isinstance(error, ValidationException):
        return _response(request, _first_problem(request, error))
    # The middleware turns HEAD into GET, so every path that allows GET allows HEAD.
    allow = {
        name: value.replace("GET", "GET, HEAD")
        for name, value in (error.headers or {}).items()
        if name.lower() == "allow"
    }
    return _response(request, _refusal(request, error), allow)


def _refusal(request: Request[Any, Any, Any], error: HTTPException) -> ApiError:
    """The ApiError for a request that Litestar refuses before it calls a handler."""
    status = error.status_code
    message = f"{error.detail.rstrip('.')}."
    path = printable_path(request.scope)
    asked = f"{request.scope['method']} {path}"
    if error.detail == TOO_MANY_PARTS and status == http.HTTPStatus.BAD_REQUEST:
        status = http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        message = "The form has more than a thousand parts, or a part with more than 4 KiB or 8 lines of headers."
    elif status == http.HTTPStatus.NOT_FOUND:
        # A client whose base URL lacks /v1, or has it twice, is the most frequent mistake of a first set-up.
        if path.startswith(("/audio/", "/models")):
            hint = "OpenAI's paths begin with /v1, so a client's base URL ends with it"
        elif path.startswith("/v1/v1"):
            hint = "/v1 stands there twice: this client adds it by itself, so leave it out of its base URL"
        else:
            hint = version_hint(path) or "/docs lists what there is"
        message = f"There is nothing at {asked}; {hint}."
    elif status == http.HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(value for name, value in (error.headers or {}).items() if name.lower() == "allow")
        way = "connect to it as a WebSocket (ws://)" if allowed == "websocket" else f"possible: {allowed}"
        message = f"{asked} is not possible; {way}."
    elif status == http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        limit_mib = request.app.state.settings.max_body_mb
        message = f"The request's body is larger than the {limit_mib} MiB that this server takes (TTS_MAX_BODY_MB)."
    return ApiError(_CODE_OF_STATUS.get(status, "invalid_value"), message, status=status)


def _first_problem(request: Request[Any, Any, Any], error: ValidationException) -> ApiError:
    """The first field that Litestar's validation names, and what is wrong with it."""
    first = error.extra[0] if isinstance(error.extra, list) and error.extra else {}
    message = str(first.get("message") or error.detail)
    field = first.get("key")
    if missing := missing_field(message):
        field = missing
        problem = "is missing"
    elif message.startswith(NOT_A_FILE):
        problem = "must be a file"
    else:
        problem = reword(message, _choices_of(request, field), from_text=True)
    if field == "data":
        # The handler's parameter that takes the body.
        return ApiError("invalid_json", "The body is missing.")
    field = _name_of(request, field)
    return ApiError("invalid_value", f"{field}: {problem}." if field else f"{problem}.", param=field)


def _name_of(request: Request[Any, Any, Any], field: str | None) -> str | None:
    """The client's name of `field`: that in the query, if the handler's parameter has another one."""
    found = request.route_handler.parsed_fn_signature.parameters.get(field or "")
    return getattr(found.kwarg_definition, "name", None) or field if found else field


def _choices_of(request: Request[Any, Any, Any], field: str | None) -> list[str]:
    """The allowed values of `field`: a parameter of the handler, or a field of the Struct that is its `data`."""
    parameters = request.route_handler.parsed_fn_signature.parameters
    found = parameters.get(field or "")
    if found is None and "data" in parameters:
        return choices_in(get_type_hints(parameters["data"].annotation, include_extras=True).get(field or ""))
    return choices_in(found.raw) if found else []
