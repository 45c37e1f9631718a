"""The open WebSockets of this web worker, and their end when it stops.

Granian closes them at once when it stops. So the web worker drains them first: what is being spoken ends,
and each socket gets its close (1001).
"""

import asyncio
from typing import Final, Protocol

_CLOSE_GRACE_S: Final = 1.0
"""How long the sockets have to send their closes when the time of the drain is over."""


class Drainable(Protocol):
    """A socket as the drain sees it."""

    def drain(self) -> None:
        """End when nothing is being spoken any more."""

    def cut_off(self) -> None:
        """End now."""


class OpenSockets:
    """All sockets that are open. `draining`: the web worker stops, and a new socket ends when it has nothing to say."""

    def __init__(self) -> None:
        self.draining = False
        self._open: set[Drainable] = set()
        self._none_left = asyncio.Event()

    @property
    def count(self) -> int:
        """The number of open sockets."""
        return len(self._open)

    def add(self, one: Drainable) -> None:
        """A socket is open."""
        self._open.add(one)
        self._none_left.clear()
        if self.draining:
            one.drain()

    def discard(self, one: Drainable) -> None:
        """A socket has closed."""
        self._open.discard(one)
        if not self._open:
            self._none_left.set()

    async def drain(self, timeout_s: float) -> None:
        """Let all sockets end what they speak, within `timeout_s`, and close."""
        self.draining = True
        for one in list(self._open):
            one.drain()
        if not await self._all_closed(timeout_s):
            for one in list(self._open):
                one.cut_off()
            await self._all_closed(_CLOSE_GRACE_S)

    async def _all_closed(self, timeout_s: float) -> bool:
        if self._open:
            try:
                await asyncio.wait_for(self._none_left.wait(), timeout_s)
            except TimeoutError:
                return False
        return True
