"""Errors as ElevenLabs' clients read them, and how such a client is told from others.

Its SDK raises what it gets: a 422 is a list of wrong fields, everything else an object with `status` and `message`.
"""

import http
from typing import Any, Final

import msgspec
from litestar import MediaType, Response
from litestar.datastructures import Headers
from litestar.openapi.datastructures import ResponseSpec

from server.http.errors import ApiError, headers_of

KEY_HEADER: Final = "xi-api-key"
"""The header in which ElevenLabs' clients send their key; no other client sends it."""

_PATHS: Final = ("/v1/text-to-speech", "/v1/voices", "/v2/voices")
_FIELD_CODES: Final = {"invalid_value", "invalid_json", "invalid_body"}


class ElevenLabsErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """ElevenLabs' shape: an object with `status` and `message`, or a list of wrong fields."""

    detail: dict[str, Any] | list[dict[str, Any]]


def is_elevenlabs(scope: Any) -> bool:
    """True for a request with ElevenLabs' key header, or to one of its paths."""
    return str(scope["path"]).startswith(_PATHS) or KEY_HEADER in Headers.from_scope(scope)


def elevenlabs_error(error: ApiError, request_id: str, headers: dict[str, str] | None = None) -> Response[Any]:
    """The HTTP response for `error`."""
    status = error.status
    detail: Any = {
        "status": error.code,
        "message": error.message,
        "type": error.type,
        "code": error.code,
        "param": error.param,
        "request_id": request_id,
    }
    if status == http.HTTPStatus.BAD_REQUEST and error.code in _FIELD_CODES:
        status = http.HTTPStatus.UNPROCESSABLE_ENTITY
        place = ["body", error.param] if error.param else ["body"]
        detail = [{"loc": place, "msg": error.message, "type": error.code}]
    elif error.code == "voice_not_found":
        status = http.HTTPStatus.NOT_FOUND  # the voice stands in the path
    return Response(
        ElevenLabsErrorBody(detail=detail),
        status_code=status,
        media_type=MediaType.JSON,
        headers=headers_of(error) | (headers or {}),
    )


def elevenlabs_documented() -> dict[int, ResponseSpec]:
    """The error responses of one of these operations, for the OpenAPI document."""
    spec = ResponseSpec(ElevenLabsErrorBody, description="`detail` says what is wrong.", generate_examples=False)
    return dict.fromkeys((400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503), spec)
