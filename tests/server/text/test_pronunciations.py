"""Pronunciations: whole words in any case, the longest first, and a file that is checked when the service starts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text import Pronunciations, PronunciationsError, load_pronunciations
from server.text.pronunciations import respell
from server.text.spans import Span, copied, source_range, text_of

ENTRIES = {
    "nginx": "engine X",
    "C++": "see plus plus",
    "C": "see",
    "Node.js": "node jay ess",
    "New York": "big apple",
    "New": "fresh",
    "重庆": "虫庆",
    "Straße": "street",
    "e": "E",
    "@home": "at home",
    "mute": "",
    "हिन": "x",
}


def respelled(text: str) -> str:
    """`text` with ENTRIES applied."""
    return text_of(respell([copied(text, 0, len(text))], [Pronunciations(ENTRIES)]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nginx", "engine X"),
        ("NGINX, Nginx's (nginx)", "engine X, engine X's (engine X)"),
        ("nginxes snginx nginx2 nginx_", "nginxes snginx nginx2 nginx_"),
        ("C++ and C, not CC", "see plus plus and see, not CC"),
        ("node.JS", "node jay ess"),
        ("node.jsx node js", "node.jsx node js"),
        ("New York, new\n york, New Yorker", "big apple, big apple, fresh Yorker"),
        ("我在重庆住", "我在虫庆住"),
        ("STRASSE", "street"),
        ("é e\u0301 e", "é e\u0301 E"),
        ("me@home @home", "meat home at home"),
        ("a mute b", "a  b"),
        ("हिन्दी", "हिन्दी"),
        ("", ""),
    ],
)
def test_whole_words(text: str, expected: str) -> None:
    """Words are replaced whole, in any case; characters of Chinese are words, and accents belong to their letters."""
    assert respelled(text) == expected


def test_a_decomposed_word_is_the_same_word() -> None:
    """In the table and in the respelling; `prepare` composes the text."""
    table = Pronunciations({"Cafe\u0301": "cafe\u0301 bar"})
    assert text_of(respell([copied("Café", 0, 4)], [table])) == "café bar"


def test_the_place_of_a_respelled_word() -> None:
    """It is that of the whole old word, also if that was in two spans; the words around it keep their own."""
    source = "a **ng**inx b"
    spans = list(
        respell([copied(source, 0, 2), copied(source, 4, 6), copied(source, 8, 13)], [Pronunciations(ENTRIES)])
    )
    assert text_of(spans) == "a engine X b"
    assert source_range(spans, 2, 3) == source_range(spans, 2, 10) == (4, 11)
    assert source_range(spans, 11, 12) == (12, 13)


def test_the_first_table_counts() -> None:
    """An entry of a request counts before those of the service, and no respelling is respelled."""
    tables = [Pronunciations({"a": "b", "x": "y"}), Pronunciations({"a": "c", "b": "d", "x z": "no"})]
    assert text_of(respell([copied("a b x z", 0, 7)], tables)) == "b d y z"


@given(st.lists(st.sampled_from([*ENTRIES, " ", "x", "++", "s", ".", "\n", "日"])).map("".join) | st.text())
def test_no_text_is_lost(text: str) -> None:
    """Other words are copied, and the spans cover the whole text in order."""
    position = 0
    for span in respell([copied(text, 0, len(text))], [Pronunciations(ENTRIES)]):
        assert span.start == position
        assert span == copied(text, span.start, span.end) or span.text in ENTRIES.values()
        position = span.end
    assert position == len(text)


def test_a_file(tmp_path: Path) -> None:
    """It has a table for each language."""
    path = tmp_path / "words.toml"
    path.write_text('[all]\nnginx = "engine X"\n[de]\n"New York" = "Nju Jork"\n', encoding="utf-8")
    tables = load_pronunciations(path)
    assert list(tables) == ["all", "de"]
    assert text_of(respell([Span("nginx in New York", 0, 17)], list(tables.values()))) == "engine X in Nju Jork"
    assert load_pronunciations(None) == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('nginx = "engine X"', r"a table for each language"),
        ("[en]\nnginx = 1", r"a table for each language"),
        ("[en", "words.toml"),
        ('[en]\n"" = "x"', "words.toml"),
        (f'[en]\nx = "{"y" * 201}"', "words.toml"),
        ("[en]\n" + "".join(f'w{number} = "x"\n' for number in range(10_001)), "more than 10000 entries"),
        ('[englsh]\nnginx = "engine X"', r"no model speaks \[englsh\]; a table is named by a language"),
        ("#" * 1_000_001, "larger than 1 MB"),
        (None, "cannot be read by"),
    ],
)
def test_a_wrong_file(tmp_path: Path, content: str | None, problem: str) -> None:
    """The message names the file, and what it should hold."""
    path = tmp_path / "words.toml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(PronunciationsError, match=problem):
        load_pronunciations(path)
