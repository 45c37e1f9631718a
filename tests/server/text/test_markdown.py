"""Markdown as a person would read it aloud, with the exact place of every word."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.markdown import read_markdown
from server.text.markdown_parser import MAX_NESTING
from server.text.spans import Span, source_range, text_of


def read(source: str) -> str:
    """The text that is spoken."""
    return text_of(read_markdown(source))


@pytest.mark.parametrize(
    ("source", "spoken"),
    [
        ("Hello.", "Hello."),
        ("", ""),
        ("# Title\n\nText.", "Title\n\nText."),
        ("### Title ###", "Title"),
        ("# # a", "# a"),
        ("Title\n=====\nText", "Title\n\nText"),
        ("**Bold**, _it_, ***both*** and ~~gone~~.", "Bold, it, both and gone."),
        ("in**ner** wo__rd__", "inner wo__rd__"),
        ("5 * 3 ** 4 and _x", "5 * 3 ** 4 and _x"),
        ("- one\n- two\n* three", "one\n\ntwo\n\nthree"),
        ("- [x] done", "[x] done"),
        ("1. one\n2. two", "1. one\n\n2. two"),
        ("3) a\n4) b", "3) a\n\n4) b"),
        ("1. 1. a", "1. 1. a"),
        ("- a\n  - b\n    1. c\n\n    d", "a\n\nb\n\n1. c\n\nd"),
        ("> quoted\n> on\n\nnot", "quoted\non\n\nnot"),
        ("> > twice\nlazy", "twice\nlazy"),
        ("a\n***\nb\n\n---\n\nc", "a\n\nb\n\nc"),
        ("[text](https://x.y/z?a=1 'title') and [ref][1]\n\n[1]: https://x.y", "text and ref"),
        ("[x](/foo)foo", "xfoo"),
        ("![a **cat**](cat.png) sits", "a cat sits"),
        ("<https://x.y>", "https://x.y"),
        ("`code` and ``a ` b`` and ` c `", "code and a ` b and c"),
        ("```py\nprint()\n```\nafter", "after"),
        ("~~~\nnever closed", ""),
        ("    indented code\n\ntext", "text"),
        ("| a | b |\n|---|:-:|\n| c | `d` |\n| e |", "a, b\n\nc, d\n\ne"),
        ("| a \\| b | c |\n|-|-|", "a | b, c"),
        ("a | b\n-|-\n1 | 2\n\nend", "a, b\n\n1, 2\n\nend"),
        ("a  \nb\\\nc\nd", "a\nb\nc\nd"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("<b>bold</b> <span class='x'>in</span>", "bold in"),
        ("<div>\n\n# in\n\n</div>", "in"),
        ("<div>\nin\n</div>", "\nin\n"),
        ("a <!-- b --> c", "a  c"),
        ("<!-- a\n\nb -->c", "c"),
        ("<!-- a", "<!-- a"),
        ("a &amp; b &#8364; &copy; &nope;", "a & b € © &nope;"),
        ("\\*no\\* \\# \\\\", "*no* # \\"),
        ("<think>plan</think>Hello", "Hello"),
        ("<THINK>\n# plan\n\n```\n</think>\n\n# Hello", "Hello"),
        ("a <thinking>b</thinking> c", "a  c"),
        ("<think>never ends", ""),
        ("it began in the prompt</think>Hello", "Hello"),
        ("Hello <think>a</think>there <think>b</think>.", "Hello there ."),
        ("a\r\nb\r\n\r\nc", "a\nb\n\nc"),
        ("a\rb", "a\nb"),
        ("日本**語**、[中文](x)。", "日本語、中文。"),
        ("\U0001f600 **a**", "\U0001f600 a"),
        ("a\u00a0b\tc", "a\u00a0b\tc"),
        (">" * 70 + " deep", ">" * 70 + " deep"),
    ],
)
def test_reading(source: str, spoken: str) -> None:
    """Marks, addresses, code and thoughts are left out; all other text is spoken, and lies where it should."""
    assert read(source) == spoken
    check_places(source, read_markdown(source))


def check_places(source: str, spans: list[Span]) -> None:
    """Spans are in the order of the source, and copies are what stands there."""
    ends = 0
    for span in spans:
        assert ends <= span.start <= span.end <= len(source)
        assert not span.copied or source[span.start : span.end] == span.text
        ends = span.end


@pytest.mark.parametrize(
    ("source", "word", "place"),
    [
        ("a &amp; b", "&", "&amp;"),
        ("\\* b", "*", "\\*"),
        ("| x | a \\| b |\n|-|-|", "a", "a"),
        ("| x | a \\| b |\n|-|-|", "b", "b"),
        ("> 1. x\n> 2. yz", "yz", "yz"),
        ("a <!-- x --> x", " x", " x"),
        ("<think>x</think> x", "x", "x"),
        ("[x](/foo)foo", "foo", "foo"),
        ("# # a a", "a a", "a a"),
        ("![in **alt**](a)", "alt", "alt"),
        ("`` a ` b ``", "b", "b"),
        ("in**ner**", "inner", "in**ner"),
    ],
)
def test_the_place_of_a_word(source: str, word: str, place: str) -> None:
    """It is that of its last occurrence: nothing before it is taken for it."""
    spans = read_markdown(source)
    at = text_of(spans).rindex(word)
    start, end = source_range(spans, at, at + len(word))
    assert source[start:end] == place
    assert start == source.rindex(place)


def test_nothing_is_lost_however_deep() -> None:
    """Up to the limit lists and quotes are read; beyond it, the text is read with its marks."""
    assert read("> " * (MAX_NESTING - 2) + "deep") == "deep"
    assert "deep" in read("> " * MAX_NESTING + "deep")
    assert "deep" in read("- " * MAX_NESTING + "deep")


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "*",
            "**",
            "_",
            "~~",
            "`",
            "``",
            "[",
            "]",
            "](",
            ")",
            "![",
            "<",
            ">",
            "<b>",
            "<br>",
            "&amp;",
            "&#x41;",
            "\\",
            "|",
            "\n",
            "\n\n",
            "\r\n",
            "\r",
            "  \n",
            "# ",
            "> ",
            "- ",
            "1. ",
            "12) ",
            "    ",
            "\t",
            "```",
            "|-|-|",
            "---",
            "===",
            "a",
            "word",
            "日本",
            "😀",
            "é",
            " ",
            "<!--",
            "-->",
            "<think>",
            "</think>",
            "[1]: x",
            ":",
            "\u2028",
            "\x00",
            "https://a.b",
        ]
    ),
    max_size=60,
).map("".join)


@given(FRAGMENTS)
def test_every_text_can_be_read(source: str) -> None:
    """Nothing raises, and every span lies in the source, in order."""
    check_places(source, read_markdown(source))


BLOCKS = st.lists(
    st.sampled_from(
        [
            "{}",
            "# {}",
            "**{}** {}",
            "- {}\n- {}",
            "> {}\n> {}",
            "1. {}\n2. {}",
            "[{}](http://x.y/w1) {}",
            "`{}`",
            "_{}_, {}",
            "| {} | {} |\n|-|-|\n| {} | {} |",
            "{}\n===",
            "![{}](w2)",
            "<b>{}</b>",
            "{}\\\n{}",
            "- > {}\n  > - {}",
            "<think>w0</think>{}",
        ]
    ),
    min_size=1,
    max_size=12,
)


@given(BLOCKS)
def test_every_word_is_spoken_where_it_stands(blocks: list[str]) -> None:
    """Each word of each block is spoken once, in order, and leads back to its own place."""
    template = "\n\n<!-- w3 -->\n\n".join(blocks)
    words = [f"word{number}w" for number in range(template.count("{}"))]
    source = template.format(*words)
    spans = read_markdown(source)
    text = text_of(spans)
    position = 0
    for word in words:
        position = text.index(word, position)
        start, end = source_range(spans, position, position + len(word))
        assert source[start:end] == word
        position += len(word)
    assert not re.search(r"\bw\d", text)  # neither addresses nor thoughts nor comments
