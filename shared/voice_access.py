"""The saved voices that a client may see and change, and the voice that a name means. Pure functions of plain data.

A voice belongs to the API key that made it. Other keys see it only if it is shared. A voice that no key owns is shared.
So two keys may each have a voice of the same name: a refusal would tell one of them of the other's voice.
"""

import unicodedata
from collections.abc import Iterable
from typing import Final, Protocol, TypeVar

from shared.protocol import VoiceAccess
from shared.text import JOINERS


class OwnedVoice(Protocol):
    """A saved voice, on either side of the protocol."""

    @property
    def id(self) -> str:
        """Its id, which it keeps."""

    @property
    def name(self) -> str:
        """Its name, which another voice may have too."""

    @property
    def owner(self) -> str:
        """The name of the key that made it; "" for none."""

    @property
    def shared(self) -> bool:
        """True if every key may use it; so it is if it has no owner."""


V = TypeVar("V", bound=OwnedVoice)

_OWN: Final = 0
_SHARED: Final = 1
_OF_ANOTHER_KEY: Final = 2


def is_visible(voice: OwnedVoice, access: VoiceAccess) -> bool:
    """True if the client may list the voice and speak with it."""
    return access.all or voice.shared or voice.owner == access.owner


def is_changeable(voice: OwnedVoice, access: VoiceAccess) -> bool:
    """True if the client may rename, share, export and delete a voice that it sees: of an owned one, its owner may."""
    return access.all or voice.owner in ("", access.owner)


def visible_voices(voices: Iterable[V], access: VoiceAccess) -> list[V]:
    """The voices that the client sees: its own first, then the shared ones, then those of other keys."""
    visible = [voice for voice in voices if is_visible(voice, access)]
    return sorted(visible, key=lambda voice: _rank(voice, access))


def find_voice(name: str, voices: Iterable[V], access: VoiceAccess) -> V | None:
    """The voice with that id or name, in any case; a name means the client's own voice before a shared one.

    An admin sees the voices of all keys. If several of them have the name, it means none: the id tells them apart.
    """
    wanted = folded(name)
    named: list[V] = []
    for voice in voices:
        if is_visible(voice, access):
            if folded(voice.id) == wanted:
                return voice
            if folded(voice.name) == wanted:
                named.append(voice)
    best = min((_rank(voice, access) for voice in named), default=_OWN)
    meant = [voice for voice in named if _rank(voice, access) == best]
    return meant[0] if len(meant) == 1 else None


def folded(name: str) -> str:
    """The form of a name in which two names of the same voice are equal."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", name).translate(JOINERS)
    return name.strip().casefold()


def _rank(voice: OwnedVoice, access: VoiceAccess) -> int:
    if voice.owner == access.owner:
        return _OWN
    return _SHARED if voice.shared else _OF_ANOTHER_KEY
