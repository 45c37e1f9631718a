"""Every failure as OpenAI's error envelope: which status, type and headers a code has, and the handlers that answer.

It owns the translation at the edge and nothing else: where something fails, an ApiError with a code of the contract
is raised, and only this module knows what that is in HTTP.
"""

import http
import math
from typing import Any, Final, get_type_hints

import msgspec
import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, InternalServerException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import ExceptionHandlersMap

from server.http.request_ids import request_id_of
from shared.validation_messages import choices_in, missing_field, reword

_log = structlog.stdlib.get_logger(__name__)

INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"
RATE: Final = "rate_limit_error"

CODES: Final[dict[str, tuple[int, str]]] = {
    "invalid_value": (400, INVALID),
    "invalid_json": (400, INVALID),
    "invalid_body": (400, INVALID),
    "voice_not_found": (400, INVALID),
    "task_mismatch": (400, INVALID),
    "invalid_audio": (400, INVALID),
    "invalid_api_key": (401, "authentication_error"),
    "insufficient_permissions": (403, "permission_error"),
    "foreign_origin": (403, "permission_error"),
    "not_found": (404, INVALID),
    "model_not_found": (404, INVALID),
    "method_not_allowed": (405, INVALID),
    "request_timeout": (408, INVALID),
    "model_busy": (409, INVALID),
    "request_too_large": (413, INVALID),
    "unsupported_media_type": (415, INVALID),
    "queue_full": (429, RATE),
    "rate_limit_exceeded": (429, RATE),
    "synthesis_failed": (500, SERVER),
    "internal_error": (500, SERVER),
    "worker_unavailable": (503, SERVER),
    "insufficient_vram": (503, SERVER),
    "model_unavailable": (503, SERVER),
    "shutting_down": (503, SERVER),
}
"""The codes of the contract: HTTP status and OpenAI's type of error. A code that is not here is our fault: 500."""

CLIENT_GONE: Final = 499
"""The status of an answer that nobody reads; no contract has it, logs of proxies do."""

BODY_STALLED: Final = "body_stalled"
"""The mark in a request's state that its body stopped coming."""

_BODY_INCOMPLETE: Final = "client disconnected prematurely"
"""What Litestar says, as a mistake of the server's, where no more of a body comes and it is not complete.

Its sender has left, or is still there and wrote chunks that are none: granian tells the two alike.
"""

_BROKEN_OFF: Final = "The body broke off, or its chunks are malformed."
_STALLED: Final = "The rest of the body did not come in time."

_TOO_MANY_PARTS: Final = "Request Entity Too Large"
"""What Litestar says, with status 400, of a form with more parts than it reads (a thousand)."""

_UNSUPPORTED_TYPE: Final = "Unsupported type: "
"""What Litestar says of a form's field that is text where a file is expected."""

_DOCUMENTED: Final = {
    400: "A field is wrong: `param` names it, `message` says what to do.",
    401: "No API key, or one that is not known (`invalid_api_key`).",
    403: "A key without the admin right (`insufficient_permissions`), or another site's page (`foreign_origin`).",
    404: "There is no such thing (`model_not_found`, `voice_not_found`).",
    408: "The rest of the body did not come in time (`request_timeout`).",
    409: "The model is in use (`model_busy`).",
    413: "The body or the upload is too large (`request_too_large`).",
    415: "Another media type is expected (`unsupported_media_type`).",
    429: "The queue is full (`queue_full`); `Retry-After` says when to try again.",
    500: "The server made a mistake; trying again is of no use.",
    503: "No GPU worker, no memory or no weights now, or shutting down; `Retry-After` says when to try again.",
}

_WITHOUT_V1: Final = "OpenAI's paths begin with /v1, so a client's base URL ends with it"
"""The commonest mistake of whoever points a client here for the first time."""

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


class ApiError(Exception):
    """Something that a client is told: `code` is a key of CODES, `param` the request field at fault.

    `retry_after_s` is when trying again may help; `status` replaces the code's usual one.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        usual, self.type = CODES.get(code, CODES["internal_error"])
        self.status = status or usual
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong: `message` says what to do, `param` names the field at fault, `code` is for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's shape of every error."""

    error: ErrorBody


def envelope(error: ApiError) -> ErrorEnvelope:
    """The body that tells a client of `error`."""
    return ErrorEnvelope(
        error=ErrorBody(message=error.message, type=error.type, param=error.param, code=error.code),
    )


def headers_of(error: ApiError) -> dict[str, str]:
    """The headers that go with an error: when to try again, or that trying again is of no use."""
    headers = {}
    if error.status in {429, 503}:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    elif error.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        # The OpenAI SDK repeats a 500 twice by itself, which would spend the GPU on the same failure again.
        headers["x-should-retry"] = "false"
    if error.status == http.HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.code == "model_unavailable":
        # Weights do not come by themselves: the SDK would sleep through Retry-After twice, two minutes in all.
        headers["x-should-retry"] = "false"
    return headers


def answer(error: ApiError, headers: dict[str, str] | None = None) -> Response[ErrorEnvelope]:
    """The HTTP response that tells a client of `error`."""
    return Response(
        envelope(error),
        status_code=error.status,
        media_type=MediaType.JSON,
        headers=headers_of(error) | (headers or {}),
    )


def documented(*statuses: int) -> dict[int, ResponseSpec]:
    """The error answers of an operation, for the OpenAPI."""
    return {
        status: ResponseSpec(ErrorEnvelope, description=_DOCUMENTED[status], generate_examples=False)
        for status in statuses
    }


def exception_handlers() -> ExceptionHandlersMap:
    """The application's handlers: our own errors, the framework's, and everything that nobody expected."""
    return {ApiError: _our_own, HTTPException: _of_the_framework, Exception: unexpected}


def _our_own(_request: Request[Any, Any, Any], error: Exception) -> Response[ErrorEnvelope]:
    if not isinstance(error, ApiError):
        raise TypeError(type(error))
    return answer(error)


def _of_the_framework(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorEnvelope]:
    if not isinstance(error, HTTPException):
        raise TypeError(type(error))
    if isinstance(error, InternalServerException) and error.detail == _BODY_INCOMPLETE:
        stalled = request.scope["state"].get(BODY_STALLED)
        code, message = ("request_timeout", _STALLED) if stalled else ("invalid_body", _BROKEN_OFF)
        return answer(ApiError(code, message))
    if error.status_code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        return unexpected(request, error)
    if isinstance(error, ValidationException):
        return answer(_first_problem(request, error))
    # Whatever answers GET answers HEAD.
    kept = {
        name: value.replace("GET", "GET, HEAD")
        for name, value in (error.headers or {}).items()
        if name.lower() == "allow"
    }
    return answer(_in_our_words(request, error), kept)


def _in_our_words(request: Request[Any, Any, Any], error: HTTPException) -> ApiError:
    """What Litestar refuses by itself, before a handler is asked."""
    status = error.status_code
    message = f"{error.detail.rstrip('.')}."
    asked = f"{request.scope['method']} {shown_path(request.scope)}"
    if error.detail == _TOO_MANY_PARTS and status == http.HTTPStatus.BAD_REQUEST:
        status = http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        message = "The form has more than a thousand parts."
    elif status == http.HTTPStatus.NOT_FOUND:
        message = f"There is nothing at {asked}; {_WITHOUT_V1 if _lacks_v1(request) else '/docs lists what there is'}."
    elif status == http.HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{asked} is not possible; the Allow header says what is."
    elif status == http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        limit_mib = request.app.state.settings.max_body_mb
        message = f"The request's body is larger than the {limit_mib} MiB that this server takes (TTS_MAX_BODY_MB)."
    return ApiError(_CODE_OF_STATUS.get(status, "invalid_value"), message, status=status)


def _lacks_v1(request: Request[Any, Any, Any]) -> bool:
    return str(request.scope["path"]).startswith(("/audio/", "/models"))


def unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorEnvelope]:
    """What nobody foresaw: a 500 that says nothing, and a log line that says all."""
    _log.error(
        "request failed", request_id=request_id_of(request.scope), path=shown_path(request.scope), exc_info=error
    )
    return answer(ApiError("internal_error", "The server made a mistake; its log says which."))


def _first_problem(request: Request[Any, Any, Any], error: ValidationException) -> ApiError:
    """The first field that Litestar's validation names, and what is wrong with it."""
    first = error.extra[0] if isinstance(error.extra, list) and error.extra else {}
    said = str(first.get("message") or error.detail)
    field = first.get("key")
    if missing := missing_field(said):
        field = missing
        said = "is missing"
    elif _UNSUPPORTED_TYPE in said:
        said = "must be a file"
    else:
        said = reword(said, _choices_of(request, field), from_text=True)
    if field == "data":
        # Litestar's name of the body.
        return ApiError("invalid_json", "The body is missing.")
    return ApiError("invalid_value", f"{field}: {said}." if field else f"{said}.", param=field)


def _choices_of(request: Request[Any, Any, Any], field: str | None) -> list[str]:
    """What `field` can be, a parameter of the handler or a field of the Struct that is its `data`."""
    parameters = request.route_handler.parsed_fn_signature.parameters
    found = parameters.get(field or "")
    if found is None and "data" in parameters:
        return choices_in(get_type_hints(parameters["data"].annotation, include_extras=True).get(field or ""))
    return choices_in(found.raw) if found else []


def shown_path(scope: Any) -> str:
    """A request's path for people to read; a client may send one of any length, and with what steers a terminal."""
    path = str(scope["path"])
    shown = path if len(path) <= 200 else path[:200] + "…"  # noqa: PLR2004 - long enough for any path of ours
    return "".join(char if char.isprintable() else f"%{ord(char):02X}" for char in shown)
