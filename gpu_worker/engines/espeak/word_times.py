"""The times of the words of a clause, from the reports of a synthesizer: pure functions of text and sample numbers.

espeak-ng reports the beginning of what it takes for a word: several for a number ("forty", "two"), one for two words
that it runs together ("of the"), and some at a place beside the word. So its reports only say when the words of
the text begin, and words without a report share the time between their neighbours.
"""

import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple


class TimedWord(NamedTuple):
    """text[start:end], said from one sample to another."""

    start: int
    end: int
    start_sample: int
    end_sample: int


def time_words(text: str, reports: Sequence[tuple[int, int]], end_sample: int) -> list[TimedWord]:
    """The words of `text` with their times; `reports` are offsets in it and samples, in the order of time.

    The first word begins at 0, each other one where the word before ends, and the last one ends at `end_sample`.
    """
    words = list(find_words(text))
    if not words:
        return []
    begins = {0: 0, len(words): end_sample}
    latest = 0
    starts = [start for start, _ in words]
    for offset, sample in reports:
        number = bisect_right(starts, offset) - 1
        if number > latest and begins[latest] <= sample <= end_sample:
            begins[number], latest = sample, number
    for first, after in list(pairwise(sorted(begins))):
        _share(begins, words, first, after)
    return [TimedWord(start, end, begins[number], begins[number + 1]) for number, (start, end) in enumerate(words)]


def find_words(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each word: between white space, without the punctuation around it. Each Han character is one."""
    start = None
    for offset, character in enumerate(f"{text} "):
        is_han = "CJK UNIFIED" in unicodedata.name(character, "")
        if start is not None and (is_han or character.isspace()):
            yield from _trimmed(text, start, offset)
            start = None
        if is_han:
            yield offset, offset + 1
        elif start is None and not character.isspace():
            start = offset


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end and unicodedata.category(text[start])[0] == "P":
        start += 1
    while start < end and unicodedata.category(text[end - 1])[0] == "P":
        end -= 1
    if any(character.isalnum() for character in text[start:end]):
        yield start, end


def _share(begins: dict[int, int], words: Sequence[tuple[int, int]], first: int, after: int) -> None:
    """Share the time from word `first` to word `after` among the words without a report, by their lengths."""
    lengths = [end - start for start, end in words[first:after]]
    begin, whole = begins[first], begins[after] - begins[first]
    passed = 0
    for number, length in enumerate(lengths, first):
        begins[number] = begin + whole * passed // sum(lengths)
        passed += length
