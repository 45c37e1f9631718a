"""JSON body -> Struct: aliases, errors that name their field, and unknown fields that cost nothing."""

import tracemalloc

import pytest

from server.http.errors import ApiError
from server.http.json_bodies import JsonDecoder
from server.schemas import ALIASES, SpeechRequest

DECODER = JsonDecoder(SpeechRequest, ALIASES)


def _decoded(body: bytes) -> SpeechRequest:
    return DECODER.decode(body, "application/json")


def test_aliases() -> None:
    """An alias counts if the field itself is missing or null; of a repeated key the last counts."""
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
def test_errors(body: bytes, code: str, param: str | None) -> None:
    """An error names the field by its own name; malformed JSON is found in unknown fields, too."""
    with pytest.raises(ApiError) as caught:
        _decoded(body)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("body", [b'{"input": "two\nlines"}', b'{"input": "a", "unknown": ["\t"]}', b'{"a\r": 1}'])
def test_a_line_break_within_a_string(body: bytes) -> None:
    """The message says how to write a line break: the usual mistake is a text of several lines in a JSON template."""
    with pytest.raises(ApiError, match=r"line break or a tab \(byte \d+\).* write \\n or \\t\.$"):
        _decoded(body)


def test_white_space_between_values() -> None:
    """Line breaks and tabs between values are correct, so the message is about another byte."""
    with pytest.raises(ApiError, match=r"invalid character \(byte 13\)\.$"):
        _decoded(b'{"input":\n\t\r\n?}')


def test_unknown_fields_cost_nothing() -> None:
    """Two megabytes of empty lists remain bytes: as Python objects they would take twenty times as much."""
    body = b'{"input": "a", "unknown": [' + b"[]," * 700_000 + b"[]]}"
    tracemalloc.start()
    try:
        assert _decoded(body).input == "a"
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(body)
