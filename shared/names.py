"""What a saved voice may be called, as far as both sides look at it."""

from typing import Final

JOINERS: Final = dict.fromkeys((0x200C, 0x200D))
"""Zero-width (non-)joiners, for str.translate to take out.

Persian and Indic words and composed emoji need them, and nobody sees them; Python calls them unprintable.
"""


def is_printable(name: str) -> bool:
    """Whether there is something to see in `name`, and nothing in it that steers a terminal or the direction."""
    visible = name.translate(JOINERS)
    return bool(visible.strip()) and visible.isprintable()
