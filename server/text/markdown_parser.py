"""markdown-it-py, with the place of every inline token: `meta["at"]`, and `meta["places"]` of a block's text.

markdown-it-py knows the lines of a block, but not where the words of a line stand.
So the states of its two parsers note that here, while its own rules push their tokens.
"""

from collections.abc import Iterator
from typing import Any, Literal

from markdown_it import MarkdownIt
from markdown_it.parser_block import ParserBlock
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from server.text.places import Places

MAX_NESTING = 60
"""The depth of lists and quotes. markdown-it-py drops what stands deeper."""


class _InlineState(StateInline):
    """Notes where the pending text and the current rule began, in the text of the block."""

    pending_at = 0
    rule_at = 0

    def append_pending(self, text: str) -> None:
        if not self.pending:
            self.pending_at = self.pos
        super().append_pending(text)

    def pushPending(self) -> Token:  # noqa: N802 -- the library's name
        token = super().pushPending()
        token.meta["at"] = self.pending_at
        return token

    def push(self, ttype: str, tag: str, nesting: Literal[-1, 0, 1]) -> Token:
        token = super().push(ttype, tag, nesting)
        token.meta["at"] = self.rule_at
        return token


def _note_rule(state: StateInline, silent: bool) -> bool:  # noqa: FBT001 -- the library calls it so
    """Run before all rules; it never applies."""
    if not silent and isinstance(state, _InlineState):
        state.rule_at = state.pos
    return False


class _Inlines(ParserInline):
    def parse(self, src: str, md: MarkdownIt, env: Any, tokens: list[Token]) -> list[Token]:
        state = _InlineState(src, md, env, tokens)
        self.tokenize(state)
        for rule in self.ruler2.getRules(""):
            rule(state)
        return state.tokens


class _BlockState(StateBlock):
    """Notes the places of a block's text while the marks of the lists and quotes around it are known."""

    _row: Token | None = None
    _cells: Iterator[Places] = iter(())

    def push(self, ttype: str, tag: str, nesting: Literal[-1, 0, 1]) -> Token:
        before = self.tokens[-1] if self.tokens else None
        token = super().push(ttype, tag, nesting)
        if ttype == "tr_open":
            self._row = token
        elif ttype in {"th_open", "td_open"} and before is self._row and before is not None and before.map:
            self._cells = iter(_cell_places(self.src, self._begin(before.map[0]), self.eMarks[before.map[0]]))
        elif ttype == "inline" and before is not None:
            if before.map:
                token.meta["starts"] = [self._begin(line) for line in range(*before.map)]
            else:
                token.meta["places"] = next(self._cells, Places([(0, len(self.src))]))
        return token

    def _begin(self, line: int) -> int:
        return self.bMarks[line] + self.tShift[line]


def _cell_places(source: str, start: int, end: int) -> Iterator[Places]:
    r"""The places of the text of each cell in source[start:end]. The backslash of `\|` is not in that text."""
    line = source[start:end].strip(" \t\n\v\f\r")
    start = source.index(line, start)
    end = start + len(line)
    if source[start:end].startswith("|"):
        start += 1
    while start < end:
        cell = start
        while cell < end and source[cell] in " \t\n\v\f\r":
            cell += 1
        runs = [(0, cell)]
        length = 0
        position = cell
        while position < end and source[position] != "|":
            if source[position] == "\\" and source[position + 1 : position + 2] == "|":
                position += 1
                runs.append((length, position))
            position += 1
            length += 1
        yield Places(runs)
        start = position + 1


class _Blocks(ParserBlock):
    def parse(self, src: str, md: MarkdownIt, env: Any, outTokens: list[Token]) -> list[Token] | None:  # noqa: N803
        if not src:
            return None
        state = _BlockState(src, md, env, outTokens)
        self.tokenize(state, state.line, state.lineMax)
        for token in outTokens:
            if "starts" in token.meta:
                token.meta["places"] = _line_places(src, token.content, token.meta["starts"])
        return state.tokens


def _line_places(source: str, content: str, starts: list[int]) -> Places:
    """The places of the lines of a paragraph or heading, whose first visible characters are at `starts`."""
    runs = []
    offset = 0
    for line, start in zip(content.split("\n"), starts, strict=False):
        indent = len(line) - len(line.lstrip(" \t"))
        # The mark of a heading stands before its text: no character of a text of one line is skipped otherwise.
        begin = max(start, source.find(line[indent:], start)) if len(starts) == 1 else start
        runs.append((offset, begin - indent))
        offset += len(line) + 1
    return Places(runs)


def new_parser() -> MarkdownIt:
    """CommonMark with tables and strikethrough. Tags are left out, and blocks of HTML are ordinary paragraphs."""
    parser = MarkdownIt("commonmark", {"maxNesting": MAX_NESTING})
    inline, block = _Inlines(), _Blocks()
    inline.ruler, inline.ruler2, block.ruler = parser.inline.ruler, parser.inline.ruler2, parser.block.ruler
    parser.inline, parser.block = inline, block
    parser.enable(["table", "strikethrough"])
    parser.disable(["html_block", "text_join", "fragments_join"])
    inline.ruler.before("text", "note_rule", _note_rule)
    inline.ruler.enable("note_rule")
    return parser
