# ruff: noqa: RUF001
"""A growing text is cut at the same places however its pieces are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text import Granularity, SentenceSplitter

TEXT = 'Mr. X said: "No!" It costs 3.14, or 1,000… 好的，走吧。「行！」然后？ यह है। نعم؟ لا، أبدا. \n\nEnd'


def cut(granularity: Granularity, pieces: list[str]) -> list[str]:
    """The sentences of a text that comes in `pieces`."""
    splitter = SentenceSplitter(granularity)
    sentences = [sentence for piece in pieces for sentence in splitter.feed(piece)]
    rest = splitter.rest()
    return sentences + [rest] * bool(rest)


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (
            "sentence",
            [
                "Mr.",
                'X said: "No!"',
                "It costs 3.14, or 1,000…",
                "好的，走吧。",
                "「行！」",
                "然后？",
                "यह है।",
                "نعم؟",
                "لا، أبدا.",
                "End",
            ],
        ),
        (
            "clause",
            [
                "Mr.",
                "X said:",
                '"No!"',
                "It costs 3.14,",
                "or 1,000…",
                "好的，",
                "走吧。",
                "「行！」",
                "然后？",
                "यह है।",
                "نعم؟",
                "لا،",
                "أبدا.",
                "End",
            ],
        ),
    ],
)
def test_where_texts_are_cut(granularity: Granularity, expected: list[str]) -> None:
    """Behind the marks of their script, and not within numbers."""
    assert cut(granularity, [TEXT]) == expected


@given(st.data())
def test_pieces_do_not_matter(data: st.DataObject) -> None:
    """Random pieces give the sentences of the whole; nothing but white space is lost."""
    alphabet = st.sampled_from("ab1.!?…,;: \n\"')。！，」।؟é")
    text = data.draw(st.text(alphabet, max_size=60))
    pieces = []
    rest = text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    for granularity in ("sentence", "clause"):
        assert cut(granularity, pieces) == cut(granularity, [text])
        assert "".join("".join(cut(granularity, pieces)).split()) == "".join(text.split())


@pytest.mark.parametrize("mark", [".", "。", '."', "?!"])
def test_many_marks_take_no_time(mark: str) -> None:
    """200,000 of them, of which none ends a sentence for certain: a quadratic search would take an hour."""
    assert cut("clause", [mark * 200_000]) == [mark * 200_000]


@pytest.mark.timeout(10)
def test_many_silent_parts_take_no_time() -> None:
    """Nothing is said between these marks, so all join what follows. They were looked at again for each piece."""
    marks = ". " * 2_000
    assert cut("sentence", [*marks, "End. ", "Next"]) == [f"{marks}End.", "Next"]
