"""How a JSON body becomes a Struct: strictly, with aliases of field names, and with an error that names the field.

Litestar's own way converts leniently ("1" is a number) and hides which field was wrong; hence this DTO,
which takes over the decoding and leaves everything else, the OpenAPI included, to Litestar.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_type_hints

import msgspec
from litestar.dto import AbstractDTO, DTOConfig
from litestar.typing import FieldDefinition

from server.http.errors import ApiError
from server.schemas import ALIASES, SpeechRequest
from shared.validation_messages import choices_in, missing_field, reword, reword_malformed_json, split_path

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator
    from litestar.openapi.spec import Reference, Schema

T = TypeVar("T")


def outline_of(kind: type[msgspec.Struct], aliases: dict[str, str]) -> "msgspec.json.Decoder[Any]":
    """Takes a body apart into the fields of `kind` and their aliases, each still JSON, and makes nothing of the rest.

    Whole, 16 MB of empty lists in a field that nobody knows would hold the event loop for 1.5 s and take 500 MB.
    """
    fields = [(name, msgspec.Raw, msgspec.Raw(b"")) for name in (*kind.__struct_fields__, *aliases)]
    return msgspec.json.Decoder(msgspec.defstruct("Outline", fields))


def decode_json(
    body: bytes, content_type: str, kind: type[T], aliases: dict[str, str], outline: "msgspec.json.Decoder[Any]"
) -> T:
    """`body` as a `kind`; ApiError (`unsupported_media_type`, `invalid_json`, `invalid_value`) where it is none.

    An alias counts where the field itself is missing or null; of a key written twice the last counts.
    `outline` is that of `kind` and `aliases`.
    """
    if content_type not in {"", "application/json"} and not content_type.endswith("+json"):
        raise ApiError("unsupported_media_type", "Send the body as JSON, with Content-Type: application/json.")
    try:
        body.decode()  # msgspec looks at no text that it does not keep
        return msgspec.json.decode(_known_fields(body, aliases, outline), type=kind)
    except UnicodeDecodeError:
        raise ApiError("invalid_json", "The body is not UTF-8.") from None
    except RecursionError:
        raise ApiError("invalid_json", "The body is nested too deeply.") from None
    except msgspec.ValidationError as error:
        raise _of_field(str(error), kind) from None
    except msgspec.DecodeError as error:
        problem = reword_malformed_json(str(error), body)
        raise ApiError("invalid_json", f"The body is not valid JSON: {problem}.") from None


def _known_fields(body: bytes, aliases: dict[str, str], outline: "msgspec.json.Decoder[Any]") -> bytes:
    """The JSON object `body` with nothing in it but known fields, each under its own name."""
    try:
        taken = outline.decode(body)
    except msgspec.ValidationError:
        raise ApiError("invalid_json", "The body must be a JSON object.") from None
    fields = {name: value for name in taken.__struct_fields__ if (value := bytes(getattr(taken, name)))}
    for alias, field in aliases.items():
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
    """Decodes the `data` of a handler with `decode_json`; the schema stays the Struct's own."""

    config: ClassVar[DTOConfig] = DTOConfig()
    kind: ClassVar[type[Any]]
    aliases: ClassVar[dict[str, str]]
    outline: ClassVar["msgspec.json.Decoder[Any]"]

    def decode_bytes(self, value: bytes) -> Any:
        """The Struct that the body describes."""
        content_type, _parameters = self.asgi_connection.content_type  # type: ignore[attr-defined] # it is a Request
        return decode_json(value, content_type, self.kind, self.aliases, self.outline)

    @classmethod
    def is_supported_model_type_field(cls, field_definition: FieldDefinition) -> bool:
        """Whether the handler's annotation is the Struct that this class decodes."""
        return field_definition.annotation is cls.kind

    @classmethod
    def create_for_field_definition(cls, *_args: Any, **_kwargs: Any) -> None:
        """No transfer model stands between body and Struct."""

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: "SchemaCreator"
    ) -> "Reference | Schema":
        """The Struct's own schema."""
        _ = handler_id
        return schema_creator.for_field_definition(field_definition)


class SpeechJson(StrictJson[SpeechRequest]):
    """The body of a request for speech."""

    kind = SpeechRequest
    aliases = ALIASES
    outline = outline_of(SpeechRequest, ALIASES)
