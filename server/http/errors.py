"""The error contract: which HTTP status, OpenAI type and headers each error code has, and the body that carries it.

Any module of the server raises `ApiError` with a code of `CODES`; only this module knows what that code is in HTTP.
Exceptions that are no ApiError are translated in error_handlers.py.
"""

import http
import math
from typing import Final

import msgspec
from litestar import MediaType, Response
from litestar.openapi.datastructures import ResponseSpec

from shared.protocol import RateLimit
from shared.redaction import redact

INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"
RATE: Final = "rate_limit_error"

CODES: Final[dict[str, tuple[int, str]]] = {
    "invalid_value": (400, INVALID),
    "invalid_json": (400, INVALID),
    "invalid_body": (400, INVALID),
    "voice_not_found": (400, INVALID),
    "consent_not_found": (400, INVALID),
    "task_mismatch": (400, INVALID),
    "invalid_audio": (400, INVALID),
    "timestamps_unavailable": (400, INVALID),
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
    "range_not_satisfiable": (416, INVALID),
    "queue_full": (429, RATE),
    "rate_limit_exceeded": (429, RATE),
    "synthesis_failed": (500, SERVER),
    "internal_error": (500, SERVER),
    "worker_unavailable": (503, SERVER),
    "insufficient_vram": (503, SERVER),
    "model_unavailable": (503, SERVER),
    "shutting_down": (503, SERVER),
    "deadline_exceeded": (504, SERVER),
}
"""The codes of the contract: HTTP status and OpenAI's type of error. An unknown code counts as our own fault: 500."""

CLIENT_GONE: Final = 499
"""The status of a response that no client reads; nginx logs the same one."""

_DOCUMENTED: Final = {
    400: "A field is wrong: `param` names the field, `message` says how to correct it.",
    401: "The API key is missing or unknown (`invalid_api_key`).",
    403: "The key may not do this (`insufficient_permissions`), or the page of another site sent the request "
    "(`foreign_origin`).",
    404: "There is no such model, voice or consent (`model_not_found`, `voice_not_found`, `consent_not_found`).",
    408: "The rest of the body, or of a text in pieces, did not arrive in time (`request_timeout`).",
    409: "The model is in use (`model_busy`).",
    413: "The body or the upload is too large (`request_too_large`).",
    415: "The operation expects another media type (`unsupported_media_type`).",
    416: "The range begins behind the end; `Content-Range` has the size (`range_not_satisfiable`).",
    429: "The queue is full (`queue_full`), or the key has reached a limit, the client's address has too many requests "
    "in progress or uploads take too much memory (`rate_limit_exceeded`); `Retry-After` says when to try again.",
    500: "The server made a mistake; trying again does not help.",
    503: "The GPU worker, memory or the model's weights are missing now, or the server is shutting down; "
    "`Retry-After` says when to try again.",
    504: "No audio could be made before the deadline of `x-deadline-ms` (`deadline_exceeded`).",
}


class ApiError(Exception):
    """A failure that the client sees: `code` is a key of CODES, `param` the request field at fault.

    `retry_after_s` is the pause after which a retry may succeed; `status` replaces the status of the code.
    `message` may quote what the client sent, but no key.
    `rate_limit` is what the key has left of its requests a minute.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
        rate_limit: RateLimit | None = None,
    ) -> None:
        super().__init__(redact(message))
        usual, self.type = CODES.get(code, CODES["internal_error"])
        self.status = status or usual
        self.code = code
        self.message = redact(message)
        self.param = param
        self.retry_after_s = retry_after_s
        self.rate_limit = rate_limit


def internal_error() -> ApiError:
    """The error for a mistake of our own, whose details are for the log alone."""
    return ApiError("internal_error", "The server made a mistake; its log says which.")


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """An error: `message` is for people, `code` for programs; `param` names the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's shape of every error."""

    error: ErrorBody


def envelope(error: ApiError) -> ErrorEnvelope:
    """The response body for `error`."""
    return ErrorEnvelope(
        error=ErrorBody(message=error.message, type=error.type, param=error.param, code=error.code),
    )


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response[ErrorEnvelope]:
    """The HTTP response for `error`, with `headers` beside those of its code."""
    return Response(
        envelope(error),
        status_code=error.status,
        media_type=MediaType.JSON,
        headers=headers_of(error) | (headers or {}),
    )


def headers_of(error: ApiError) -> dict[str, str]:
    """The headers that say when to retry, or that a retry does not help, and how many requests the key has left."""
    headers = rate_limit_headers(error.rate_limit)
    if error.status in {429, 503}:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    elif error.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        # The OpenAI SDK retries a 500 twice by itself, which would spend the GPU on the same failure again.
        headers["x-should-retry"] = "false"
    if error.status == http.HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.code == "model_unavailable":
        # Weights do not appear by themselves: the SDK would sleep through Retry-After twice, two minutes in all.
        headers["x-should-retry"] = "false"
    return headers


def rate_limit_headers(state: RateLimit | None) -> dict[str, str]:
    """OpenAI's headers for the requests that a key has left in its minute; none without such a limit."""
    if state is None:
        return {}
    return {
        "x-ratelimit-limit-requests": str(state.limit),
        "x-ratelimit-remaining-requests": str(state.remaining),
        "x-ratelimit-reset-requests": f"{state.reset_s:.3f}s",
    }


def documented(*statuses: int) -> dict[int, ResponseSpec]:
    """The error responses of an operation, for the OpenAPI document."""
    return {
        status: ResponseSpec(ErrorEnvelope, description=_DOCUMENTED[status], generate_examples=False)
        for status in statuses
    }
