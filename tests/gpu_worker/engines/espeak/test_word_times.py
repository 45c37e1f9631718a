"""The times of words from the reports of a synthesizer, good ones and bad ones."""

import pytest

from gpu_worker.engines.espeak.word_times import find_words, time_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello world", ["Hello", "world"]),
        ("  don't — “stop”,  (now)! ", ["don't", "stop", "now"]),
        ("$5.50 well-known e.g. 3pm C++", ["$5.50", "well-known", "e.g", "3pm", "C++"]),
        ("你好\uff0cworld。", ["你", "好", "world"]),
        ("Größe\nnaïve\tcafé", ["Größe", "naïve", "café"]),
        ("… --- 🙂 ?", []),
        ("", []),
    ],
)
def test_words_are_those_of_the_text(text: str, words: list[str]) -> None:
    """Between white space, without the punctuation around them; each Han character is one."""
    assert [text[start:end] for start, end in find_words(text)] == words


def times(text: str, reports: list[tuple[int, int]], end: int = 1000) -> list[tuple[str, int, int]]:
    """Each word with its two samples."""
    return [
        (text[word.start : word.end], word.start_sample, word.end_sample) for word in time_words(text, reports, end)
    ]


def test_each_word_has_a_report() -> None:
    """A word ends where the next one begins, and the last one at the end."""
    assert times("one two three", [(0, 0), (4, 300), (8, 700)]) == [
        ("one", 0, 300),
        ("two", 300, 700),
        ("three", 700, 1000),
    ]


def test_several_reports_of_one_word() -> None:
    """A number is one word of the text, also if a report is beside it."""
    assert times("I have 1234 apples", [(0, 0), (2, 100), (7, 200), (8, 350), (7, 400), (12, 800)]) == [
        ("I", 0, 100),
        ("have", 100, 200),
        ("1234", 200, 800),
        ("apples", 800, 1000),
    ]


def test_words_without_a_report() -> None:
    """They share the time between their neighbours by their lengths, also in front and at the end."""
    assert times("ab cd efgh ij", [(6, 400)]) == [
        ("ab", 0, 200),
        ("cd", 200, 400),
        ("efgh", 400, 800),
        ("ij", 800, 1000),
    ]
    assert times("ab cd", []) == [("ab", 0, 500), ("cd", 500, 1000)]


@pytest.mark.parametrize(
    "reports",
    [[(8, 700), (4, 300)], [(4, 700), (8, 300)], [(99, 5000)], [(-7, 10), (4, -3)], [(4, 10**9), (8, 10**9)]],
)
def test_reports_that_make_no_sense(reports: list[tuple[int, int]]) -> None:
    """Times never go back, and never beyond the end."""
    found = times("one two three", reports)
    assert [word for word, _, _ in found] == ["one", "two", "three"]
    borders = [border for _, start, end in found for border in (start, end)]
    assert borders == sorted(borders)
    assert (borders[0], borders[-1]) == (0, 1000)
