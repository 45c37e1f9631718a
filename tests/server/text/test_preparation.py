"""From an input to segments: pauses, offsets, and what is left out."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.errors import ApiError
from server.text import InputFormat, PreparedSegment, Pronunciations, prepare
from shared.composition import compose
from shared.protocol import Segment
from shared.text import is_speakable

SAMPLES_A_MS = 24


def spoken(segments: list[PreparedSegment]) -> list[tuple[str, int]]:
    """The text of each segment, and the pause behind it."""
    return [(segment.text, segment.pause_ms) for segment in segments]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello there.", [("Hello there.", 0)]),
        (" Two\n\nparagraphs. ", [(" Two\n\nparagraphs. ", 0)]),
        ("One.[pause:1.5s]Two.", [("One.", 1500), ("Two.", 0)]),
        ("One. [pause:1.5s] Two.", [("One. ", 1500), (" Two.", 0)]),
        ("One. [PAUSE: 500 MS ] Two.", [("One. ", 500), (" Two.", 0)]),
        ("[pause:2s]One.", [("", 2000), ("One.", 0)]),
        ("One.[pause:2s]", [("One.", 2000)]),
        ("[pause:1s][pause:.25s]One.[pause:1s] [pause:1ms]", [("", 1250), ("One.", 1001)]),
        ("One.[pause:1s] … [pause:2s]Two.", [("One.", 3000), ("Two.", 0)]),
        ("One.[pause:0s] Two.", [("One. Two.", 0)]),
        ("One.[pause:30s]", [("One.", 30_000)]),
        ("a[pause:1s]b[pause:1s]c", [("a", 1000), ("b", 1000), ("c", 0)]),
        ("…", [("", 0)]),
        ("---[pause:1s]---", [("", 1000)]),
        ("[pause:1s]", [("", 1000)]),
        ("<|im_end|> [pause:1s]", [("", 1000)]),
        (
            "A [pause] of [pause:x] and [pause:1h] and pause:1s.",
            [("A [pause] of [pause:x] and [pause:1h] and pause:1s.", 0)],
        ),
        ("[[pause:1s]]a", [("", 1000), ("]a", 0)]),
        ("日本。[pause:1s]語。", [("日本。", 1000), ("語。", 0)]),
        ("\U0001f600 [pause:1s] é", [("", 1000), (" é", 0)]),
    ],
)
def test_pauses(text: str, expected: list[tuple[str, int]]) -> None:
    """A pause mark is silence behind the segment before it; what has no letter or digit is left out."""
    assert spoken(prepare(text, "text", max_chars=10_000)) == expected


@pytest.mark.parametrize(
    "text", ["a\u0301", "Müller hört", "Tiếng Việt đẹp", "한국어 음성", "ガギグ", "\u0995\u09c7\u09be"]
)
@pytest.mark.parametrize("input_format", ["text", "markdown", "ssml"])
def test_decomposed_letters_are_composed(text: str, input_format: InputFormat) -> None:
    """Each keeps its place in the input, with all of its marks."""
    composed, decomposed = (unicodedata.normalize(form, f"x {text} y") for form in ("NFC", "NFD"))
    before, behind = ("<speak>", "</speak>") if input_format == "ssml" else ("", "")
    (segment,) = prepare(before + decomposed + behind, input_format, max_chars=100)
    assert segment.text == composed
    for index, letter in enumerate(composed):
        start, end = segment.source_range(index, index + 1)
        assert letter in unicodedata.normalize("NFC", (before + decomposed)[start:end])
        assert end - start <= 4


@pytest.mark.parametrize("text", ["a[pause:30.1s]", "a[pause:30001ms]", "a[pause:999999s]", "a[pause:30s]" * 21])
def test_pauses_have_limits(text: str) -> None:
    """One has at most 30 s, and all of them ten minutes."""
    with pytest.raises(ApiError, match="at most") as caught:
        prepare(text, "text", max_chars=10_000)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "input")


@pytest.mark.parametrize(
    ("text", "input_format", "expected"),
    [
        ("<speak>Hi<break time='1s'/>there</speak>", "auto", [("Hi", 1000), ("there", 0)]),
        ("<speak>Hi</speak>", "text", [("<speak>Hi</speak>", 0)]),
        ("**Hi**", "auto", [("**Hi**", 0)]),
        ("**Hi**", "markdown", [("Hi", 0)]),
        ("**Hi [pa**use:1s] there", "markdown", [("Hi ", 1000), (" there", 0)]),
        ("# One [pause:1s]\n\n---\n\n- [pause:2s] Two", "markdown", [("One ", 3000), (" Two", 0)]),
        ("<speak>Hi [pause:1s] <break time='20ms'/>you</speak>", "ssml", [("Hi ", 1020), ("you", 0)]),
        ("<speak><break time='1s'/>…</speak>", "ssml", [("", 1000)]),
        ("<speak><prosody rate='50%'>a</prosody>b</speak>", "ssml", [("a", 0), ("b", 0)]),
        ("<think>hm</think>", "markdown", [("", 0)]),
        ("```\ncode\n```", "markdown", [("", 0)]),
    ],
)
def test_formats(text: str, input_format: InputFormat, expected: list[tuple[str, int]]) -> None:
    """Pause marks hold in every format, and auto means SSML or text."""
    assert spoken(prepare(text, input_format, max_chars=1000)) == expected


def test_pronunciations_lead_back_to_the_input() -> None:
    """Through Markdown, too: a part of a respelling stands for the whole word."""
    source = "Use **ngi**nx [pause:1s] and *C*."
    words = [Pronunciations({"nginx": "engine X"}), Pronunciations({"c": "see", "nginx": "no"})]
    first, second = prepare(source, "markdown", pronunciations=words, max_chars=1000)
    assert (first.text, second.text) == ("Use engine X ", " and see.")
    assert source[slice(*first.source_range(4, 7))] == source[slice(*first.source_range(11, 12))] == "ngi**nx"
    assert source[slice(*second.source_range(5, 8))] == "C"


def test_pronunciations_may_not_make_a_text_endless() -> None:
    """The limit counts what is to be spoken."""
    with pytest.raises(ApiError, match="599 characters, more than 598") as caught:
        prepare("a" + " a" * 199, "text", pronunciations=[Pronunciations({"a": "bb"})], max_chars=598)
    assert caught.value.param == "input"


def test_what_the_worker_gets() -> None:
    """Text, pause and rate, without the offsets."""
    assert [segment.to_struct() for segment in prepare("[pause:1s]Hello.[pause:2s]", "text", max_chars=100)] == [
        Segment(text="", pause_ms=1000),
        Segment(text="Hello.", pause_ms=2000),
    ]


PIECES = st.lists(
    st.sampled_from(
        ["[pause:1s]", "[pause:1ms]", "[pause:", "[", "]", "word ", "é日\U0001f600", "\n\n", "…", "<|x|>", " "]
    )
)


@given(PIECES.map("".join) | st.text().map(compose))
def test_no_text_is_lost_and_offsets_are_exact(text: str) -> None:
    """Every letter outside the marks is spoken once, in order, and each character knows its place in the input."""
    segments = prepare(text, "text", max_chars=10_000)
    places = []
    for segment in segments:
        for index, character in enumerate(segment.text):
            start, end = segment.source_range(index, index + 1)
            assert text[start:end] == character
            places.append(start)
    assert places == sorted(set(places))
    left_out = "".join(character for index, character in enumerate(text) if index not in set(places))
    rest = re.sub(r"\[pause:1m?s\]", "", left_out, flags=re.IGNORECASE)
    assert not is_speakable(rest)
    assert all(segment.text for segment in segments[1:])


MARKUP = st.lists(
    st.sampled_from(
        ["**", "# ", "`", "\n", "[", "](x)", "|", "<b>", "&amp;", "<think>", "nginx ", "a", "日", "[pause:1s]", "…"]
    )
).map("".join)


@given(MARKUP, st.sampled_from(["auto", "text", "markdown", "ssml", "speak"]))
def test_every_input_is_prepared_or_refused(text: str, kind: str) -> None:
    """Every segment but the first is speakable, and each of its characters has a place in the input, in order."""
    source = f"<speak>{text}</speak>" if kind == "speak" else text
    input_format: InputFormat = "auto" if kind == "speak" else kind  # type: ignore[assignment]
    try:
        segments = prepare(
            source, input_format, pronunciations=[Pronunciations({"nginx": "engine X"})], max_chars=10_000
        )
    except ApiError:
        return
    assert segments
    assert all(is_speakable(segment.text) for segment in segments if segment.text)
    assert all(segment.text for segment in segments[1:])
    reached = 0
    for segment in segments:
        for index in range(len(segment.text)):
            start, end = segment.source_range(index, index + 1)
            assert 0 <= start <= end <= len(source)
            assert start >= reached or (start, end) == segment.source_range(index - 1, index)
            reached = start


@given(PIECES.map("".join), st.data())
def test_a_range_is_from_its_first_to_its_last_character(text: str, data: st.DataObject) -> None:
    """The source of several characters reaches from that of the first to that of the last."""
    segment = data.draw(st.sampled_from(prepare(text, "text", max_chars=10_000)))
    if segment.text:
        start = data.draw(st.integers(0, len(segment.text) - 1))
        end = data.draw(st.integers(start + 1, len(segment.text)))
        first, last = segment.source_range(start, start + 1), segment.source_range(end - 1, end)
        assert segment.source_range(start, end) == (first[0], last[1])
