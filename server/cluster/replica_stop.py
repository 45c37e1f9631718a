"""The moment at which Serve begins to take a replica away.

Serve waits for the replica's requests then, and calls `__del__` after the last one: an idle WebSocket would hold up the
replica until Serve kills it. Serve has no hook for the beginning.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from ray.serve._private.replica import Replica

_shut_down = Replica.perform_graceful_shutdown


def on_stop(stopping: Callable[[], None]) -> None:
    """Call `stopping` once on the running event loop, when Serve begins to take this process's replica away."""
    loop = asyncio.get_running_loop()
    told = False

    async def shut_down(serve_replica: Any) -> None:
        nonlocal told
        if not told:  # a Serve controller that starts anew asks again
            told = True
            loop.call_soon_threadsafe(stopping)
        await _shut_down(serve_replica)

    Replica.perform_graceful_shutdown = shut_down
