"""A body that is a form or JSON -> Struct: the DTO for handlers that take both, with the same leniency for both.

Litestar chooses between the two when the application is built, by the annotation of `data`. So a handler is declared
for forms, and `before_request=keep_json` keeps the body of a JSON request for the DTO.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from litestar import Request
from litestar.enums import RequestEncodingType
from litestar.openapi.spec import Operation, RequestBody

from server.http.errors import ApiError
from server.http.json_bodies import JsonBodyDto

T = TypeVar("T")

_JSON_BODY: Final = "json_body"
"""The key in `request.state` of a body that is no form."""


async def keep_json(request: Request[Any, Any, Any]) -> None:
    """Keep the body of a request that is no form; Litestar then takes its form for an empty one."""
    content_type, _parameters = request.content_type
    if content_type == RequestEncodingType.MULTI_PART:
        return
    body = await request.body()
    if not body:
        raise ApiError("invalid_json", "The body is missing: send a form (multipart/form-data) or JSON.")
    request.state[_JSON_BODY] = body
    await request.form()


class FormOrJsonDto(JsonBodyDto[T]):
    """The DTO that decodes a handler's `data` with `decoder`, from a form or from JSON."""

    def decode_builtins(self, value: Any) -> Any:
        """Decode the body; Litestar's hook, with the fields of the form."""
        body = self.asgi_connection.state.get(_JSON_BODY)
        if body is not None:
            return self.decode_bytes(body)
        return self.decoder.decode_form(value if isinstance(value, Mapping) else {})


@dataclass
class FormOrJson(Operation):
    """Documents JSON beside the form, by the same schema."""

    def __post_init__(self) -> None:
        """Add the second media type."""
        if isinstance(self.request_body, RequestBody):
            schema = self.request_body.content[RequestEncodingType.MULTI_PART]
            self.request_body.content[RequestEncodingType.JSON] = schema
