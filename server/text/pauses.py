"""Pauses that a text asks for: `[pause:1.5s]` in every format. It checks the limits of those of SSML, too."""

import re
from collections.abc import Iterator
from typing import Final

from server.http.errors import ApiError
from shared.protocol import MAX_PAUSES_MS

MAX_PAUSE_MS: Final = 30_000

DURATION: Final = r"\+?(\d{0,6}\.\d{1,6}|\d{1,6})\s{0,9}(ms|s)"
"""A number and its unit."""

_MARK: Final = re.compile(rf"\[\s{{0,9}}pause\s{{0,9}}:\s{{0,9}}{DURATION}\s{{0,9}}\]", re.IGNORECASE)


def marks(text: str) -> Iterator[tuple[int, int, int]]:
    """Start and end of each pause mark in `text`, and its milliseconds. ApiError if one is too long."""
    for match in _MARK.finditer(text):
        yield match.start(), match.end(), milliseconds(match[1], match[2])


def milliseconds(number: str, unit: str) -> int:
    """The whole milliseconds of a pause; ApiError if it is longer than MAX_PAUSE_MS."""
    ms = round(float(number) * (1 if unit.lower() == "ms" else 1000))
    if ms > MAX_PAUSE_MS:
        raise ApiError("invalid_value", f"input: a pause has at most {MAX_PAUSE_MS // 1000} s.", param="input")
    return ms


def check_sum(total_ms: int) -> None:
    """Raise ApiError if the pauses of one text are together longer than MAX_PAUSES_MS."""
    if total_ms > MAX_PAUSES_MS:
        limit = f"{MAX_PAUSES_MS // 60_000} minutes"
        raise ApiError("invalid_value", f"input: its pauses have together at most {limit}.", param="input")
