"""A web worker's link to the main process: it takes the state of reloads, and asks for one."""

import asyncio
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from server.http.errors import ApiError
from server.reload.main_process import TAKEN_WITHIN_S
from server.reload.messages import (
    ReloadAnswer,
    ReloadAsked,
    ReloadOutcome,
    Replaced,
    StateForWorker,
    StateTaken,
    ToWorker,
    WebState,
    decode_to_worker,
    encode,
)

_ANSWER_TIMEOUT_S: Final = 3 * TAKEN_WITHIN_S
"""A reload may have to wait for the one before it."""

log = structlog.get_logger(__name__)


class MainLink:
    """The link of web worker number `worker`; it is used on one event loop, from `start` on."""

    def __init__(self, worker: int, link: socket.socket, outbox: socket.socket) -> None:
        self._worker = worker
        self._link = link
        self._outbox = outbox
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[ReloadOutcome]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, take: Callable[[WebState], Awaitable[None]], retire: Callable[[], None]) -> None:
        """Call `take` with the state of each reload, also of one that has come since the process was forked.

        Call `retire` when another process serves in the place of this one.
        """
        asyncio.get_running_loop().add_reader(self._link, self._on_readable, take, retire)

    def close(self) -> None:
        """Take nothing more."""
        if self._link.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._link)
            self._link.close()

    async def reload(self) -> ReloadOutcome:
        """Ask for a reload; ApiError (`worker_unavailable`) if the main process does not answer."""
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                self._outbox.send(encode(ReloadAsked(worker=self._worker, ask=number)))
                return await self._asked[number]
        except TimeoutError:
            raise ApiError("worker_unavailable", "The main process does not answer.") from None
        finally:
            del self._asked[number]

    def _on_readable(self, take: Callable[[WebState], Awaitable[None]], retire: Callable[[], None]) -> None:
        try:
            received, descriptors, _, _ = socket.recv_fds(self._link, 1, 1)
        except BlockingIOError:
            return
        if not received:  # the main process is gone, and this one ends soon
            self.close()
            return
        message = _read(descriptors[0])
        match message:
            case StateForWorker():
                task = asyncio.get_running_loop().create_task(self._take(take, message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case ReloadAnswer(ask=ask, outcome=outcome):
                for number, answer in self._asked.items():
                    if number <= ask and not answer.done():
                        answer.set_result(outcome)
            case Replaced():
                retire()

    async def _take(self, take: Callable[[WebState], Awaitable[None]], message: StateForWorker) -> None:
        try:
            await take(message.state)
        except Exception:
            log.exception("reload_failed")
            return
        self._outbox.send(encode(StateTaken(worker=self._worker, reload=message.reload)))


def _read(descriptor: int) -> ToWorker:
    """The message in a memfd, whose offset all web workers share."""
    try:
        return decode_to_worker(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    finally:
        os.close(descriptor)
