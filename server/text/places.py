"""Places: where the characters of a derived text stand in the text that it was made from."""

import bisect
import itertools
from collections.abc import Iterable, Iterator

from server.text.spans import Span


class Places:
    """Runs of characters: the run that begins at `at` in the derived text begins at `origin` in the other one."""

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        pairs = list(runs)
        self._at = [at for at, _ in pairs]
        self._origin = [origin for _, origin in pairs]

    def __call__(self, offset: int) -> int:
        """The place of the character at `offset`."""
        run = max(bisect.bisect_right(self._at, offset) - 1, 0)
        return self._origin[run] + offset - self._at[run]

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Characters `start` to `end`, cut where a run begins."""
        inner = self._at[bisect.bisect_right(self._at, start) : bisect.bisect_left(self._at, end)]
        yield from itertools.pairwise([start, *inner, end])


def without(text: str, gaps: Iterable[tuple[int, int]]) -> tuple[str, Places]:
    """`text` without the parts in `gaps`, which are in order, and the places of the rest."""
    parts, runs = [], []
    start = length = 0
    for gap_start, gap_end in [*gaps, (len(text), len(text))]:
        runs.append((length, start))
        parts.append(text[start:gap_start])
        length += gap_start - start
        start = gap_end
    return "".join(parts), Places(runs)


def span_at(source: str, text: str, start: int, end: int, rate: float = 1.0) -> Span:
    """The span that speaks `text` for source[start:end]."""
    return Span(text, start, end, copied=source[start:end] == text, rate=rate)
