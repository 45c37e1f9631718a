"""The file .env: its TTS_* variables as python-dotenv reads them, or an error that names each wrong line.

python-dotenv passes over a line that it cannot read. An API key on that line would be lost, and the service would
answer every client. So a line that may have been meant as a setting is either one or an error.
No message repeats a value, which may be a secret.
"""

import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from dotenv import dotenv_values
from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from shared.access import read_bytes, unreadable
from shared.settings import SettingsError, is_ours

_FORM: Final = "a line is NAME=value, and a quote at the beginning of a value needs another at its end"
_NAME: Final = re.compile(r"\s*(?:export\s+)?['\"]?(TTS\w*)", re.IGNORECASE)
_SETTING_WITHIN: Final = re.compile(r"^\s*(?:export\s+)?['\"]?TTS_", re.IGNORECASE | re.MULTILINE)
_LINE_END: Final = re.compile(r"\r\n|\n|\r")
_UTF_16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


class WrongLinesError(SettingsError):
    """Some lines cannot be taken; `found` are the variables of those that can be read."""

    def __init__(self, problems: list[str], found: dict[str, str]) -> None:
        super().__init__(problems)
        self.found = found


def read_dotenv(path: Path) -> dict[str, str]:
    """The TTS_* variables in `path` that have a value, none without such a file.

    SettingsError names what is wrong: WrongLinesError, if only some lines are.
    """
    text = _text_of(path)
    bindings = [binding for binding in parse_stream(io.StringIO(text)) if binding.error or binding.key is not None]
    readable = "".join(binding.original.string for binding in bindings if not binding.error)
    values = dotenv_values(stream=io.StringIO(readable))
    found = {name: value for name, value in values.items() if value and is_ours(name)}
    if problems := list(_problems(bindings, os.environ)):
        raise WrongLinesError([f"{path} line {line}: {problem}" for line, problem in problems], found)
    return found


def _text_of(path: Path) -> str:
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return ""
    except IsADirectoryError:
        if os.path.lexists(path / "pyvenv.cfg"):  # some keep a virtual environment under this name
            return ""
        raise SettingsError([f"{path} is a folder; the file with the settings must have that name"]) from None
    except OSError as error:
        raise SettingsError([unreadable(path, error)]) from None
    if data.startswith(_UTF_16_MARKS) or b"\0" in data:
        raise SettingsError([f"{path} is not UTF-8 but UTF-16 or no text; save it as UTF-8"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(_LINE_END.findall(data[: error.start].decode("latin-1"))) + 1
        raise SettingsError([f"{path} line {line}: this line is not UTF-8; save the file as UTF-8"]) from None


def _problems(bindings: list[Binding], environ: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """The wrong lines: their numbers, and what is wrong with them."""
    seen: dict[str, tuple[int, str | None]] = {}
    defined = {name for name, value in environ.items() if value}
    for binding in bindings:
        source = binding.original.string
        indent = source[: len(source) - len(source.lstrip())]
        line = binding.original.line + len(_LINE_END.findall(indent))
        if problem := _problem_of(binding, defined):
            yield line, problem
        name, value = binding.key, binding.value
        if name is None:
            continue
        first_line, first_value = seen.setdefault(name, (line, value))
        if is_ours(name) and value != first_value:
            yield line, f"{name} has another value on line {first_line}; keep one of them"
        if value:
            defined.add(name)


def _problem_of(binding: Binding, defined: set[str]) -> str | None:
    name, value, source = binding.key, binding.value, binding.original.string
    if binding.error or name is None:
        known = _NAME.match(source)
        return f"{known[1] if known else 'this line'} cannot be read; {_FORM}"
    if value is None:
        return f"{name if is_ours(name) and ':' not in name else 'this line'} has no =; {_FORM}"
    if is_ours(name):
        return _problem_of_value(name, value, source, defined)
    return f"{name} has a setting within its quotes; {_FORM}" if _SETTING_WITHIN.search(value) else None


def _problem_of_value(name: str, value: str, source: str, defined: set[str]) -> str | None:
    """The problem of a setting's value that the file alone shows; None if there is none. `source` is the line."""
    if _LINE_END.search(value):
        return f"{name} has a line break in its value; {_FORM}"
    quoted = source.partition("=")[2].lstrip()[:1] in {"'", '"'}
    if not quoted and value[-1:] in {"'", '"'} and value.count(value[-1]) % 2:
        return f"{name} ends with a quote that was not begun; {_FORM}"
    for atom in parse_variables(value):
        if isinstance(atom, Variable) and atom.default is None and atom.name not in defined:
            return f"{name} needs the variable {atom.name}, which is not set"
    return None
