"""JSON body -> Struct: aliases of field names, what leniency.py takes, and an error that names the wrong field.

Litestar's own decoding hides which field was wrong.
The DTO of this module replaces the decoding and leaves everything else, the OpenAPI included, to Litestar.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar, get_type_hints

import msgspec
from litestar.dto import AbstractDTO, DTOConfig
from litestar.typing import FieldDefinition

from server.http.body_text import to_utf8, without_halves
from server.http.errors import ApiError
from server.http.leniency import LenientFields, list_of_objects
from shared.validation_messages import choices_in, missing_field, place_in, reword, reword_malformed_json, split_path

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator
    from litestar.openapi.spec import Reference, Schema

T = TypeVar("T")


_TYPES: Final = {"", "application/json", "text/json", "text/plain"}
"""The media types that a JSON body may have, beside all that end with +json."""

_FORM: Final = "application/x-www-form-urlencoded"
"""curl -d sends this type by default. No such form begins with a brace."""


class JsonDecoder(Generic[T]):
    """Decodes JSON bodies as a `kind`; `aliases` are other names of its fields."""

    def __init__(self, kind: type[T], aliases: dict[str, str]) -> None:
        self.kind = kind
        self._fields = LenientFields(kind, aliases)
        self._strict = msgspec.json.Decoder(kind)

    def decode(self, body: bytes, content_type: str, charset: str | None = None) -> T:
        """Decode `body`. Raises ApiError: `unsupported_media_type`, `invalid_json`, `invalid_value`.

        An alias counts if the field itself is absent or empty; of a repeated key the last counts.
        """
        return self.of_fields(self.fields(body, content_type, charset))

    def fields(self, body: bytes, content_type: str, charset: str | None = None) -> dict[str, Any]:
        """The known fields of the JSON object `body`, each under its own name, for `of_fields`. Raises ApiError."""
        is_json = content_type in _TYPES or content_type.endswith("+json")
        if not is_json and not (content_type == _FORM and body.lstrip().startswith(b"{")):
            raise ApiError("unsupported_media_type", "Send the body as JSON, with Content-Type: application/json.")
        body = to_utf8(body, charset)
        with _json_errors(body):
            return self._known_fields(body)

    def fields_of_each(self, items: msgspec.Raw) -> list[dict[str, Any]] | None:
        """The known fields of each object in a JSON list; None if `items` is something else."""
        with _json_errors(bytes(items)):
            found = list_of_objects(items, self._fields)
        return found if isinstance(found, list) else None

    def of_fields(self, fields: dict[str, Any]) -> T:
        """The Struct with these fields. Raises ApiError: `invalid_value`."""
        body = msgspec.json.encode(fields)
        try:
            with _json_errors(body):
                return self._strict.decode(body)
        except msgspec.ValidationError as error:
            raise _of_field(str(error), self.kind) from None

    def decode_form(self, fields: Mapping[str, Any]) -> T:
        """Decode the fields of a form: strings and files. Raises ApiError (`invalid_value`)."""
        try:
            return msgspec.convert(self._fields.of_form(fields), self.kind)
        except msgspec.ValidationError as error:
            raise _of_field(str(error), self.kind, from_text=True) from None

    def _known_fields(self, body: bytes) -> dict[str, Any]:
        """The known fields of the JSON object `body`, each under its own name."""
        try:
            try:
                return self._fields.of_json(body)
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:
                return self._fields.of_json(without_halves(body))
        except msgspec.ValidationError:
            raise ApiError("invalid_json", "The body must be a JSON object.") from None


@contextmanager
def _json_errors(body: bytes) -> Iterator[None]:
    """Raise ApiError (`invalid_json`) for JSON that cannot be read."""
    try:
        yield
    except RecursionError:
        raise ApiError("invalid_json", "The body is nested too deeply.") from None
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        problem = reword_malformed_json(str(error), body)
        raise ApiError("invalid_json", f"The body is not valid JSON: {problem}.") from None


def _of_field(message: str, kind: Any, *, from_text: bool = False) -> ApiError:
    """The error for a body that is no `kind`, by msgspec's message: `Expected ... - at `$.speed`` is about speed.

    `from_text`: the body is a form, whose values are strings whatever is meant.
    """
    problem, field = split_path(message)
    if not field and (missing := missing_field(problem)):
        return ApiError("invalid_value", f"{missing} is missing.", param=missing)
    if not field:
        return ApiError("invalid_value", f"The body is wrong: {reword(problem)}.")
    choices = choices_in(get_type_hints(kind, include_extras=True)[field])
    problem = reword(problem, choices, from_text=from_text)
    return ApiError("invalid_value", f"{place_in(message)}: {problem}.", param=field)


class JsonBodyDto(AbstractDTO[T], Generic[T]):
    """The DTO that decodes a handler's `data` with `decoder`; the OpenAPI schema is the Struct's own."""

    config: ClassVar[DTOConfig] = DTOConfig()
    decoder: ClassVar[JsonDecoder[Any]]

    def decode_bytes(self, value: bytes) -> Any:
        """Decode the body; Litestar's hook."""
        content_type, parameters = self.asgi_connection.content_type  # type: ignore[attr-defined] # it is a Request
        return self.decoder.decode(value, content_type, parameters.get("charset"))

    @classmethod
    def is_supported_model_type_field(cls, field_definition: FieldDefinition) -> bool:
        """True if the handler's annotation is the Struct that this class decodes."""
        return field_definition.annotation is cls.decoder.kind

    @classmethod
    def create_for_field_definition(cls, *_args: Any, **_kwargs: Any) -> None:
        """Litestar's hook; there is no transfer model between body and Struct."""

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: "SchemaCreator"
    ) -> "Reference | Schema":
        """The Struct's own schema."""
        _ = handler_id
        return schema_creator.for_field_definition(field_definition)
