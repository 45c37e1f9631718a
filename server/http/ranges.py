"""Byte ranges of RFC 9110: which part of a body a request asks for.

One range is answered. A client must take the whole body for several ranges, and for what cannot be read.
"""

import re
from collections.abc import Mapping
from email.utils import formatdate
from typing import Final

_ONE_RANGE: Final = re.compile(r"bytes\s*=\s*(\d{0,4000})\s*-\s*(\d{0,4000})", re.IGNORECASE | re.ASCII)


class UnsatisfiableError(Exception):
    """The range begins behind the end of the body."""


def requested_range(headers: Mapping[str, str], size: int, *, etag: str, modified: str) -> range | None:
    """The offsets that `Range` asks for in a body of `size` bytes, with respect to `If-Range`; None means all.

    `etag` is a strong one, and `modified` the date in Last-Modified. UnsatisfiableError: there is no such part.
    """
    match = _ONE_RANGE.fullmatch(headers.get("range", "").strip())
    if match is None or headers.get("if-range", etag).strip() not in (etag, modified):
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        part = range(max(0, size - int(last)), size)
    elif last and int(last) < int(first):
        return None
    else:
        part = range(int(first), min(int(last) + 1, size) if last else size)
    if not part:
        raise UnsatisfiableError
    return part


def is_unchanged(headers: Mapping[str, str], etag: str) -> bool:
    """True if the client's `If-None-Match` names the body that it would get."""
    known = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
    return etag in known or "*" in known


def http_date(unix_s: float) -> str:
    """A date as HTTP writes it."""
    return formatdate(unix_s, usegmt=True)
