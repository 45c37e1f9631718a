"""JSON body -> Struct: strict types, aliases of field names, and an error that names the wrong field.

Litestar's own decoding is lenient ("1" is a number) and hides which field was wrong.
The DTO of this module replaces the decoding and leaves everything else, the OpenAPI included, to Litestar.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_type_hints

import msgspec
from litestar.dto import AbstractDTO, DTOConfig
from litestar.typing import FieldDefinition

from server.http.errors import ApiError
from shared.validation_messages import choices_in, missing_field, reword, reword_malformed_json, split_path

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator
    from litestar.openapi.spec import Reference, Schema

T = TypeVar("T")


class JsonDecoder(Generic[T]):
    """Decodes JSON bodies as a `kind`; `aliases` are other names of its fields."""

    def __init__(self, kind: type[T], aliases: dict[str, str]) -> None:
        self.kind = kind
        self._aliases = aliases
        # Splits a body into its known fields, each still JSON, and skips the rest. Decoding all of it could block the
        # event loop: 16 MB of empty lists in an unknown field take 1.5 s and 500 MB.
        fields = [(name, msgspec.Raw, msgspec.Raw(b"")) for name in (*get_type_hints(kind), *aliases)]
        self._outline = msgspec.json.Decoder(msgspec.defstruct("Outline", fields))

    def decode(self, body: bytes, content_type: str) -> T:
        """Decode `body`. Raises ApiError: `unsupported_media_type`, `invalid_json`, `invalid_value`.

        An alias counts if the field itself is missing or null; of a repeated key the last counts.
        """
        if content_type not in {"", "application/json"} and not content_type.endswith("+json"):
            raise ApiError("unsupported_media_type", "Send the body as JSON, with Content-Type: application/json.")
        try:
            body.decode()  # msgspec does not check the text of fields that it skips
            return msgspec.json.decode(self._known_fields(body), type=self.kind)
        except UnicodeDecodeError:
            raise ApiError("invalid_json", "The body is not UTF-8.") from None
        except RecursionError:
            raise ApiError("invalid_json", "The body is nested too deeply.") from None
        except msgspec.ValidationError as error:
            raise _of_field(str(error), self.kind) from None
        except msgspec.DecodeError as error:
            problem = reword_malformed_json(str(error), body)
            raise ApiError("invalid_json", f"The body is not valid JSON: {problem}.") from None

    def _known_fields(self, body: bytes) -> bytes:
        """The JSON object `body` reduced to the known fields, each under its own name."""
        try:
            split = self._outline.decode(body)
        except msgspec.ValidationError:
            raise ApiError("invalid_json", "The body must be a JSON object.") from None
        fields = {name: value for name in split.__struct_fields__ if (value := bytes(getattr(split, name)))}
        for alias, field in self._aliases.items():
            value = fields.pop(alias, b"null")
            if value != b"null" and fields.get(field, b"null") == b"null":
                fields[field] = value
        return b"{%s}" % b",".join(b'"%s":%s' % (field.encode(), value) for field, value in fields.items())


def _of_field(message: str, kind: Any) -> ApiError:
    """The error for a body that is no `kind`, by msgspec's message: `Expected ... - at `$.speed`` is about speed."""
    problem, field = split_path(message)
    if not field and (missing := missing_field(problem)):
        return ApiError("invalid_value", f"{missing} is missing.", param=missing)
    if not field:
        return ApiError("invalid_value", f"The body is wrong: {reword(problem)}.")
    choices = choices_in(get_type_hints(kind, include_extras=True)[field])
    return ApiError("invalid_value", f"{field}: {reword(problem, choices)}.", param=field)


class StrictJson(AbstractDTO[T], Generic[T]):
    """The DTO that decodes a handler's `data` with `decoder`; the OpenAPI schema is the Struct's own."""

    config: ClassVar[DTOConfig] = DTOConfig()
    decoder: ClassVar[JsonDecoder[Any]]

    def decode_bytes(self, value: bytes) -> Any:
        """Decode the body; Litestar's hook."""
        content_type, _parameters = self.asgi_connection.content_type  # type: ignore[attr-defined] # it is a Request
        return self.decoder.decode(value, content_type)

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
