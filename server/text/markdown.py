"""Markdown as a person would read it aloud.

Marks are left out, addresses of links, tags, comments, code blocks, and the thoughts of a model (`<think>`).
Blocks are sentences of their own, and the cells of a table are parts of one. Numbers of lists are read.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final

from markdown_it.token import Token

from server.text.markdown_parser import MAX_NESTING, new_parser
from server.text.places import Places, span_at, without
from server.text.spans import Span, copied

_LEFT_OUT: Final = re.compile(r"<(?P<think>think|thinking)>|<!--|\r(?=\n)", re.IGNORECASE)
_THOUGHT_ENDS: Final = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_BETWEEN_BLOCKS: Final = "\n\n"
_BETWEEN_CELLS: Final = ", "

_parser: Final = new_parser()


def read_markdown(source: str) -> list[Span]:
    """The spans of a Markdown text. Beyond MAX_NESTING levels of lists and quotes, a text is read as it is."""
    text, places = without(source, _left_out(source))
    text = text.replace("\r", "\n").replace("\0", "\ufffd")  # as the parser would
    tokens = _parser.parse(text)
    if any(token.nesting > 0 and token.level + 1 >= MAX_NESTING for token in tokens):
        return [copied(source, 0, len(source))]
    return _Reader(source, text, places).read(tokens)


def _left_out(source: str) -> Iterator[tuple[int, int]]:
    """The parts of a text that are not read aloud: thoughts and comments. The first half of a line end is one, too.

    A thought without an end lasts to the end of the text. An end alone ends a thought that began in the prompt.
    """
    position = 0
    first_end = _THOUGHT_ENDS.search(source)
    first = _LEFT_OUT.search(source)
    while first is not None and first["think"] is None:
        first = _LEFT_OUT.search(source, first.end())
    if first_end is not None and (first is None or first.start() > first_end.start()):
        position = first_end.end()
        yield 0, position
    while (match := _LEFT_OUT.search(source, position)) is not None:
        position = match.end()
        if match["think"] is not None:
            end = _THOUGHT_ENDS.search(source, position)
            position = len(source) if end is None else end.end()
        elif match[0] == "<!--":
            end_at = source.find("-->", position)
            if end_at < 0:
                continue
            position = end_at + len("-->")
        yield match.start(), position


class _Reader:
    """Walks over the tokens of one text; `places` leads from it to the source."""

    def __init__(self, source: str, text: str, places: Places) -> None:
        self._source = source
        self._text = text
        self._places = places
        self._spans: list[Span] = []
        self._separator = ""

    def read(self, tokens: Iterable[Token]) -> list[Span]:
        line_starts = [0, *(match.end() for match in re.finditer("\n", self._text))]
        for token in tokens:
            if token.type == "list_item_open" and token.info and token.map:
                # Between the item before and this number there are only the marks of quotes and of other lists.
                begin = max(line_starts[token.map[0]], self._cursor)
                number = f"{token.info}{token.markup}"
                start = self._text.find(number, begin)
                self._add(number, start, start + len(number))
                self._separator = " "
            elif token.type == "inline":
                self._inline(token.children or [], token.meta["places"])
                self._separator = self._separator if self._separator == " " else _BETWEEN_BLOCKS
            elif token.type in {"th_close", "td_close"}:
                self._separator = _BETWEEN_CELLS
            elif token.nesting < 0:
                self._separator = _BETWEEN_BLOCKS
        return self._spans

    _cursor = 0
    """The end of the text that was read last, in the text without thoughts."""

    def _inline(self, tokens: Iterable[Token], places: Places, base: int = 0) -> None:
        cursor = 0  # the characters of one run of marks have one place
        for token in tokens:
            at = max(token.meta.get("at", 0), cursor)
            if token.type == "text" and token.content:
                cursor = at + len(token.content)
                for start, end in places.runs(base + at, base + cursor):
                    piece = token.content[start - base - at : end - base - at]
                    self._add(piece, places(start), places(end - 1) + 1)
            elif token.type == "text_special":
                self._add(token.content, places(base + at), places(base + at + len(token.markup) - 1) + 1)
                cursor = at + len(token.markup)
            elif token.type == "code_inline":
                self._code(token, places, base + at)
            elif token.type in {"softbreak", "hardbreak"} or token.content.lower().startswith("<br"):
                self._add("\n", places(base + at), places(base + at) + 1)
            elif token.type == "image":
                self._inline(token.children or [], places, base + at + len("!["))

    def _code(self, token: Token, places: Places, at: int) -> None:
        at += len(token.markup)
        if self._text[places(at) : places(at) + 1] in {" ", "\n"} and not token.content.startswith(" "):
            at += 1  # the space that sets the code off from its marks
        for start, end in places.runs(at, at + len(token.content)):
            self._add(token.content[start - at : end - at], places(start), places(end - 1) + 1)

    def _add(self, text: str, start: int, end: int) -> None:
        """Speak `text` for a part of the text without thoughts."""
        if self._separator and self._spans:
            place = self._spans[-1].end
            self._spans.append(Span(self._separator, place, place))
        self._separator = ""
        self._cursor = end
        runs = list(self._places.runs(start, end)) if end - start == len(text) else [(start, end)]
        for run_start, run_end in runs:
            piece = text[run_start - start : run_end - start] if len(runs) > 1 else text
            self._spans.append(span_at(self._source, piece, self._places(run_start), self._places(run_end - 1) + 1))
