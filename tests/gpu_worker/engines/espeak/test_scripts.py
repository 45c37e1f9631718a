"""Which voice reads which part of a text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.engines.espeak.scripts import readable, voice_runs


def runs(text: str, voice: str) -> list[tuple[str, str]]:
    """The parts of `text`, each with the language that reads it."""
    start = 0
    parts = []
    for end, reader in voice_runs(text, voice):
        parts.append((text[start:end], reader))
        start = end
    return parts


@pytest.mark.parametrize(
    ("voice", "text", "expected"),
    [
        ("en-us+f2", "Hello, world!", [("Hello, world!", "en-us+f2")]),
        ("en-us+f2", "naïve Ωmega", [("naïve ", "en-us+f2"), ("Ω", "el+f2"), ("mega", "en-us+f2")]),
        ("en-us+f2", "你好。", [("你好。", "cmn+f2")]),
        ("en-us+f2", "I say 你好, friend.", [("I say ", "en-us+f2"), ("你好, ", "cmn+f2"), ("friend.", "en-us+f2")]),
        ("en-us", "2024年5月", [("2024年5月", "cmn")]),
        ("en-us", "- «Москва» 2024 is", [("- «Москва» 2024 ", "ru"), ("is", "en-us")]),
        ("en-us", "Київ", [("Київ", "uk")]),
        ("de+m2", "مرحبا و سلام", [("مرحبا و سلام", "ar+m2")]),
        ("de", "گربه", [("گربه", "fa")]),
        ("en-us", "東京タワー", [("東京", "cmn"), ("タワー", "ja")]),
        ("en-us", "서울 שלום", [("서울 ", "ko"), ("שלום", "he")]),
        ("en-us", "नमस्ते", [("नमस्ते", "hi")]),
        ("en-us", "สวัสดี ქართული հայ አማ", [("สวัสดี ", "th"), ("ქართული ", "ka"), ("հայ ", "hy"), ("አማ", "am")]),
        ("cmn+f3", "你好 hello", [("你好 hello", "cmn+f3")]),
        ("cmn", "你好 ひらがな", [("你好 ", "cmn"), ("ひらがな", "ja")]),
        ("yue", "你好", [("你好", "yue")]),
        ("ja", "東京タワー and", [("東京", "cmn"), ("タワー ", "ja"), ("and", "en-us")]),
        ("ru", "Привет, hello Київ", [("Привет, hello Київ", "ru")]),
        ("uk", "Київ", [("Київ", "uk")]),
        ("el", "Αθήνα abc", [("Αθήνα abc", "el")]),
        ("ko", "서울 漢字", [("서울 ", "ko"), ("漢字", "cmn")]),
        ("en-us", "love \u2764\ufe0f it", [("love \u2764\ufe0f it", "en-us")]),
        ("en-us", "...", [("...", "en-us")]),
        ("en-us", "", []),
        ("en-us", "\u13a0 ᏣᎳᎩ", [("\u13a0 ᏣᎳᎩ", "en-us")]),
    ],
)
def test_runs(voice: str, text: str, expected: list[tuple[str, str]]) -> None:
    """A voice reads what it can; signs and digits belong to the letters before them."""
    assert runs(text, voice) == expected


TEXT = st.text(alphabet="ab 1.,'é你好かカЖїΩ\u0645گ서שĀ\U0001f600\n") | st.text()


@given(TEXT, st.sampled_from(["en-us+f2", "ru", "cmn+m1", "ja", "ar", "ko"]))
def test_runs_cover_the_text(text: str, voice: str) -> None:
    """No character is left out or read twice, and no run is empty."""
    parts = runs(text, voice)
    assert "".join(part for part, _ in parts) == text
    assert all(part for part, _ in parts)
    if voice != "cmn+m1":
        assert not any(re.search("[你好]", part) for part, reader in parts if not reader.startswith("cmn"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("第\uff11\uff12章、\uff21\uff22\uff23\uff01", "第12章、ABC\uff01"),
        ("\u0663\u0664 \u06f5 \u0969", "34 5 3"),
        ("\uff11\uff0c\uff10\uff10\uff10\uff1a\uff11\uff12\uff0e\uff15\uff0c", "1,000:12.5\uff0c"),
        ("\u2460\u24b6\u24e9", "1Az"),
        ("\U0001d401\U0001d4be\U0001d7d9", "Bi1"),
        ("x\u00b2 \u00bd \u2469 é 日本 1", "x\u00b2 \u00bd \u2469 é 日本 1"),
        ("a\u2800b \u280f\u28ff", "a b   "),
    ],
)
def test_letters_and_digits_become_plain(text: str, expected: str) -> None:
    """Each is one character, as before: words keep their places."""
    assert readable(text) == expected
    assert len(readable(text)) == len(text)
