"""The preferences of a client: its headers Accept and Accept-Encoding."""

import re
from collections.abc import Mapping
from typing import Final

from litestar.datastructures.headers import Accept

_NEVER: Final = re.compile(r"0(\.0*)?")


def preferred_type(headers: Mapping[str, str], offered: list[str]) -> str:
    """The media type of `offered` that the client likes best; the first one if none fits or Accept cannot be read."""
    try:
        return Accept(headers.get("accept", "*/*")).best_match(offered, default=offered[0]) or offered[0]
    except OverflowError:  # Litestar's, for an infinite q
        return offered[0]


def takes_gzip(headers: Mapping[str, str]) -> bool:
    """True if the client names gzip, and not to exclude it (q=0)."""
    codings = headers.get("accept-encoding", "").lower().replace(" ", "").split(",")
    weights = {name: weight for name, _, weight in (coding.partition(";q=") for coding in codings)}
    return "gzip" in weights and not _NEVER.fullmatch(weights["gzip"])
