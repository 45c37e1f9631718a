"""The main process's side of a reload: it reads the settings, and each web worker gets the same state.

SIGHUP and POST /admin/reload come here alike. A reload is over when every web worker has taken the state,
and only then is it answered. A web worker that starts later is forked from the main process, and has the state.
The state crosses in a memfd: a message is a few bytes, so a web worker that stands still holds up no other.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from server.reload.messages import (
    FromWorker,
    ReloadAnswer,
    ReloadAsked,
    ReloadOutcome,
    Replaced,
    StateForWorker,
    StateTaken,
    ToWorker,
    WebState,
    decode_from_worker,
    encode,
)

TAKEN_WITHIN_S: Final = 10.0
"""How long a reload waits for the web workers. One that stands still takes the state when it goes on."""

MESSAGE_BYTES: Final = 256
"""A message of a web worker is shorter."""

log = structlog.get_logger(__name__)


class _Running(msgspec.Struct):
    """A reload that some web workers have not taken yet. `asks`: of the web workers that wait for its outcome."""

    number: int
    outcome: ReloadOutcome
    asks: dict[int, int]
    waiting: set[int]
    deadline: float


class Reloads:
    """All reloads, one at a time. The serve loop calls the methods; `wake` ends its wait.

    `read` reads everything anew: its outcome, and the state if that has changed.
    `is_over` tells whether what else the last reload has begun in the main process is over.
    """

    outbox: socket.socket
    """The socket to which web workers send their messages; there from `start` on."""

    def __init__(
        self,
        read: Callable[[], tuple[ReloadOutcome, WebState | None]],
        wake: Callable[[], object],
        is_over: Callable[[], bool],
    ) -> None:
        self._read = read
        self._wake = wake
        self._is_over = is_over
        self._links: dict[int, socket.socket] = {}  # by web worker
        self._received: queue.SimpleQueue[FromWorker] = queue.SimpleQueue()
        self._requested = False
        self._asks: dict[int, int] = {}
        self._running: _Running | None = None
        self._number = 0

    def start(self) -> None:
        """Listen to the web workers."""
        self._inbox, self.outbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener = threading.Thread(target=self._receive, name="reloads", daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Listen no more."""
        self.outbox.close()  # the end of file for the listener, once no web worker has it either
        self._inbox.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        for link in (self._inbox, *self._links.values()):
            link.close()

    def link(self, worker: int) -> socket.socket:
        """The end of a new link for a web worker that is about to be forked."""
        self.unlink(worker)
        self._links[worker], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._links[worker].setblocking(False)
        theirs.setblocking(False)
        return theirs

    def unlink(self, worker: int) -> None:
        """A web worker is dead: it takes nothing, and no answer."""
        if worker in self._links:
            self._links.pop(worker).close()
        self._asks.pop(worker, None)
        if self._running is not None:
            self._running.waiting.discard(worker)
            self._running.asks.pop(worker, None)

    def retire(self, worker: int) -> None:
        """Tell a web worker that another process serves in its place. It still takes what reloads bring."""
        self._send({worker}, Replaced())

    def request(self) -> None:
        """Reload as soon as possible. Callable from a signal handler."""
        self._requested = True
        self._wake()

    def turn(self) -> None:
        """Handle what has come, and begin or end a reload."""
        while not self._received.empty():
            self._handle(self._received.get())
        while self._end_if_taken() and (self._requested or self._asks):
            self._begin()

    def _receive(self) -> None:
        while data := self._inbox.recv(MESSAGE_BYTES):
            self._received.put(decode_from_worker(data))
            self._wake()

    def _handle(self, message: FromWorker) -> None:
        match message:
            case ReloadAsked(worker=worker, ask=ask):
                self._asks[worker] = ask
            case StateTaken(worker=worker, reload=number):
                if self._running is not None and self._running.number == number:
                    self._running.waiting.discard(worker)

    def _begin(self) -> None:
        asks, self._asks, self._requested = self._asks, {}, False
        try:
            outcome, state = self._read()
        except Exception:  # no mistake in a file may end the service
            log.exception("reload_crashed")
            outcome, state = ReloadOutcome(problems=["the settings could not be read; the log says why"]), None
        self._number += 1
        if outcome.problems:
            log.error("reload_refused", problems=outcome.problems)
        else:
            log.info("reloaded", changed=outcome.changed, needs_restart=outcome.needs_restart)
        waiting = set() if state is None else set(self._links)
        deadline = time.monotonic() + TAKEN_WITHIN_S
        self._running = _Running(self._number, outcome, asks, waiting, deadline)
        if state is not None:
            self._send(set(waiting), StateForWorker(reload=self._number, state=state))

    def _end_if_taken(self) -> bool:
        """Answer the reload if all web workers have taken it, or did not in time; False if it is still under way."""
        running = self._running
        if running is None:
            return True
        is_over = self._is_over() or not running.outcome.changed
        if time.monotonic() < running.deadline and (running.waiting or not is_over):
            return False
        if running.waiting:
            log.warning("reload_not_taken", workers=sorted(worker + 1 for worker in running.waiting))
        self._running = None
        for worker, ask in running.asks.items():
            self._send({worker}, ReloadAnswer(ask=ask, outcome=running.outcome))
        return True

    def _send(self, workers: set[int], message: ToWorker) -> None:
        with open(os.memfd_create("reload"), "r+b", buffering=0) as file:  # noqa: PTH123 -- a descriptor
            file.write(encode(message))
            for worker in workers & self._links.keys():
                try:
                    socket.send_fds(self._links[worker], [b"."], [file.fileno()])
                except OSError as error:  # it is dying, or has read nothing for minutes and is about to be killed
                    log.warning("web_worker_not_told", worker=worker + 1, reason=str(error))
                    self.unlink(worker)
