"""The origin of the speech in the standard metadata of an audio file: a label, not a watermark.

It tells that the speech is synthetic, by which model, when, and under which request id: the marking of the EU's
AI Act, Art. 50 (2). A program can read the label, and any program can remove it.
"""

import struct
from datetime import UTC, datetime
from typing import Final

import msgspec

_INFO_NAMES: Final = {"artist": b"IART", "comment": b"ICMT", "date": b"ICRD"}
"""The names of RIFF's chunk INFO. The other containers' names are FFmpeg's."""


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """The origin of one answer."""

    model: str
    request_id: str
    made_at: datetime

    def tags(self) -> dict[str, str]:
        """The tags by FFmpeg's names."""
        return {
            "artist": f"{self.model} (synthetic speech)",
            "comment": f"Synthetic speech, artificially generated. Model: {self.model}. Request: {self.request_id}.",
            "date": self.made_at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        }

    def riff_chunk(self) -> bytes:
        """The tags as the chunk LIST/INFO of a WAV file."""
        content = b"INFO"
        for name, text in self.tags().items():
            value = text.encode() + b"\0"
            content += struct.pack("<4sI", _INFO_NAMES[name], len(value)) + value + b"\0" * (len(value) % 2)
        return struct.pack("<4sI", b"LIST", len(content)) + content
