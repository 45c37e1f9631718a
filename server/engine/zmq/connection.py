"""The DEALER socket of one web process: it connects, sends without waiting, and receives without starving others.

`Connection` owns the socket and the small messages that found no room in it. It must not know what a message means.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from shared.protocol import (
    Append,
    Cancel,
    Credit,
    EndText,
    FromWorker,
    Message,
    ProtocolError,
    decode_from_worker,
    encode,
)
from shared.sockets import MAX_MESSAGE_BYTES, connect_dealer

_MESSAGES_A_TURN: Final = 32
"""Messages received before the event loop gets a turn: a receive that is ready never suspends by itself."""

_LINGER_MS: Final = 200
"""Time for the last cancels to leave when the socket closes."""

log = structlog.get_logger(__name__)


SmallMessage = Credit | Cancel | Append | EndText
"""Messages about a request that the GPU worker has. They may be sent a moment later, in their order."""


class Connection:
    """One DEALER. Its callbacks run on the event loop and must not block."""

    def __init__(
        self,
        url: str,
        *,
        on_connected: Callable[[], None],
        on_lost: Callable[[], None],
        on_message: Callable[[FromWorker, bytes | None], None],
    ) -> None:
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_message = on_message
        self._context = zmq.asyncio.Context()
        # pyzmq's asyncio sockets are untyped where they differ from the plain ones.
        self._dealer: Any = connect_dealer(self._context, url)
        self._unsent: deque[SmallMessage] = deque()
        monitor = self._dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._tasks = [asyncio.create_task(self._watch(monitor)), asyncio.create_task(self._receive())]

    async def close(self) -> None:
        """Stop receiving, let the last messages leave, and close the socket."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._dealer.set(zmq.LINGER, _LINGER_MS)
        self._context.destroy()

    def send(self, message: Message, payload: bytes | None = None) -> bool:
        """Send now; False, at once, if no worker is connected or the socket's queue is full.

        ProtocolError if the message is too large: the GPU worker would cut the connection, with all that is on it.
        """
        frames = encode(message, payload)
        if max(map(len, frames)) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"more than {MAX_MESSAGE_BYTES} bytes")
        try:
            sent = self._dealer.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        # With NOBLOCK the future is done when it is returned.
        return sent.exception() is None

    def send_or_keep(self, message: SmallMessage) -> None:
        """Send now, or keep the message for `send_kept` if there is no room."""
        if self._unsent or not self.send(message):
            self._unsent.append(message)

    def send_kept(self) -> None:
        """Send kept messages while there is room."""
        while self._unsent and self.send(self._unsent[0]):
            self._unsent.popleft()

    async def _watch(self, monitor: Any) -> None:
        while True:
            event = await recv_monitor_message(monitor)
            try:
                self._take_event(event["event"])
            except Exception:  # without this task, no loss of the worker would be seen
                log.exception("worker_event_not_handled")

    def _take_event(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._on_connected()
        elif event == zmq.EVENT_DISCONNECTED:
            self._unsent.clear()  # they were for a worker that is gone
            self._on_lost()

    async def _receive(self) -> None:
        received = 0
        while True:
            frames: list[bytes] = await self._dealer.recv_multipart()
            try:
                self._on_message(*decode_from_worker(frames))
            except ProtocolError as error:
                log.warning("worker_message_invalid", error=str(error))
            received += 1
            if received % _MESSAGES_A_TURN == 0:
                await asyncio.sleep(0)
