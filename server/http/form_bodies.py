"""A body that is a form or JSON -> Struct: the DTO for handlers that take both, with the same leniency for both.

Litestar chooses between the two when the application is built, by the annotation of `data`. So a handler is declared
for forms, and `before_request=keep_json` keeps the body of a JSON request for the DTO.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from litestar import Request, Response
from litestar.datastructures import UploadFile
from litestar.enums import RequestEncodingType
from litestar.openapi.spec import Operation, RequestBody
from litestar.types import ExceptionHandlersMap

from server.http.error_handlers import handle_unexpected
from server.http.errors import ApiError, error_response
from server.http.json_bodies import JsonBodyDto

T = TypeVar("T")

_JSON_BODY: Final = "json_body"
"""The key in `request.state` of a body that is no form."""


async def read_upload(upload: UploadFile | None, param: str, max_bytes: int) -> bytes:
    """The file of the form field `param`. Raises ApiError: `invalid_value` without one, `request_too_large`."""
    if upload is None:
        raise ApiError("invalid_value", f"{param}: is missing; send a recording as a file.", param=param)
    data = await upload.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ApiError("request_too_large", f"{param}: must have at most {max_bytes // 2**20} MiB.", param=param)
    return data


def _broken_form(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer the Python errors that Litestar's form parser raises for text in a wrong or an unknown encoding."""
    of_parser = isinstance(error, UnicodeError) and not isinstance(error, UnicodeEncodeError)
    if of_parser or type(error) is LookupError:
        message = "The form contains text that is not UTF-8. A part that is a file needs a filename."
        return error_response(ApiError("invalid_value", message))
    return handle_unexpected(request, error)


BROKEN_FORM: Final[ExceptionHandlersMap] = {UnicodeError: _broken_form, LookupError: _broken_form}
"""The exception handlers of a handler that takes a form."""


async def keep_json(request: Request[Any, Any, Any]) -> None:
    """Keep the body of a request that is no form; Litestar then takes its form for an empty one."""
    content_type, _parameters = request.content_type
    if content_type == RequestEncodingType.MULTI_PART:
        return
    body = await request.body()
    if not body:
        raise ApiError("invalid_json", "The body is missing: send a form (multipart/form-data) or JSON.")
    if content_type == RequestEncodingType.URL_ENCODED and not body.lstrip().startswith(b"{"):
        raise ApiError("unsupported_media_type", "Send the form as multipart/form-data, or send JSON.")
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
