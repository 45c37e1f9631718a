"""msgspec's messages in plain words: the contract with msgspec, sentence by sentence."""

from datetime import date
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from shared.validation_messages import choices_in, missing_field, place_in, reword, reword_malformed_json, split_path


class Voice(msgspec.Struct):
    """A Struct with a required field."""

    id: str


class Words(msgspec.Struct):
    """A field with keys that have limits."""

    words: dict[Annotated[str, Meta(min_length=1)], int]


class Lists(msgspec.Struct):
    """A field with lists in a list."""

    lists: list[list[int]]


class Body(msgspec.Struct):
    """A Struct with a Struct in it."""

    voice: Voice


def _message(value: Any, kind: Any, *, from_text: bool = False) -> str:
    """The message of msgspec about `value` where a `kind` is wanted."""
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, kind, strict=not from_text)
    return str(caught.value)


def _changed(message: str) -> str:
    return f"msgspec {msgspec.__version__} has other sentences than shared/validation_messages.py expects: {message!r}"


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (7, str, "must be a string, not a number"),
        ([], str | Voice | None, "must be a string or an object, not a list"),
        (True, int | float | str | None, "must be a number or a string, not true or false"),
        (1.5, int, "must be a whole number"),
        ("x", float, "must be a number, not a string"),
        ("", Annotated[str, Meta(min_length=1)], "must not be empty"),
        ("", Annotated[str, Meta(min_length=2)], "must have at least 2 characters"),
        ("xx", Annotated[str, Meta(max_length=1)], "must have at most 1 characters"),
        (9, Annotated[float, Meta(le=4)], "must be at most 4"),
        (0.1, Annotated[float, Meta(ge=0.25)], "must be at least 0.25"),
        (0, Annotated[float, Meta(gt=0)], "must be more than 0"),
        (3, Annotated[int, Meta(lt=3)], "must be at most 2"),
        ("ogg", Literal["mp3", "wav"], "must be one of mp3, wav, not 'ogg'"),
        ("o" * 100, Literal["mp3", "wav"], "must be one of mp3, wav"),
        ({"a": 1}, Annotated[dict[str, int], Meta(max_length=0)], "must have at most 0 entries"),
        ({}, Voice, "needs the field id"),
    ],
)
def test_values(value: Any, kind: Any, words: str) -> None:
    """Every sentence of msgspec about a value is matched and has plain words."""
    message = _message(value, kind)
    assert reword(message, choices_in(kind)) == words, _changed(message)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("x", int | None, "must be a whole number"),
        ("perhaps", bool, "must be true or false"),
        ("1e999", float, "is out of range"),
        ("31.12.2026", date, "must be a date such as 2026-12-31"),
    ],
)
def test_values_from_text(value: str, kind: Any, words: str) -> None:
    """A value from a form or the environment is always text, so the words do not say that it is a string."""
    message = _message(value, kind, from_text=True)
    assert reword(message, from_text=True) == words, _changed(message)


def test_an_unknown_message_is_kept() -> None:
    """A sentence that the table lacks comes through, to be put behind a field's name."""
    assert reword("Something else") == "something else"


def test_paths() -> None:
    """The top-level field of a path is found, whatever stands below it."""
    message = _message({"voice": {"id": 1}}, Body)
    assert split_path(message) == ("Expected `str`, got `int`", "voice"), _changed(message)
    message = _message({"words": {"": 1}}, Words)
    assert split_path(message) == ("Expected `str` of length >= 1", "words"), _changed(message)
    assert split_path("Expected `str`, got `int`") == ("Expected `str`, got `int`", "")


@pytest.mark.parametrize(
    ("value", "kind", "place"),
    [
        ({"voice": 1}, Body, "voice"),
        ({"voice": {"id": 1}}, Body, "voice.id"),
        ({"words": {"": 1}}, Words, "words (a key)"),
        ({"words": {"a": "b"}}, Words, "words (a value)"),
        ({"lists": [[1], [2, "x"]]}, Lists, "lists[1][1]"),
        (7, Body, ""),
    ],
)
def test_places(value: Any, kind: Any, place: str) -> None:
    """The place of a wrong value says where it stands below its field."""
    message = _message(value, kind)
    assert place_in(message) == place, _changed(message)


def test_missing_fields() -> None:
    """The name of a missing field is found, and nothing in other messages."""
    message = _message({}, Body)
    assert missing_field(message) == "voice", _changed(message)
    assert not missing_field(_message(7, str))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"a": "x', "it ends too early"),
        (rb'{"a": "\ud800"}', r"\ud800 is half of a character"),
        (
            b'{"a": "two\nlines"}',
            r"a line break or a tab (byte 10) stands in a string as it is; write \n or \t",
        ),
        (b'{"a":\n\t\r\n?}', "invalid character (byte 9)"),
        (b'{"a": x}', "invalid character (byte 6); write names and texts in double quotes"),
        (b"{'a': 'x'}", "object keys must be strings (byte 1); write names and texts in double quotes"),
        (b'{"a": 1,}', "trailing comma in object (byte 8)"),
    ],
)
def test_malformed_json(body: bytes, words: str) -> None:
    """The message for a body that is no JSON is in plain words, too."""
    with pytest.raises(msgspec.DecodeError) as caught:
        msgspec.json.decode(body)
    assert reword_malformed_json(str(caught.value), body) == words, _changed(str(caught.value))
