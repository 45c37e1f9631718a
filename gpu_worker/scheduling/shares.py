"""The audio that each client has had, by which clients take turns. Plain arithmetic in seconds of audio.

The algorithm is start-time fair queueing. The clock of a client advances by the audio that the client gets.
The client whose clock is furthest behind is next.
A client that comes back begins where the others are, so idle time earns nothing.
"""

from operator import itemgetter
from typing import Final

MAX_CLIENTS: Final = 10_000
"""Clients that are remembered. Those that are least ahead of the others are forgotten first."""


class AudioShares:
    """The clocks of all clients."""

    def __init__(self) -> None:
        self._clocks: dict[str, float] = {}
        self._served = 0.0  # the clock of the client that was served last

    def __getitem__(self, client: str) -> float:
        """The clock of a client, in seconds of audio."""
        return self._clocks.get(client, self._served)

    def join(self, client: str) -> None:
        """A client that had no request in the queue has one."""
        self._clocks[client] = max(self[client], self._served)
        if len(self._clocks) > MAX_CLIENTS:
            self._clocks = dict(sorted(self._clocks.items(), key=itemgetter(1))[MAX_CLIENTS // 2 :])

    def serve(self, client: str, audio_s: float) -> None:
        """A request of `client` is next; its speech will last for about `audio_s`."""
        self._served = max(self._served, self[client])
        self.charge(client, audio_s)

    def charge(self, client: str, audio_s: float) -> None:
        """The client has got `audio_s` more than was expected; negative: less."""
        self._clocks[client] = self[client] + audio_s
