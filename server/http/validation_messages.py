"""What msgspec says of a wrong value, in words for whoever sent it: one table, with no type of Python's in it."""

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


def plain(said: str, choices: Sequence[str] = (), *, from_text: bool = False) -> str:
    """What is wrong with a field, to be put behind its name: "must be a string, not a list".

    `choices` are the values that the field can have, where they are few;
    `from_text`: it came in a path, a query or a form, where everything is a string.
    """
    for pattern, reworded in _TABLE:
        match = pattern.fullmatch(said)
        if match is not None:
            return reworded(match, choices, from_text)
    return f"{said[:1].lower()}{said[1:]}"


def choices_in(annotation: Any) -> list[str]:
    """The values of the Literal in a field's annotation, however deep; none where there is none."""
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
    return f"must have {_BOUNDS[match['bound']]} {match['number']} characters"


def _out_of_bounds(match: re.Match[str], _choices: Sequence[str], _from_text: bool) -> str:  # noqa: FBT001
    return f"must be {_BOUNDS[match['bound']]} {match['number'].removesuffix('.0')}"


def _no_choice(match: re.Match[str], choices: Sequence[str], _from_text: bool) -> str:  # noqa: FBT001
    value = match["value"]
    shown = f", not {value}" if len(value) <= _LONGEST_SHOWN else ""
    return f"must be one of {', '.join(choices)}{shown}" if choices else f"cannot be {value[:_LONGEST_SHOWN]}"


_Reworded = Callable[[re.Match[str], Sequence[str], bool], str]

_TABLE: Final[list[tuple[re.Pattern[str], _Reworded]]] = [
    (re.compile(r"Expected `(?P<wanted>[^`]+)`, got `(?P<got>[^`]+)`"), _wrong_kind),
    (re.compile(r"Expected `\w+` of length (?P<bound>[<>]=) (?P<number>\d+)"), _wrong_length),
    (re.compile(r"Expected `\w+` (?P<bound>[<>]=?) (?P<number>\S+)"), _out_of_bounds),
    (re.compile(r"Invalid enum value (?P<value>.+)", re.DOTALL), _no_choice),
    (
        re.compile(r"Object missing required field `(?P<field>\w+)`"),
        lambda match, *_: f"needs the field {match['field']}",
    ),
    (re.compile(r"Unsupported type: .+"), lambda *_: "must be a file"),
    (re.compile(r"Number out of range"), lambda *_: "is out of range"),
]
