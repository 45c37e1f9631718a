"""SSML: speak, p, s, break, sub, prosody (rate) and say-as (characters). Of other tags, only the text stays.

expat reads the XML. Document types are refused, so there are no entities but XML's own five, and nothing is fetched.
White space is one space, as in every XML document.
"""

import re
from typing import Final, NoReturn
from xml.parsers import expat

import msgspec

from server.http.errors import ApiError
from server.text import pauses
from server.text.places import span_at
from server.text.spans import Pause, Span

MAX_DEPTH: Final = 64
MIN_RATE: Final = 0.25
MAX_RATE: Final = 4.0

_BEGINNING: Final = re.compile(r"[\ufeff\s]*(?=<speak[\s/>]|<\?xml\s[^>]{0,200}>\s*<speak[\s/>])")
_LONGEST_PROLOGUE: Final = 250
_WORDS_AND_SPACE: Final = re.compile(r"[ \t\r\n]+|[^ \t\r\n]+")
_REFERENCE: Final = re.compile(r"&(?:\w{1,10}|#\d{1,10}|#x[0-9a-fA-F]{1,10});")
_DURATION: Final = re.compile(pauses.DURATION, re.IGNORECASE)
_RATE: Final = re.compile(r"(?P<sign>[+-]?)(?P<number>\d{1,4}(?:\.\d{1,6})?|\.\d{1,6})(?P<percent>%?)")

_BREAKS_MS: Final = {"none": 0, "x-weak": 100, "weak": 250, "medium": 500, "strong": 1000, "x-strong": 1500}
_RATES: Final = {"x-slow": 0.5, "slow": 0.75, "medium": 1.0, "default": 1.0, "fast": 1.5, "x-fast": 2.0}
_BLOCKS: Final = {"p", "s", "paragraph", "sentence"}
_SPELLED: Final = {"characters", "spell-out"}


def is_ssml(text: str) -> bool:
    """True if `text` begins as an SSML document does."""
    return _BEGINNING.match(text) is not None


def may_become_ssml(text: str) -> bool:
    """True if more text could make an SSML document of `text`, which is none yet."""
    begun = text.lstrip("\ufeff \t\r\n")
    if begun.startswith("<?xml"):
        return len(begun) <= _LONGEST_PROLOGUE
    return "<speak".startswith(begun) or "<?xml".startswith(begun)


def read_ssml(source: str) -> list[Span | Pause]:
    """The spans and pauses of an SSML document. ApiError (`invalid_value`) if it is none, with line and column."""
    return _Reader(source).read()


class _Element(msgspec.Struct):
    """An open element: its name, and what holds for its text.

    `alias` is spoken instead of the text, whose first character is at `begin`; -1: at the next event.
    """

    name: str
    rate: float = 1.0
    spelled: bool = False
    alias: str | None = None
    begin: int = 0


class _Reader:
    """Handles the events of expat, and follows their places: expat counts bytes of UTF-8, and spans characters."""

    def __init__(self, source: str) -> None:
        match = re.match(r"[\ufeff\s]*", source)
        self._begin = match.end() if match else 0  # white space before an XML declaration is an error
        self._source = source
        self._data = source[self._begin :].encode("utf-8", "surrogatepass")
        self._bytes_read = 0
        self._chars_read = self._begin
        self._items: list[Span | Pause] = []
        self._separator = ""
        self._open: list[_Element] = []
        self._parser = expat.ParserCreate("utf-8")
        self._parser.buffer_text = False
        self._parser.StartDoctypeDeclHandler = lambda *_: _refuse("SSML must have no document type")
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = lambda _name: self._end()
        self._parser.CharacterDataHandler = self._text

    def read(self) -> list[Span | Pause]:
        try:
            self._parser.Parse(self._data, True)
        except expat.ExpatError as error:
            reason = expat.ErrorString(error.code)
            _refuse(f"this is no SSML: {reason}, in line {error.lineno}, column {error.offset + 1}")
        return self._items

    def _place(self) -> int:
        """The character at which the current event begins."""
        position = self._parser.CurrentByteIndex
        self._chars_read += len(self._data[self._bytes_read : position].decode("utf-8", "surrogatepass"))
        self._bytes_read = position
        if self._open and self._open[-1].begin < 0:
            self._open[-1].begin = self._chars_read
        return self._chars_read

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._place()
        name = name.rpartition(":")[2].lower()
        if not self._open and name != "speak":
            _refuse(f"SSML must be one <speak> element, not <{name[:40]}>")
        if len(self._open) >= MAX_DEPTH:
            _refuse(f"the elements of SSML may be {MAX_DEPTH} deep at most")
        outer = self._open[-1] if self._open else _Element("")
        element = msgspec.structs.replace(outer, name=name)
        if name == "break":
            self._items.append(Pause(_break_ms(attributes)))
        elif name in _BLOCKS:
            self._separator = "\n\n"
        elif name == "prosody" and "rate" in attributes:
            element.rate = min(max(outer.rate * _rate(attributes["rate"]), MIN_RATE), MAX_RATE)
        elif name == "say-as":
            element.spelled = attributes.get("interpret-as", "").strip().lower() in _SPELLED
        elif name == "sub" and outer.alias is None and "alias" in attributes:
            element.alias = attributes["alias"]
            element.begin = -1
        self._open.append(element)

    def _end(self) -> None:
        place = self._place()
        element = self._open.pop()
        if element.name in _BLOCKS:
            self._separator = "\n\n"
        elif element.name == "sub" and element.alias and (not self._open or self._open[-1].alias is None):
            self._add(Span(element.alias, element.begin, place, rate=element.rate))

    def _text(self, data: str) -> None:
        element = self._open[-1]
        place = self._place()
        if element.alias is not None:
            return
        reference = _REFERENCE.match(self._source, place) if len(data) == 1 else None
        if reference is not None:
            self._add(Span(data, place, reference.end(), rate=element.rate))
            return
        for match in _WORDS_AND_SPACE.finditer(data):
            start, end = place + match.start(), place + match.end()
            if match[0].isspace():
                self._add(span_at(self._source, " ", start, end, element.rate))
            elif element.spelled:
                self._spell(match[0], start, element.rate)
            else:
                self._add(span_at(self._source, match[0], start, end, element.rate))

    def _spell(self, word: str, start: int, rate: float) -> None:
        for index, character in enumerate(word):
            self._add(span_at(self._source, character, start + index, start + index + 1, rate))
            self._add(Span(" ", start + index + 1, start + index + 1, rate=rate))

    def _add(self, span: Span) -> None:
        last = self._items[-1] if self._items else None
        if span.text == " " and (self._separator or (isinstance(last, Span) and last.text.endswith(" "))):
            return  # of several spaces the first one counts, and none where a block begins
        if self._separator and isinstance(last, Span):
            self._items.append(Span(self._separator, last.end, last.end, rate=span.rate))
        self._separator = ""
        self._items.append(span)


def _break_ms(attributes: dict[str, str]) -> int:
    time = attributes.get("time", "").strip()
    if time:
        match = _DURATION.fullmatch(time)
        if match is None:
            _refuse('the time of a <break> is a duration such as "500ms" or "1.5s"')
        return pauses.milliseconds(match[1], match[2])
    strength = attributes.get("strength", "medium").strip().lower()
    if strength not in _BREAKS_MS:
        _refuse(f"the strength of a <break> is one of {', '.join(_BREAKS_MS)}")
    return _BREAKS_MS[strength]


def _rate(text: str) -> float:
    """The factor that the attribute rate of <prosody> means: a word, 80%, +10% or 1.2."""
    text = text.strip().lower()
    if text in _RATES:
        return _RATES[text]
    match = _RATE.fullmatch(text)
    if match is None:
        _refuse(f'the rate of <prosody> is a number, a percentage ("80%", "+10%") or one of {", ".join(_RATES)}')
    number = float(match["number"]) / (100 if match["percent"] else 1)
    if match["sign"] and match["percent"]:
        number = 1 + number if match["sign"] == "+" else 1 - number
    if (match["sign"] == "-" and not match["percent"]) or number <= 0:
        _refuse("the rate of <prosody> must be above 0")
    return number


def _refuse(problem: str) -> NoReturn:
    raise ApiError("invalid_value", f"input: {problem}.", param="input")
