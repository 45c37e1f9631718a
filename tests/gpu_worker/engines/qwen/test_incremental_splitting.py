# ruff: noqa: RUF001 -- texts of many scripts
"""The utterances of a text that comes in pieces: those of the whole text, in every script and for all pieces."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.engines.qwen.checkpoint.text_tokenizer import load_text_tokenizer
from gpu_worker.engines.qwen.incremental_splitting import IncrementalSplitter
from gpu_worker.engines.qwen.text_splitting import clean_text, split_into_utterances
from tests.checkpoints import tiny

LANGUAGES = [
    "auto",
    "english",
    "chinese",
    "japanese",
    "korean",
    "german",
    "french",
    "russian",
    "spanish",
    "italian",
    "portuguese",
]

_WRITTEN = (
    "Hello|world.|This|is|Dr.|Smith,|e.g.|a|test!|Is|it?|U.S.|No.|5|costs|3.50|€|etc.|so on...|Right?!|May|Mayor"
    "|今天天气很好。|我们去公园吧？|好的！|你好，|世界：|お早う。|いい天気ですね！|안녕하세요.|날씨가|좋네요!|「はい。」"
    "|Am 3. März kam Hr. Müller.|z.B.|Größe;|Привет!|Как дела?|т.е.|¿Qué tal?|¡Hola!|S. 12|M. Dupont|αβγ."
    "|\"Stop.|Go!\"|(See|p. 3.)|“Yes.|No.”|«Oui.»|‘It|isn't.’|'tis|dogs'|[1]|[2].|<b>|}|…|---|a@b.example"
    "|मैं हूँ।|อรุณสวัสดิ์|\n|\n\n|\t|1.|2)|iv.|- |e\u0301|\U0001f469\u200d\U0001f52c|1234"
)
WORDS = [*_WRITTEN.split("|"), "x" * 40, "好" * 30]
"""Characters that sentencex treats in ways of its own, and words of many scripts."""


@st.composite
def texts(draw: st.DrawFn) -> list[str]:
    """A text in pieces: words with spaces or without, cut anywhere."""
    joint = draw(st.sampled_from([" ", " ", ""]))
    text = joint.join(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30)))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=len(text))))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def split_in_pieces(
    pieces: Sequence[str], language: str, limit: int, count: object, settled: object
) -> tuple[list[str], list[str]]:
    """The utterances, and for each piece the beginning that was sure; each beginning is checked."""
    splitter = IncrementalSplitter(language, limit, count, settled)  # type: ignore[arg-type]
    utterances: list[str] = []
    sure: list[tuple[int, str]] = []
    text = ""
    for piece in [*pieces, ""]:
        text = (text + piece).lstrip()
        closed = piece == ""
        splitter.update(text.strip() if closed else text, closed=closed)
        while (utterance := splitter.next_utterance()) is not None:
            utterances.append(utterance)
        sure.append((len(utterances), splitter.beginning()))
    for number, begun in sure:
        assert not begun or utterances[number].startswith(begun.rstrip()), (utterances, number, begun)
    return utterances, [begun for _, begun in sure]


@given(pieces=texts(), language=st.sampled_from(LANGUAGES), limit=st.sampled_from([16, 24, 40, 96]))
def test_pieces_make_the_utterances_of_the_whole_text(pieces: list[str], language: str, limit: int) -> None:
    """With a token a byte, and with the tokens of a checkpoint."""
    tokenizer = load_text_tokenizer(tiny("custom_voice"))
    text = clean_text("".join(pieces))
    pieces = [] if not text else pieces
    for count, settled in (
        (lambda part: len(part.encode()), lambda part: part.encode()),
        (lambda part: len(tokenizer(part)), tokenizer.settled),
    ):
        wanted = list(split_into_utterances(text, language, limit, count)) if text else []
        assert split_in_pieces(pieces, language, limit, count, settled)[0] == wanted


def of_bytes(text: str) -> int:
    """A tokenizer with one token a byte."""
    return len(text.encode())


@pytest.mark.parametrize(
    ("pieces", "language", "limit"),
    [
        (["(One two. Three four. ", "Five.) Six seven."], "english", 24),
        (['He said "One. Two three. ', 'Four." Five.'], "english", 20),
        (["Wir am 3. Ma", "i da."], "german", 14),
        (["Sie um 3. ", "und danach."], "german", 12),
        (["One 1) Two three ", "2) Four five"], "english", 14),
        (["One two:\n- Three four ", "five\n- six"], "english", 16),
        (["One two. Three", " four. Five six"], "english", 16),
        (["Hello", " ", "there"], "english", 16),
        (["abcdefghij", "klmnopqrst"], "auto", 8),
    ],
)
def test_what_later_text_decides_is_held_back(pieces: list[str], language: str, limit: int) -> None:
    """A bracket or a quotation that is closed later, a month behind a number, a second item of a list, a long word."""
    wanted = list(split_into_utterances("".join(pieces), language, limit, of_bytes))
    assert split_in_pieces(pieces, language, limit, of_bytes, str.encode)[0] == wanted


@pytest.mark.parametrize(
    ("pieces", "beginnings"),
    [
        (["Hel", "lo", " wor", "ld, I", " am"], ["Hel", "Hello", "Hello", "Hello world,", "Hello world, I"]),
        (["你好", "，世", "界", "。再", "见"], ["你好", "你好，", "你好，", "你好，世界。", "你好，世界。"]),
        (["Dr. Smith", " is. He", " was"], ["Dr.", "Dr. Smith is.", "Dr. Smith is."]),
        (["... ", "so", " it is"], ["", "", "... so it"]),
    ],
)
def test_what_is_sure_comes_at_once(pieces: list[str], beginnings: list[str]) -> None:
    """Word by word in the first sentence; the next one when it is complete."""
    sure = split_in_pieces(pieces, "english", 96, of_bytes, str.encode)[1]
    assert [begun.rstrip() for begun in sure[:-1]] == beginnings
