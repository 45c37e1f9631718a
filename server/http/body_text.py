"""The bytes of a JSON body -> UTF-8: the charset that the client declares, byte order marks, halves of characters."""

import codecs
import re
from typing import Final

from server.http.errors import ApiError

NOT_UTF8: Final = (
    "The body is not UTF-8. Encode it as UTF-8, or name its charset in the header: "
    "Content-Type: application/json; charset=… Windows PowerShell 5.1 sends a string as ISO-8859-1: "
    "send bytes, -Body ([Text.Encoding]::UTF8.GetBytes($json)), and write files with -Encoding utf8."
)

_UTF16_MARKS: Final = {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}
"""PowerShell 5.1 writes one of them before a file's text; no UTF-8 begins with one."""

_NO_CHARSETS: Final = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7"}
"""Python's codecs of text that are no charset of a body. Some take quadratic time."""

_MAX_SURROGATES: Final = 100_000
"""Escaped surrogates, of halves and of whole characters, that are looked through: they take 0.1 s."""

_ESCAPED_BACKSLASH: Final = b"\\\\"
_STAND_IN: Final = b"\0\0"
"""Stands for an escaped backslash: no JSON holds a null byte."""

_HALF: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
"""One half of a surrogate pair without the other one."""


def to_utf8(body: bytes, charset: str | None) -> bytes:
    """`body` in UTF-8, without a byte order mark.

    Raises ApiError: `unsupported_media_type` for an unknown charset, `invalid_json` if the bytes are of another one.
    """
    charset = (charset or "utf-8").lower()
    if charset == "utf-8" and body[:2] in _UTF16_MARKS:
        charset = "utf-16"
    unknown = ApiError("unsupported_media_type", "The charset of the body is unknown; send UTF-8.")
    try:
        codec = codecs.lookup(charset).name
    except (LookupError, ValueError):
        raise unknown from None
    if codec.replace("_", "-") in _NO_CHARSETS:
        raise unknown
    try:
        text = body.decode(codec)
    except LookupError:  # a codec that is not one of text
        raise unknown from None
    except ValueError:
        message = NOT_UTF8 if charset == "utf-8" else "The body is not in the charset that it declares; send UTF-8."
        raise ApiError("invalid_json", message) from None
    return body.removeprefix(codecs.BOM_UTF8) if codec == "utf-8" else text.removeprefix("\ufeff").encode()


def without_halves(body: bytes) -> bytes:
    r"""`body` with U+FFFD (`\ufffd`) in the place of each escaped half of a character.

    A client that cuts a text after so many UTF-16 units cuts emoji in half.
    """
    escaped = body.count(rb"\ud") + body.count(rb"\uD")
    if not escaped or escaped > _MAX_SURROGATES or b"\0" in body:
        return body
    hidden = body.replace(_ESCAPED_BACKSLASH, _STAND_IN)
    return _HALF.sub(rb"\\ufffd", hidden).replace(_STAND_IN, _ESCAPED_BACKSLASH)
