"""The transport thread: it owns the ROUTER socket and turns frames into commands, and messages into frames.

It checks version and token, and notices when a web worker is gone (leases, EHOSTUNREACH).
It does not interpret requests. The synthesis loop and this thread share two queues and a wake-up byte, nothing else.
"""

import contextlib
import hmac
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
import structlog
import zmq

from shared.protocol import (
    VERSION,
    Failed,
    FromWeb,
    Hello,
    Message,
    Probe,
    ProtocolError,
    decode_from_web,
    encode,
)
from shared.sockets import AddressError, bind_router

LEASE_S: Final = 30.0
"""A web worker that sends nothing for this long is gone; it pings several times a second.

One that died is noticed by the next message to it, a Probe at the latest. The lease covers one that is stopped,
and pauses of 10 s are normal: a suspended machine, a debugger, a full disk.
"""

PROBE_AFTER_S: Final = 2.0
"""A web worker that sends nothing for this long gets a Probe a second: if it has died, its requests must end."""

_PROBE_INTERVAL_S: Final = 1.0

_POLL_MS: Final = 1_000

_PAUSED_AFTER_S: Final = 5.0
"""The leases are checked every second at least: a check that comes so late means that this process was paused."""

_LINGER_S: Final = 0.5
"""How long the socket stays open after the last message: a DEALER that is disconnected drops unread messages."""

log = structlog.get_logger(__name__)


class Incoming(msgspec.Struct, frozen=True):
    """A message of a web worker; `peer` is its ZeroMQ identity."""

    peer: bytes
    message: FromWeb
    payload: bytes | None


class PeerGone(msgspec.Struct, frozen=True):
    """A web worker is gone; all its requests and calls end."""

    peer: bytes


class TransportFailed(msgspec.Struct, frozen=True):
    """The transport thread has ended by a fault: the process can no longer be reached."""

    reason: str


TransportEvent = Incoming | PeerGone | TransportFailed
"""The transport delivers these to the synthesis loop."""


class Transport:
    """Runs the ROUTER of `url` on its own thread, from `start` to `stop`. The caller has claimed the address.

    `deliver` is called on that thread for every event. `clock` gives monotonic seconds, for the leases.
    """

    def __init__(
        self,
        url: str,
        token: str,
        deliver: Callable[[TransportEvent], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._token = token.encode()
        self._deliver = deliver
        self._clock = clock
        self._outbox: deque[tuple[bytes, list[bytes]]] = deque()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._last_heard: dict[bytes, float] = {}
        self._checked_at = self._probed_at = clock()
        self._stopping = threading.Event()
        self._bound = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="transport", daemon=True)

    def start(self) -> None:
        """Bind the socket and start the thread; zmq.ZMQError if the address cannot be bound."""
        self._thread.start()
        self._bound.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Send all queued messages, then end the thread."""
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
        # A full buffer already holds unread wake-ups, and one is enough.
        with contextlib.suppress(BlockingIOError):
            self._wake_writer.send(b"\0")

    def _run(self) -> None:
        context = zmq.Context()
        try:
            router = bind_router(context, self._url)
        except AddressError as error:
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
            self._outbox.extend((peer, encode(Probe())) for peer in self._last_heard)
            self._send_all(router)  # forgets those that have gone: a service stops its web workers first
            if self._last_heard:
                time.sleep(_LINGER_S)
        except Exception as error:
            log.exception("transport_failed")
            self._deliver(TransportFailed(f"{type(error).__name__}: {error}"))
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
                log.warning("message_refused", reason=str(error))
                if error.unanswered:
                    problem = f"The GPU worker cannot read this request; it is {error}."
                    self._fail(peer, Failed(id=error.unanswered, code="internal_error", message=problem))
                continue
            if isinstance(message, Hello):
                if not self._accepts(peer, message):
                    continue
            elif peer not in self._last_heard:
                self._refuse(peer, "hello_expected", "the lease has ended: say Hello again")
                continue
            self._last_heard[peer] = self._clock()
            self._deliver(Incoming(peer, message, payload))

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
        """Answer a message of a web worker without a valid Hello."""
        log.warning("web_worker_refused", code=code, reason=message)
        self._fail(peer, Failed(id="", code=code, message=message))

    def _fail(self, peer: bytes, failed: Failed) -> None:
        self._outbox.append((peer, encode(failed)))
        self._wake()

    def _end_leases(self) -> None:
        now = self._clock()
        # After a pause of this process, the pings of the web workers may still lie unread in the socket.
        paused, self._checked_at = now - self._checked_at > _PAUSED_AFTER_S, now
        if paused:
            self._last_heard = dict.fromkeys(self._last_heard, now)
        if now - self._probed_at >= _PROBE_INTERVAL_S:
            self._probed_at = now
            silent = [peer for peer, heard in self._last_heard.items() if now - heard > PROBE_AFTER_S]
            self._outbox.extend((peer, encode(Probe())) for peer in silent)
        for peer, heard in list(self._last_heard.items()):
            if now - heard > LEASE_S:
                self._forget(peer, "silent")

    def _forget(self, peer: bytes, reason: str) -> None:
        if self._last_heard.pop(peer, None) is not None:
            log.info("web_worker_gone", reason=reason)
            self._deliver(PeerGone(peer))
