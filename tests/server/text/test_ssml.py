"""SSML: what is spoken, how fast and with which pauses, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.errors import ApiError
from server.text.spans import Pause, Span, source_range, text_of
from server.text.ssml import MAX_DEPTH, is_ssml, read_ssml
from tests.server.text.test_markdown import check_places


def parts(source: str) -> list[str | int | tuple[str, float]]:
    """The texts, each with its rate if that is not 1, and the milliseconds of the pauses between them."""
    found: list[str | int | tuple[str, float]] = []
    for item in read_ssml(source):
        if isinstance(item, Pause):
            found.append(item.ms)
        elif item.rate != 1:
            found.append((item.text, round(item.rate, 4)))
        elif found and isinstance(found[-1], str):
            found[-1] += item.text
        else:
            found.append(item.text)
    return found


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("Hi", ["Hi"]),
        ("", []),
        ("Hi<break time='500ms'/>there", ["Hi", 500, "there"]),
        ("Hi<break time=' 1.5S '/>there", ["Hi", 1500, "there"]),
        ("Hi<break time='+2s'/>there", ["Hi", 2000, "there"]),
        ("Hi<break/>there<break strength='x-strong'/>", ["Hi", 500, "there", 1500]),
        ("a<break strength='none'/>b<break strength='STRONG'></break>", ["a", 0, "b", 1000]),
        ("<p>One.</p><p>Two.</p>", ["One.\n\nTwo."]),
        ("<p><s>One.</s> <s>Two.</s></p> three", ["One.\n\nTwo.\n\nthree"]),
        ("\n  white\n  <b> space </b>\n", [" white space "]),
        ("<sub alias='World Wide Web'>WWW</sub>!", ["World Wide Web!"]),
        ("<sub alias='x'>a <b>b</b> <sub alias='y'>c</sub></sub>", ["x"]),
        ("<sub>plain</sub> <sub alias=''>gone</sub>", ["plain "]),
        ("<prosody rate='80%'>slow</prosody>", [("slow", 0.8)]),
        ("<prosody rate='+10%'>a</prosody><prosody rate='-20%'>b</prosody>", [("a", 1.1), ("b", 0.8)]),
        ("<prosody rate='x-fast'>a<prosody rate='slow'>b</prosody></prosody>", [("a", 2.0), ("b", 1.5)]),
        ("<prosody rate='1.2'>a</prosody><prosody rate='.5'>b</prosody>", [("a", 1.2), ("b", 0.5)]),
        ("<prosody rate='900%'>a</prosody><prosody rate='1%'>b</prosody>", [("a", 4.0), ("b", 0.25)]),
        ("<prosody rate='default' pitch='high'>a</prosody>", ["a"]),
        ("<prosody pitch='+2st'>a</prosody>", ["a"]),
        ("<say-as interpret-as='characters'>AB 1</say-as>", ["A B 1 "]),
        ("<say-as interpret-as='spell-out'>é日</say-as>", ["é 日 "]),
        ("<say-as interpret-as='date'>1.2.</say-as>", ["1.2."]),
        ("<voice name='x'>a</voice> <emphasis>b</emphasis><audio src='x'>c</audio><mark name='d'/>", ["a bc"]),
        ("a &amp; b &lt; c &#65;&#x1F600; &quot;&apos;", ["a & b < c A\U0001f600 \"'"]),
        ("<![CDATA[a < b & &amp;]]>", ["a < b & &amp;"]),
        ("a<!-- b --><?c d?>e", ["ae"]),
        ("日本語<break time='1ms'/>é", ["日本語", 1, "é"]),
    ],
)
def test_reading(inner: str, expected: list[object]) -> None:
    """The tags that are known do what they say; of all others, the text stays."""
    source = f"<speak>{inner}</speak>"
    assert parts(source) == expected
    check_places(source, [item for item in read_ssml(source) if isinstance(item, Span)])


@pytest.mark.parametrize(
    "beginning",
    ["", "\n  ", "\ufeff", '<?xml version="1.0"?>', '\n<?xml version="1.0" encoding="utf-16"?>\n', "<!-- a -->"],
)
def test_what_may_stand_before_it(beginning: str) -> None:
    """White space, a byte order mark and an XML declaration; the declared encoding means nothing, this is text."""
    source = f"{beginning}<speak version='1.0' xmlns='http://www.w3.org/2001/10/synthesis'>é hi</speak>"
    spans = [item for item in read_ssml(source) if isinstance(item, Span)]
    assert text_of(spans) == "é hi"
    assert source[slice(*source_range(spans, 2, 4))] == "hi"
    assert is_ssml(source) == (beginning != "<!-- a -->")


@pytest.mark.parametrize(
    "text", ["speak", "<speaker>a</speaker>", "a <speak>b</speak>", "<SPEAK>a</SPEAK>", "< speak>", ""]
)
def test_what_is_no_ssml(text: str) -> None:
    """A text that begins otherwise is plain text, unless the request says that it is SSML."""
    assert not is_ssml(text)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("<speak>a", "no element found, in line 1, column 9"),
        ("<speak>\n<p>a</speak>", "mismatched tag, in line 2"),
        ("<speak>a & b</speak>", "not well-formed"),
        ("<speak>a</speak>b", "junk after document element"),
        ("<speak>&nbsp;</speak>", "undefined entity"),
        ("<speak>\x01</speak>", "not well-formed"),
        ("<speak>\ud800</speak>", "not well-formed"),
        ("plain text", "this is no SSML"),
        ("<p>a</p>", "one <speak> element, not <p>"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><speak>&b;</speak>', "no document type"),
        ('<!DOCTYPE speak SYSTEM "http://127.0.0.1/x"><speak>a</speak>', "no document type"),
        (f"<speak>{'<b>' * MAX_DEPTH}{'</b>' * MAX_DEPTH}</speak>", "64 deep"),
        ("<speak><break time='soon'/></speak>", "the time of a <break>"),
        ("<speak><break time='31s'/></speak>", "at most 30 s"),
        ("<speak><break time='-1s'/></speak>", "the time of a <break>"),
        ("<speak><break strength='huge'/></speak>", "the strength of a <break> is one of none"),
        ("<speak><prosody rate='quick'>a</prosody></speak>", "the rate of <prosody> is"),
        ("<speak><prosody rate='0%'>a</prosody></speak>", "above 0"),
        ("<speak><prosody rate='-100%'>a</prosody></speak>", "above 0"),
    ],
)
def test_refusals(source: str, problem: str) -> None:
    """Broken XML and values without a meaning are errors that say what is wrong and where."""
    with pytest.raises(ApiError) as caught:
        read_ssml(source)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "input")
    assert problem in caught.value.message


@pytest.mark.parametrize(
    ("inner", "spoken", "place"),
    [
        ("a &amp; b", "&", "&amp;"),
        ("a &amp; b", "b", "b"),
        ("日本 é &#65;", "A", "&#65;"),
        ("x <sub alias='a>b'><i>W</i>W</sub> y", "a>b", "<i>W</i>W"),
        ("<sub alias='Aa'>W</sub><b/>", "Aa", "W"),
        ("<say-as interpret-as='characters'>xyz</say-as>", "y z", "yz"),
        ("<![CDATA[a &lt; b]]>", "&lt;", "&lt;"),
        ("one\n  two", "one two", "one\n  two"),
    ],
)
def test_the_place_of_a_word(inner: str, spoken: str, place: str) -> None:
    """Characters are counted, not bytes; what stands for something else leads back to all of it."""
    source = f"<speak>{inner}</speak>"
    spans = [item for item in read_ssml(source) if isinstance(item, Span)]
    at = text_of(spans).index(spoken)
    start, end = source_range(spans, at, at + len(spoken))
    assert source[start:end] == place


PIECES = st.lists(
    st.sampled_from(
        [
            "<p>",
            "</p>",
            "<s>a</s>",
            "<sub alias='b'>",
            "</sub>",
            "<prosody rate='2'>",
            "</prosody>",
            "<break/>",
            "&amp;",
            "é",
            "<say-as interpret-as='characters'>",
            "</say-as>",
            "word",
            " ",
            "\r\n",
            "\n",
            "日本",
            "<![CDATA[",
            "]]>",
            "<",
            "&",
            "\x00",
        ]
    ),
    max_size=20,
).map("".join)


@given(PIECES)
def test_every_text_is_read_or_refused(inner: str) -> None:
    """Nothing raises but the refusal, and every span lies in the source, in order."""
    source = f"<speak>{inner}</speak>"
    try:
        items = read_ssml(source)
    except ApiError:
        return
    check_places(source, [item for item in items if isinstance(item, Span)])
