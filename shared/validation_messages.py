"""msgspec's messages about wrong values, reworded for users: no names of Python types, no paths of JSON.

The server uses them for bodies, forms and queries, `settings` for TTS_* variables.
No other module matches a sentence of msgspec's; the tests of this one fail when an upgrade changes a sentence.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, get_args, get_origin

_KINDS: Final = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "UploadFile": "a file",
}
_BOUNDS: Final = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_LONGEST_SHOWN: Final = 60

_MISSING_FIELD: Final = re.compile(r"Object missing required field `(?P<field>\w+)`")
_PATH: Final = re.compile(r" - at `(?P<key>key` in `)?\$(?:\.(?P<field>\w+)(?P<below>[^`]*))?.*`$")
_TRUNCATED: Final = "Input data was truncated"
_INVALID_CHARACTER: Final = re.compile(r"JSON is malformed: invalid character \(byte (?P<position>\d+)\)")
_HALF_CHARACTER: Final = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
"""The first half of a surrogate pair without its second."""


def reword(message: str, choices: Sequence[str] = (), *, from_text: bool = False) -> str:
    """The problem of a field, in words that follow its name: "must be a string, not a list".

    `message` is msgspec's, without a path. `choices` are the values of the field's Literal, if it has one.
    `from_text`: the value was sent as text (path, query, form, environment), so its own type says nothing.
    """
    for pattern, reworded in _TABLE:
        match = pattern.fullmatch(message)
        if match is not None:
            return reworded(match, choices, from_text)
    return f"{message[:1].lower()}{message[1:]}"


def reword_malformed_json(message: str, body: bytes) -> str:
    """The problem of a `body` that msgspec cannot read as JSON, in plain words.

    msgspec calls half a surrogate pair at the end of a string "truncated", and a line break within a string an
    "invalid character". The latter is the most frequent mistake: a text of several lines put into a JSON template.
    """
    invalid = _INVALID_CHARACTER.fullmatch(message)
    # Between two values these bytes are white space, so an invalid one stands within a string.
    if invalid is not None and body[int(invalid["position"])] in b"\n\r\t":
        return f"a line break or a tab (byte {invalid['position']}) stands in a string as it is; write \\n or \\t"
    if message != _TRUNCATED:
        problem = message.removeprefix("JSON is malformed: ")
        found = body[int(invalid["position"]) :][:1] if invalid is not None else b""
        lacks_quotes = "must be strings" in problem or found.isalpha() or found == b"'"
        return f"{problem}; write names and texts in double quotes" if lacks_quotes else problem
    half = _HALF_CHARACTER.search(body)
    return f"{half[0].decode()} is half of a character" if half else "it ends too early"


def split_path(message: str) -> tuple[str, str]:
    """`message` without the path that msgspec appends, and the top-level field of that path ("" if there is none)."""
    path = _PATH.search(message)
    return _PATH.sub("", message), (path and path["field"]) or ""


def place_in(message: str) -> str:
    """The place of a wrong value within a body: its field, and what stands below it; "" if `message` has no path."""
    path = _PATH.search(message)
    if path is None or not path["field"]:
        return ""
    below = path["below"].replace("[...]", " (a value)")
    return f"{path['field']}{below}{' (a key)' if path['key'] else ''}"


def missing_field(message: str) -> str:
    """The required field that is missing according to `message`; "" if `message` is about something else."""
    match = _MISSING_FIELD.search(message)
    return match["field"] if match else ""


def one_of(choices: Sequence[str]) -> str:
    """The problem of a value that is none of `choices`."""
    return f"must be one of {', '.join(choices)}"


def choices_in(annotation: Any) -> list[str]:
    """The values of the Literal in an annotation, at any depth; empty if it has none."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in choices_in(part)]


def _wrong_kind(match: re.Match[str], _choices: Sequence[str], from_text: bool) -> str:  # noqa: FBT001 - of the table
    wanted = [kind for kind in match["wanted"].split(" | ") if kind != "null"]
    if "float" in wanted and "int" in wanted:
        wanted.remove("int")
    named = " or ".join(_KINDS.get(kind, kind) for kind in wanted)
    got = match["got"]
    if (from_text and got == "str") or (got == "float" and "int" in wanted):
        return f"must be {named}"
    return f"must be {named}, not {'a number' if got in {'int', 'float'} else _KINDS.get(got, got)}"


def _wrong_length(match: re.Match[str], _choices: Sequence[str], _from_text: bool) -> str:  # noqa: FBT001
    if (match["bound"], match["number"]) == (">=", "1"):
        return "must not be empty"
    unit = "entries" if match["kind"] == "object" else "characters"
    return f"must have {_BOUNDS[match['bound']]} {match['number']} {unit}"


def _out_of_bounds(match: re.Match[str], _choices: Sequence[str], _from_text: bool) -> str:  # noqa: FBT001
    return f"must be {_BOUNDS[match['bound']]} {match['number'].removesuffix('.0')}"


def _no_choice(match: re.Match[str], choices: Sequence[str], _from_text: bool) -> str:  # noqa: FBT001
    value = match["value"]
    shown = f", not {value}" if len(value) <= _LONGEST_SHOWN else ""
    return f"{one_of(choices)}{shown}" if choices else f"cannot be {value[:_LONGEST_SHOWN]}"


_Reworded = Callable[[re.Match[str], Sequence[str], bool], str]

_TABLE: Final[list[tuple[re.Pattern[str], _Reworded]]] = [
    (re.compile(r"Expected `(?P<wanted>[^`]+)`, got `(?P<got>[^`]+)`"), _wrong_kind),
    (re.compile(r"Expected `(?P<kind>\w+)` of length (?P<bound>[<>]=) (?P<number>\d+)"), _wrong_length),
    (re.compile(r"Expected `\w+` (?P<bound>[<>]=?) (?P<number>\S+)"), _out_of_bounds),
    (re.compile(r"Invalid enum value (?P<value>.+)", re.DOTALL), _no_choice),
    (_MISSING_FIELD, lambda match, *_: f"needs the field {match['field']}"),
    (re.compile(r"Number out of range"), lambda *_: "is out of range"),
    (re.compile(r"Invalid RFC3339 encoded date"), lambda *_: "must be a date such as 2026-12-31"),
]
