"""Tables and JSON on stdout."""

import json
import sys
from typing import Any, Final

from rich.console import Console

_PIPE_WIDTH: Final = 200
"""Characters a line may have where no terminal limits it."""


def console() -> Console:
    """The console for tables: as wide as the terminal, or wide enough where there is none.

    Names come from clients, so brackets and :smile: in them have no meaning.
    """
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, markup=False, emoji=False)


def megabytes(count: int) -> str:
    """A number of bytes as people read it: "3,072 MB"."""
    return f"{count / 2**20:,.0f} MB"


def print_json(answer: Any) -> None:
    """Print a service's answer for other programs."""
    sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")
