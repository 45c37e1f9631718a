"""The heap trimmer: gives the memory of many requests back to the system when most of them have ended.

300 short speeches at once take a web worker from 65 to 265 MB, most of it the encoders' buffers.
The C library (glibc) keeps that for ever; a trim takes 0.1 s in a thread and leaves 88 MB.
"""

import asyncio
from typing import Final

from server.http.open_requests import OpenRequests
from shared.heap import trim_heap

_INTERVAL_S: Final = 1.0

MANY: Final = 32
"""Fewer requests leave so little behind that no trim is worth its time."""

_FEW: Final = 0.25
"""The share of the requests that may still be open at a trim."""


class HeapTrimmer:
    """Trims the heap after peaks of `requests`."""

    def __init__(self, requests: OpenRequests) -> None:
        self._requests = requests
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Watch in a task of its own for as long as the event loop runs."""
        self._task = asyncio.create_task(self._run(), name="heap-trimmer")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.check()

    async def check(self) -> None:
        """Trim the heap if there were many requests at once since the last trim, and few are left."""
        peak = self._requests.peak
        if peak >= MANY and self._requests.count <= peak * _FEW:
            self._requests.peak = self._requests.count
            await asyncio.to_thread(trim_heap)
