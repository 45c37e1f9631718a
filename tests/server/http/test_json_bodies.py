"""A JSON body as a Struct: aliases, errors that name their field, and little made of what nobody asked for."""

import tracemalloc

import pytest

from server.http.errors import ApiError
from server.http.json_bodies import SpeechJson, decode_json
from server.schemas import SpeechRequest


def _decoded(body: bytes) -> SpeechRequest:
    return decode_json(body, "application/json", SpeechRequest, SpeechJson.aliases, SpeechJson.outline)


def test_aliases_stand_in_for_fields_that_are_missing_or_null() -> None:
    """The field itself wins where it says something; a key written twice counts as its last."""
    assert _decoded(b'{"text": "a", "speaker": "x"}').input == "a"
    assert _decoded(b'{"input": null , "text": "a"}').input == "a"
    assert _decoded(b'{"text": "a", "input": "b", "speaker": null, "input": "c"}').input == "c"
    assert _decoded(b'{"inp\\u0075t": "a", "speaker": "x"}').voice == "x"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"text": 5}', "invalid_value", "input"),
        (b"{}", "invalid_value", "input"),
        (b'[{"input": "a"}]', "invalid_json", None),
        (b'{"input": "a", "unknown": "\xff"}', "invalid_json", None),
        (b'{"input": "a", "unknown": nothing}', "invalid_json", None),
        (b'{"input": "a", "speed": 1e}', "invalid_json", None),
        (b'{"input": "a", "speed": -}', "invalid_json", None),
        (b'{"input": "a", "unknown": 1.}', "invalid_json", None),
        (b'{"input": "a", "voice": {"id": "x", "y": ' + b"[" * 5000 + b"]" * 5000 + b"}}", "invalid_json", None),
    ],
)
def test_what_is_wrong_is_named(body: bytes, code: str, param: str | None) -> None:
    """Fields by their own name, and what is no JSON also where nobody reads it."""
    with pytest.raises(ApiError) as caught:
        _decoded(body)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("body", [b'{"input": "two\nlines"}', b'{"input": "a", "unknown": ["\t"]}', b'{"a\r": 1}'])
def test_a_line_break_within_a_string_is_named(body: bytes) -> None:
    """Who puts a text of several lines into a template of JSON is told what to write for them."""
    with pytest.raises(ApiError, match=r"line break or a tab \(byte \d+\).* write \\n or \\t\.$"):
        _decoded(body)


def test_white_space_between_values_is_not_blamed() -> None:
    """The same bytes outside a string are no mistake, so another one is named."""
    with pytest.raises(ApiError, match=r"invalid character \(byte 13\)\.$"):
        _decoded(b'{"input":\n\t\r\n?}')


def test_unknown_fields_cost_nothing() -> None:
    """Two megabytes of empty lists stay bytes: as Python's objects they would take twenty times as much."""
    body = b'{"input": "a", "unknown": [' + b"[]," * 700_000 + b"[]]}"
    tracemalloc.start()
    try:
        assert _decoded(body).input == "a"
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(body)
