"""Keys and tokens in texts for others: log lines, error messages, ids. `redact` takes them out.

A key of `key new` is known by its form. Those of TTS_API_KEYS and TTS_ADMIN_KEYS have any form, so the process keeps
them here. A client may send a key where none belongs: in a path, a request id, a field.
"""

import re
from collections.abc import Iterable
from typing import Final

_MIN_LENGTH: Final = 8
"""A shorter secret is a word, and would make holes in harmless texts."""

_FORM: Final = r"(?P<form>sk-tts-)[\w-]+"
_secrets: set[str] = set()
_pattern = re.compile(_FORM, re.IGNORECASE)


def keep_secret(secrets: Iterable[str]) -> None:
    """Take these out as well, from now on; for the whole process."""
    global _pattern  # noqa: PLW0603 -- a log line cannot carry the pattern along
    _secrets.update(secret for secret in secrets if len(secret) >= _MIN_LENGTH)
    longest_first = sorted(_secrets, key=len, reverse=True)
    _pattern = re.compile("|".join([*map(re.escape, longest_first), _FORM]), re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with an ellipsis in the place of each secret."""
    return _pattern.sub(lambda found: f"{found['form'] or ''}…", text)
