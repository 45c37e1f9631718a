"""The transport thread: it owns the ROUTER socket and turns frames into commands, and messages into frames.

It knows who may speak (version and token), who is still there (leases, EHOSTUNREACH), and nothing of what is said.
The synthesis loop and this thread share two queues and a wake-up byte, nothing else.
"""

import contextlib
import hmac
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog
import zmq

from shared.protocol import (
    VERSION,
    Failed,
    FromWeb,
    Hello,
    Message,
    ProtocolError,
    decode_from_web,
    encode,
)
from shared.sockets import bind_router

LEASE_S: Final = 10.0
"""A web worker that said nothing for this long is gone; it pings several times a second."""

_POLL_MS: Final = 1_000

_LAST_WORDS_S: Final = 0.5
"""How long the socket stays open behind the last message: a DEALER drops what was not yet read when it disconnects."""

log = structlog.get_logger(__name__)


class Incoming(msgspec.Struct, frozen=True):
    """A web worker said something; `peer` is the socket's name for it."""

    peer: bytes
    message: FromWeb
    payload: bytes | None


class PeerGone(msgspec.Struct, frozen=True):
    """A web worker is gone, and with it everyone it asked for."""

    peer: bytes


class TransportFailed(msgspec.Struct, frozen=True):
    """The transport thread has ended by a fault: nobody can reach this process any more."""

    reason: str


class Transport:
    """Runs the ROUTER of `url` in a thread of its own, from `start` to `stop`. The caller has claimed the address.

    `clock` gives the monotonic seconds by which leases end.
    """

    def __init__(
        self,
        url: str,
        token: str,
        inbox: "queue.SimpleQueue[Any]",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._token = token.encode()
        self._inbox = inbox
        self._clock = clock
        self._outbox: deque[tuple[bytes, list[bytes]]] = deque()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._last_heard: dict[bytes, float] = {}
        self._stopping = threading.Event()
        self._bound = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="transport", daemon=True)

    def start(self) -> None:
        """Begin to answer; zmq.ZMQError where the address cannot be bound."""
        self._thread.start()
        self._bound.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Send what is waiting, then end the thread."""
        self._stopping.set()
        self._wake()
        self._thread.join()
        self._wake_reader.close()
        self._wake_writer.close()

    def send(self, peer: bytes, message: Message, payload: bytes | None = None) -> None:
        """Queue a message for a web worker. Never blocks; called from the synthesis thread."""
        self._outbox.append((peer, encode(message, payload)))
        self._wake()

    def _wake(self) -> None:
        # A full buffer holds wake-ups that were not read yet: one of them will do.
        with contextlib.suppress(BlockingIOError):
            self._wake_writer.send(b"\0")

    def _run(self) -> None:
        context = zmq.Context()
        try:
            router = bind_router(context, self._url)
        except zmq.ZMQError as error:
            self._failure = error
            self._bound.set()
            context.term()
            return
        self._bound.set()
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        try:
            while not (self._stopping.is_set() and not self._outbox):
                ready = dict(poller.poll(_POLL_MS))
                if self._wake_reader.fileno() in ready:
                    self._wake_reader.recv(4096)
                self._send_all(router)
                if router in ready:
                    self._receive_all(router)
                self._end_leases()
            if self._last_heard:
                time.sleep(_LAST_WORDS_S)
        except Exception as error:
            log.exception("the transport has failed")
            self._inbox.put(TransportFailed(f"{type(error).__name__}: {error}"))
        finally:
            router.close()
            context.term()

    def _send_all(self, router: "zmq.Socket[bytes]") -> None:
        while self._outbox:
            peer, frames = self._outbox.popleft()
            try:
                router.send_multipart([peer, *frames], zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._forget(peer, "unreachable")

    def _receive_all(self, router: "zmq.Socket[bytes]") -> None:
        while True:
            try:
                peer, *frames = router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message, payload = decode_from_web(frames)
            except ProtocolError as error:
                log.warning("message refused", reason=str(error))
                continue
            if isinstance(message, Hello):
                if not self._accepts(peer, message):
                    continue
            elif peer not in self._last_heard:
                self._refuse(peer, "hello_expected", "the lease has ended: say Hello again")
                continue
            self._last_heard[peer] = self._clock()
            self._inbox.put(Incoming(peer, message, payload))

    def _accepts(self, peer: bytes, hello: Hello) -> bool:
        if hello.version != VERSION:
            problem = f"the GPU worker speaks version {VERSION} of the protocol, the web worker {hello.version}"
            self._refuse(peer, "version_mismatch", problem)
        elif not hmac.compare_digest(hello.token.encode(), self._token):
            self._refuse(peer, "wrong_token", "TTS_WORKER_TOKEN differs between the two sides")
        else:
            return True
        return False

    def _refuse(self, peer: bytes, code: str, message: str) -> None:
        """Answer someone who may not speak, or not yet."""
        log.warning("web worker refused", code=code, reason=message)
        self._outbox.append((peer, encode(Failed(id="", code=code, message=message))))
        self._wake()

    def _end_leases(self) -> None:
        now = self._clock()
        for peer, heard in list(self._last_heard.items()):
            if now - heard > LEASE_S:
                self._forget(peer, "silent")

    def _forget(self, peer: bytes, why: str) -> None:
        if self._last_heard.pop(peer, None) is not None:
            log.info("web worker gone", reason=why)
            self._inbox.put(PeerGone(peer))
