"""The voice of espeak-ng for each part of a text: a voice spells the letters of most scripts but its own.

espeak-ng says "Chinese letter" for each character of Chinese in an English text, in any voice but Chinese ones.
Digits, signs and white space belong to the letters before them, at the beginning of a text to the first ones.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple


class _Script(NamedTuple):
    """A script as a class of characters, the language that reads it for others, and all languages that read it."""

    letters: str
    language: str
    readers: tuple[str, ...]


_LATIN: Final = r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a"

_SPELLS_LATIN: Final = "ja"
"""The one language whose voice spells Latin letters, too."""

_SCRIPTS: Final = (
    _Script(r"\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u03ff\u1f00-\u1fff", "el", ("el",)),
    _Script(r"\u0400-\u0481\u048a-\u052f\u1c80-\u1c88", "ru", ("ru", "uk")),
    _Script(r"\u0531-\u0556\u0561-\u0587", "hy", ()),
    _Script(r"\u05d0-\u05f2", "he", ()),
    _Script(
        r"\u0620-\u064a\u066e-\u06d3\u06ee\u06ef\u06fa-\u06fc\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc", "ar", ("ar",)
    ),
    _Script(r"\u0904-\u0939\u0958-\u0961", "hi", ("hi",)),
    _Script(r"\u0985-\u09b9\u09dc-\u09e1", "bn", ()),
    _Script(r"\u0a05-\u0a39\u0a59-\u0a5e", "pa", ()),
    _Script(r"\u0a85-\u0ab9\u0ae0\u0ae1", "gu", ()),
    _Script(r"\u0b05-\u0b39\u0b5c-\u0b61", "or", ()),
    _Script(r"\u0b83-\u0bb9", "ta", ()),
    _Script(r"\u0c05-\u0c39\u0c58-\u0c61", "te", ()),
    _Script(r"\u0c85-\u0cb9\u0cde-\u0ce1", "kn", ()),
    _Script(r"\u0d05-\u0d3a\u0d5f-\u0d61\u0d7a-\u0d7f", "ml", ()),
    _Script(r"\u0d85-\u0dc6", "si", ()),
    _Script(r"\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46", "th", ()),
    _Script(r"\u1000-\u102a\u103f\u1050-\u1055", "my", ()),
    _Script(r"\u10a0-\u10ff\u1c90-\u1cbf", "ka", ()),
    _Script(r"\u1200-\u135a\u1380-\u138f", "am", ()),
    _Script(r"\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3", "ko", ("ko",)),
    _Script(r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d", "ja", ("ja",)),
    _Script(
        r"\u3005-\u3007\u3105-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff", "cmn", ("cmn", "yue")
    ),
)

_CLOSER: Final = {
    "ru": (re.compile("[єіїґЄІЇҐ]"), "uk"),
    "ar": (re.compile("[پچژگکی]"), "fa"),
}
"""Letters that only a neighbour of a script's language has, and that neighbour."""

_STYLED: Final = re.compile(
    r"(?![0-9])\d|(?<=\d)[\uff0c\uff0e\uff1a](?=\d)"
    r"|[\uff21-\uff3a\uff41-\uff5a\u2460-\u2468\u24b6-\u24e9\U0001d400-\U0001d7cb]"
    r"|[\u2800-\u28ff]"
)
"""Digits of other scripts, and letters and digits that are wide, in circles or of mathematics: one character each.

So are wide commas, stops and colons within a number, and patterns of Braille.
"""

_FIRST_BRAILLE: Final = "\u2800"
_LAST_BRAILLE: Final = "\u28ff"


def readable(text: str) -> str:
    """The text, as long as it was, with plain letters and digits for what espeak-ng is silent at or spells.

    No voice says a wide digit, though Chinese and Japanese write them, and few voices those of other scripts.
    A pattern of Braille becomes a space: espeak-ng names its dots, and where the names are long, as in Arabic and
    Finnish, they overflow a buffer of espeak-ng, which ends the process.
    """
    return text if text.isascii() else _STYLED.sub(lambda found: _plain(found[0]), text)


def _plain(character: str) -> str:
    if _FIRST_BRAILLE <= character <= _LAST_BRAILLE:
        return " "
    digit = unicodedata.decimal(character, None)
    return unicodedata.normalize("NFKC", character) if digit is None else str(digit)


def voice_runs(text: str, voice: str) -> Iterator[tuple[int, str]]:
    """The runs of `text` for one voice each: where a run ends, and its voice.

    `voice` is the language and the variant of the voice asked for ("en-us+f2"). It reads all that it can,
    and the others have its variant. The runs are found as they are asked for.
    """
    language, plus, variant = voice.partition("+")
    foreign = _foreign(language.split("-")[0])
    start = 0
    while start < len(text):
        first = foreign.letter.search(text, start)
        if first is None:
            yield len(text), voice
            return
        if first.start() > start and (start or foreign.own.search(text, 0, first.start())):
            yield first.start(), voice
        script = next(script for script in foreign.scripts if script.pattern.match(first[0]))
        end = script.others.search(text, first.end())
        start = end.start() if end else len(text)
        closer, neighbour = _CLOSER.get(script.language, (None, ""))
        reader = neighbour if closer and closer.search(text, first.start(), start) else script.language
        yield start, f"{reader}{plus}{variant}"


class _ForeignScript(NamedTuple):
    """`pattern` is one of its letters, `others` is a letter of any other script."""

    pattern: re.Pattern[str]
    others: re.Pattern[str]
    language: str


class _Foreign(NamedTuple):
    """The letters that a language cannot read: any `letter` of `scripts`. `own` is a letter that it can read."""

    letter: re.Pattern[str]
    own: re.Pattern[str]
    scripts: list[_ForeignScript]


@functools.cache
def _foreign(language: str) -> _Foreign:
    latin = _Script(_LATIN, "en-us", ())
    own = [script for script in _SCRIPTS if language in script.readers]
    own += [] if language == _SPELLS_LATIN else [latin]
    known = [*_SCRIPTS, latin]
    foreign = [script for script in known if script not in own]
    return _Foreign(
        letter=_any_of(script.letters for script in foreign),
        own=_any_of(script.letters for script in own),
        scripts=[
            _ForeignScript(
                _any_of([script.letters]),
                _any_of(other.letters for other in known if other is not script),
                script.language,
            )
            for script in foreign
        ],
    )


def _any_of(letters: Iterable[str]) -> re.Pattern[str]:
    return re.compile(f"[{''.join(letters)}]")
