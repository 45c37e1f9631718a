"""`store: true`: the audio of one response goes to the store, as a whole file, under an id of its own.

The id is not the speech id: logs and dashboards show that one, and this one is the key to the audio.
"""

import secrets
from typing import Final

from server.audio import AudioFacts, AudioStore, Encoder
from shared.pcm import bytes_for

MAX_PCM_BYTES: Final = bytes_for(3 * 3600)
"""Of a streamed answer: three hours. Its copy is encoded in memory, up to 500 MB as wav, and 90 MB as mp3."""


class Keeper:
    """Keeps the audio of one response. `path` is where it will be.

    A stream cannot be stored as it was sent: its header does not know the length, and nothing in it leads to a second.
    So a stream has an `encoder` for whole files, which gets the same PCM: `feed`, then `finish`.
    A whole body is stored as it is: `keep`.
    """

    def __init__(
        self, store: AudioStore, facts: AudioFacts, encoder: Encoder | None, *, prefix: str, request_id: str
    ) -> None:
        self._store = store
        self._request_id = request_id
        self._facts = facts
        self._encoder = encoder
        self._pcm_bytes = 0
        self._id = secrets.token_hex(16)
        self.path = f"{prefix}/v1/audio/speech/{self._id}/audio"

    def feed(self, pcm: bytes, rate: float | None) -> None:
        """Encode the next piece of a stream, as Encoder.feed; beyond MAX_PCM_BYTES nothing is kept."""
        self._pcm_bytes += len(pcm)
        if self._pcm_bytes > MAX_PCM_BYTES:
            self._encoder = None
        if self._encoder is not None:
            self._encoder.feed(pcm, rate)

    async def finish(self) -> None:
        """Store the stream that has been fed."""
        if self._encoder is not None:
            await self.keep(self._encoder.finish())

    async def keep(self, audio: bytes) -> bool:
        """Store the whole audio; False if the store cannot take it."""
        return await self._store.put(self._id, audio, self._facts, request_id=self._request_id)
