"""The end of a web worker that another process has replaced: it takes no more connections, and ends with its last one.

Granian would close all sockets at once, also those with a handshake or a request on its way, so it is told to stop
only when no connection is left.
"""

import asyncio
import os
import signal
import socket
from typing import Final

from server.http.middleware import HttpMiddleware
from server.processes.connection_reaper import ConnectionReaper

_PAUSE_S: Final = 0.5


class Retirement:
    """The end of this web worker, which accepts connections with `listener`, the descriptor of its listening socket.

    Without a `listener` of the main process, nothing replaces this web worker.
    """

    def __init__(self, application: HttpMiddleware, reaper: ConnectionReaper, listener: int | None) -> None:
        self._application = application
        self._reaper = reaper
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Take no more connections, and end when the last one has closed."""
        if self._task is None and self._listener is not None:
            self._leave_listener(self._listener)
            self._application.closes_connections = True
            self._task = asyncio.create_task(self._end_with_connections(), name="retirement")

    @staticmethod
    def _leave_listener(listener: int) -> None:
        """Put a socket that nothing connects to behind the descriptor.

        Granian finds no more connections to accept, and goes on with the handshakes that it has begun. The listening
        socket stays open in the main process and in the new web worker, with all that waits in its backlog.
        """
        with socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            os.dup2(deaf.fileno(), listener, inheritable=False)

    async def _end_with_connections(self) -> None:
        # The sweep in progress may have begun while there were more connections.
        first = self._reaper.sweeps + 2
        while self._reaper.sweeps < first or self._reaper.count:  # noqa: ASYNC110 -- the sweeps are on a schedule
            await asyncio.sleep(_PAUSE_S)
        os.kill(os.getpid(), signal.SIGTERM)
