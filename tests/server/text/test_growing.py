"""A growing text comes out as the whole text would be read, however its pieces are cut, and as soon as it can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.errors import ApiError
from server.text import GrowingText, Pause, Pronunciations, prepare

TABLES = [Pronunciations({"nginx": "engine X", "New York": "the city"})]


def read(pieces: list[str], tables: list[Pronunciations]) -> list[str | int]:
    """The texts and the milliseconds of the pauses between them."""
    growing = GrowingText(tables)
    items = [item for piece in pieces for item in growing.feed(piece)] + growing.rest()
    joined: list[str | int] = []
    for item in items:
        if isinstance(item, Pause):
            joined.append(item.ms)
        elif joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    return joined


@given(st.data())
def test_pieces_do_not_matter(data: st.DataObject) -> None:
    """Random pieces give what the whole text gives; it is the text that a whole request would speak."""
    words = st.sampled_from(
        ["nginx", "New", "York", "[pause:1s]", "[pau", "[", "]", "se:2s", " ", ". ", "a", "é", "!", "\n"]
    )
    text = "".join(data.draw(st.lists(words, max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, []) == read([text], [])
    whole = "".join(segment.text for segment in prepare("x" + text + "x", "text", max_chars=1000))
    spoken = "".join(item for item in read(["x" + text + "x"], []) if isinstance(item, str))
    assert whole == spoken or "[pause" in text  # a whole text leaves out what is between two pauses and has no letter


def test_respellings_come_with_their_sentence() -> None:
    """A word of several parts is whole then; without tables each piece comes out at once."""
    growing = GrowingText(TABLES)
    assert growing.feed("I like New ") == []
    assert growing.feed("York. And ng") == ["I like the city."]
    assert growing.feed("inx") == []
    assert growing.rest() == [" And engine X"]
    assert GrowingText([]).feed("I lik") == ["I lik"]


def test_decomposed_words_are_respelled() -> None:
    """Also where an accent comes in the next piece."""
    assert read(["A cafe", "\u0301."], [Pronunciations({"café": "bar"})]) == ["A bar."]


def test_pauses_have_limits() -> None:
    """As in a whole text: each, and their sum."""
    with pytest.raises(ApiError):
        read(["[pause:31", "s]"], [])
    with pytest.raises(ApiError):
        read(["[pause:30s]"] * 21, [])
