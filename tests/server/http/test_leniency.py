"""Values that clients write instead of strict ones: the rules for each type, on every field of the real requests."""

from typing import Annotated, Any, Final, Literal

import msgspec
import msgspec.inspect as mi
import pytest
from msgspec import Meta

from server.http.errors import ApiError
from server.http.json_bodies import JsonDecoder
from server.http.leniency import TRIMMED, LenientFields, absent
from server.schemas import ALIASES, SpeechRequest, VoiceRef

SPEECH: Final = JsonDecoder(SpeechRequest, ALIASES)
FIELDS: Final[dict[str, mi.Field]] = {
    field.encode_name: field
    for field in mi.type_info(SpeechRequest).fields  # type: ignore[attr-defined]
}
OPTIONAL: Final = [name for name, field in FIELDS.items() if not field.required]


def _members(kind: Any) -> list[Any]:
    """The types that a field allows, without their Metas."""
    if isinstance(kind, mi.Metadata):
        return _members(kind.type)
    return [part for member in kind.types for part in _members(member)] if isinstance(kind, mi.UnionType) else [kind]


def _of_type(*types: type) -> list[tuple[str, Any]]:
    """The fields that allow values of one of `types` but no string, with that type."""
    found = []
    for name, field in FIELDS.items():
        members = _members(field.type)
        if not any(isinstance(member, mi.StrType) for member in members):
            found += [(name, member) for member in members if isinstance(member, types)]
    return found


def _decoded(**fields: Any) -> SpeechRequest:
    return SPEECH.decode(msgspec.json.encode({"input": "hello"} | fields), "application/json")


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("empty", ["", " \n", None], ids=["empty", "blank", "null"])
def test_an_empty_optional_field_is_absent(name: str, empty: str | None) -> None:
    """An empty string, white space and null are the absence of every optional field."""
    assert _decoded(**{name: empty}) == _decoded()


@pytest.mark.parametrize(("name", "kind"), _of_type(mi.IntType, mi.FloatType))
def test_numbers_as_strings(name: str, kind: Any) -> None:
    """Every number may stand in quotes, with white space around it; one whole number may be written with a point."""
    number = max(kind.ge or kind.gt or 0, 1)
    expected = getattr(_decoded(**{name: number}), name)
    for spelling in (f"{number}", f" {number}\n", f"+{number}", f"{number}.0", f"{number}e0", float(number)):
        assert getattr(_decoded(**{name: spelling}), name) == expected
    for wrong in ("fast", "nan", "inf", "1_0", "0x1", "1,5", "½", "\u0661", "1e999", "1" * 50, "--1", "."):
        with pytest.raises(ApiError) as caught:
            _decoded(**{name: wrong})
        assert caught.value.param == name


@pytest.mark.parametrize(("name", "_kind"), _of_type(mi.IntType))
def test_whole_numbers_stay_whole(name: str, _kind: Any) -> None:
    """A fraction is no whole number, in quotes or not."""
    for wrong in (1.5, "1.5"):
        with pytest.raises(ApiError, match="must be a whole number"):
            _decoded(**{name: wrong})


@pytest.mark.parametrize(("name", "_kind"), _of_type(mi.BoolType))
def test_booleans_as_strings(name: str, _kind: Any) -> None:
    """The words true and false are taken in any case; other words and numbers are not."""
    for spelling, meant in (("true", True), ("True", True), (" FALSE ", False), ("false", False)):
        assert getattr(_decoded(**{name: spelling}), name) is meant
    for wrong in ("yes", "1", 1, 0.0, [True]):
        with pytest.raises(ApiError) as caught:
            _decoded(**{name: wrong})
        assert caught.value.param == name


@pytest.mark.parametrize(("name", "kind"), _of_type(mi.LiteralType))
def test_the_case_of_a_choice(name: str, kind: Any) -> None:
    """Each word of an enumeration is taken in any case, with white space around it."""
    for word in kind.values:
        for spelling in (word, word.upper(), word.lower(), f" {word.title()}\n"):
            assert getattr(_decoded(**{name: spelling}), name) == word
    with pytest.raises(ApiError, match=f"{name}: must be one of"):
        _decoded(**{name: "nothing"})


@pytest.mark.parametrize("name", ["model", "voice", "language"])
def test_white_space_around_names(name: str) -> None:
    """White space around a name means nothing."""
    assert getattr(_decoded(**{name: " \tEcho\n"}), name) == "Echo"


Case = tuple[dict[str, Any], str, Any]
MEANT: Final[list[Case]] = [
    ({"seed": -1}, "seed", None),
    ({"seed": -1.0}, "seed", None),
    ({"seed": "-1"}, "seed", None),
    ({"seed": "-1.0"}, "seed", None),
    ({"seed": 42.0}, "seed", 42),
    ({"seed": "9007199254740993"}, "seed", 9007199254740993),
    ({"speed": ".5e1"}, "speed", ApiError),
    ({"seed": -2}, "seed", ApiError),
    ({"seed": True}, "seed", ApiError),
    ({"seed": 1e300}, "seed", ApiError),
    ({"top_k": -1}, "top_k", ApiError),
    ({"speed": "9"}, "speed", ApiError),
    ({"speed": True}, "speed", ApiError),
    ({"voice": {"id": " nova "}}, "voice", VoiceRef(id="nova")),
    ({"voice": {"id": ""}}, "voice", ApiError),
    ({"voice": {"id": 1}}, "voice", ApiError),
    ({"voice": {}}, "voice", ApiError),
    ({"voice": "", "speaker": "nova"}, "voice", "nova"),
    ({"speaker": "", "voice": "nova"}, "voice", "nova"),
    ({"speaker": "alloy", "voice": "nova"}, "voice", "nova"),
    ({"speaker": " alloy "}, "voice", "alloy"),
    ({"input": "", "text": "hi"}, "input", "hi"),
    ({"input": None, "text": "hi"}, "input", "hi"),
    ({"text": "", "input": "hi"}, "input", "hi"),
    ({"input": " hi "}, "input", " hi "),
    ({"input": " "}, "input", " "),
    ({"instruct": "softly", "instructions": " "}, "instructions", "softly"),
    ({"keep_alive": "5m"}, "keep_alive", "5m"),
    ({"keep_alive": 300.0}, "keep_alive", 300.0),
    ({"keep_alive": -1}, "keep_alive", -1),
    ({"ref_text": "\u200b"}, "ref_text", "\u200b"),
    ({"input": ""}, "input", ApiError),
    ({"input": 5}, "input", ApiError),
    ({"model": 5}, "model", ApiError),
]


@pytest.mark.parametrize(("fields", "name", "meant"), MEANT, ids=[str(case[0]) for case in MEANT])
def test_what_is_meant(fields: dict[str, Any], name: str, meant: Any) -> None:
    """Each spelling gives the value, or an error that names the field."""
    if meant is ApiError:
        with pytest.raises(ApiError) as caught:
            _decoded(**fields)
        assert caught.value.param == name
    else:
        assert getattr(_decoded(**fields), name) == meant


H = "\\ud83d"
L = "\\ude00"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (f"Hi {H}", "Hi \ufffd"),
        (f"{L} there", "\ufffd there"),
        (f"{H}{L}", "😀"),
        (f"{H}{H}{L}", "\ufffd😀"),
        (f"{H}{L}{L}", "😀\ufffd"),
        (f"{L}{H}", "\ufffd\ufffd"),
        (f"{H}A", "\ufffdA"),
        (f"{H}\\u0041", "\ufffdA"),
        (f"{H}\\n{L}", "\ufffd\n\ufffd"),
        (f"\\\\ud83d {H}", "\\ud83d \ufffd"),
        (f"\\\\{H}", "\\\ufffd"),
        (f"\\\\\\\\ud83d {H.upper().replace('U', 'u')}", "\\\\ud83d \ufffd"),
        (f"{H}\\\\ude00", "\ufffd\\ude00"),
    ],
)
def test_half_a_character(text: str, meant: str) -> None:
    """Half of a character becomes U+FFFD, in the text as well as in a field that nobody reads."""
    for body in (f'{{"input": "{text}"}}', f'{{"other": ["{text}"], "input": "{text}"}}'):
        assert SPEECH.decode(body.encode(), "application/json").input == meant


def test_half_a_character_elsewhere() -> None:
    """Other mistakes stay mistakes beside half of a character."""
    for body in (f'{{"input": "{H}"', f'{{"input": "{H}\0"}}', f'{{"input": "{H}", "speed": }}'):
        with pytest.raises(ApiError) as caught:
            SPEECH.decode(body.encode(), "application/json")
        assert caught.value.code == "invalid_json"


PERCHE = '{"input": "Perché"}'


@pytest.mark.parametrize(
    ("body", "charset"),
    [
        (PERCHE.encode(), None),
        (PERCHE.encode(), "UTF8"),
        (PERCHE.encode("utf-8-sig"), None),
        (PERCHE.encode("utf-8-sig"), "utf-8"),
        (PERCHE.encode("utf-16"), None),
        (PERCHE.encode("utf-16"), "utf-8"),
        (b"\xfe\xff" + PERCHE.encode("utf-16-be"), None),
        (PERCHE.encode("utf-16-le"), "utf-16le"),
        (PERCHE.encode("utf-32"), "utf-32"),
        (PERCHE.encode("latin-1"), "ISO-8859-1"),
        (PERCHE.encode("cp1252"), "windows-1252"),
        (PERCHE.encode("gb18030"), "gb18030"),
    ],
)
def test_charsets(body: bytes, charset: str | None) -> None:
    """A declared charset is honoured, and a byte order mark is no part of the text."""
    assert SPEECH.decode(body, "application/json", charset).input == "Perché"


@pytest.mark.parametrize(
    "charset", ["hex", "punycode", "idna", "unicode_escape", "utf-7", "klingon", "x" * 500, "a\0b"]
)
def test_charsets_that_are_none(charset: str) -> None:
    """Python's other codecs are no charsets."""
    with pytest.raises(ApiError) as caught:
        SPEECH.decode(b'{"input": "hi"}', "application/json", charset)
    assert caught.value.code == "unsupported_media_type"


def test_the_message_for_other_bytes() -> None:
    """The message names UTF-8 and what Windows PowerShell 5.1 does."""
    with pytest.raises(ApiError, match=r"UTF-8.*charset.*PowerShell 5\.1") as caught:
        SPEECH.decode(PERCHE.encode("latin-1"), "application/json")
    assert caught.value.code == "invalid_json"
    with pytest.raises(ApiError, match="declares"):
        SPEECH.decode(PERCHE.encode("latin-1"), "application/json", "ascii")


@pytest.mark.parametrize(
    "content_type",
    [
        *("", "application/json", "text/plain", "text/json", "application/problem+json"),
        "application/x-www-form-urlencoded",
    ],
)
def test_media_types(content_type: str) -> None:
    """JSON is taken as plain text, without a type, and with the type that curl sends by default."""
    assert SPEECH.decode(b' {"input": "hi"}', content_type).input == "hi"


@pytest.mark.parametrize("content_type", ["text/html", "multipart/form-data", "application/octet-stream"])
def test_other_media_types(content_type: str) -> None:
    """Other types are refused."""
    with pytest.raises(ApiError) as caught:
        SPEECH.decode(b' {"input": "hi"}', content_type)
    assert caught.value.code == "unsupported_media_type"


def test_a_form_is_no_json() -> None:
    """A form in curl's default type is refused with a word on JSON."""
    with pytest.raises(ApiError, match="JSON"):
        SPEECH.decode(b"input=hello", "application/x-www-form-urlencoded")


class _Item(msgspec.Struct):
    name: Annotated[str, Meta(extra=TRIMMED)]
    size: Annotated[int, Meta(ge=1, extra=absent(0))] | None = None


class _Order(msgspec.Struct):
    items: list[_Item]
    words: dict[str, str] = {}
    tone: Literal["Warm", "cold"] = "cold"
    rate: float = 1.0


ORDER: Final = JsonDecoder(_Order, {})


def test_structs_in_lists() -> None:
    """The rules hold within a list of objects; an object of strings passes as it is."""
    body = b'{"items": [{"name": " a ", "size": "2"}, {"name": "b", "size": 0}], "words": {"x": " "}, "tone": "WARM"}'
    order = ORDER.decode(body, "application/json")
    assert order == _Order(items=[_Item("a", 2), _Item("b")], words={"x": " "}, tone="Warm")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"items": [1]}', "items"),
        (b'{"items": [{"size": 1}]}', "items"),
        (b'{"items": {}}', "items"),
        (b'{"items": [], "words": {"a": 1}}', "words"),
        (b'{"items": [], "rate": {}}', "rate"),
        (b'{"items": [' + b"{}," * 300_000 + b"{}]}", "items"),
    ],
)
def test_wrong_lists(body: bytes, param: str) -> None:
    """The error names the field, and a list of very many objects costs no more than its first mistake."""
    with pytest.raises(ApiError) as caught:
        ORDER.decode(body, "application/json")
    assert caught.value.param == param


def test_forms() -> None:
    """The rules for the strings of a form are the same, and what is no string passes."""
    fields = LenientFields(SpeechRequest, ALIASES)
    file = object()
    form = {"speaker": " nova ", "speed": "1.5", "stream": "True", "seed": "", "ref_audio": file, "other": "x"}
    assert fields.of_form(form) == {"voice": "nova", "speed": 1.5, "stream": True, "ref_audio": file}
