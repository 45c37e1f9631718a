"""The conversation of web process and GPU worker about themselves: handshake, pings and snapshots.

WorkerSession knows whether the GPU worker is there, and what it was last like. It must not know requests and calls.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Any, Final

import structlog

from server.engine.outage import RETRY_AFTER_S, OutageFile, unavailable_error
from server.engine.web_process import WebProcess
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import VERSION, CacheName, Failed, Hello, Message, Pong, Snapshot, Welcome

log = structlog.get_logger(__name__)

PING_INTERVAL_S: Final = 0.2
STALE_AFTER_S: Final = 5.0
"""The service is not ready after so long without a Pong. Requests are still sent: a pause is not a death."""

_PAUSED_AFTER_S: Final = 1.0
"""A tick that comes so late means that this process was paused."""

_FRESH_WITHIN_S: Final = STALE_AFTER_S
"""How long a snapshot may take. The worker answers between two steps: with two streams of a 0.6B on two busy cores a
step took up to half a second, and the answer to a ping that is already out may be too old."""

_HELLO_INTERVAL_S: Final = 1.0


class WorkerSession:
    """The session with the GPU worker at `url`, used on one event loop.

    `send` sends a message now, and returns False if there is no room. `timeout_s`, `clock`, `token` and `web` are those
    of ZmqEngineClient. `on_silence` gets the reason when the GPU worker counts as lost because it does not answer.
    `on_new_worker` is called when another GPU worker than before has answered a Hello.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout_s: float,
        clock: Callable[[], float],
        web: WebProcess,
        send: Callable[[Message], bool],
        on_silence: Callable[[str], None],
        on_new_worker: Callable[[], None],
    ) -> None:
        self._token = token
        self._timeout_s = timeout_s
        self._clock = clock
        self._web = web
        self._send = send
        self._on_silence = on_silence
        self._on_new_worker = on_new_worker
        self._outage_file = OutageFile(url)
        self._welcome: Welcome | None = None
        """The last one, which outlives its worker; `connected` tells whether that worker is still there."""

        self.connected = False
        self.settings: dict[str, Any] = {}
        """The settings of the GPU worker, as of its last message that had them."""

        self._refusal: str | None = None
        self._hello_at: float | None = None
        self.snapshot: Snapshot | None = None
        self._snapshot_asked_at = -math.inf
        self._heard_at = 0.0
        self._pinged_at = 0.0
        self._ping_out = False
        self._ticked_at = clock()
        self._news = asyncio.Event()
        """Set, and replaced, by the next snapshot and by the loss of the worker."""

        self._loss: asyncio.Future[ApiError] | None = None
        """Set at the loss of the worker; None if nothing waits for that."""

    # --- figures -----------------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> list[ModelSpec]:
        """The models of the GPU worker, as of the last Welcome."""
        self._web.count_catalog(hit=self._welcome is not None)
        return [] if self._welcome is None else self._welcome.catalog

    @property
    def snapshot_age_s(self) -> float:
        """Seconds since the latest snapshot was asked for."""
        return self._clock() - self._snapshot_asked_at

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        """A snapshot that was asked for at most `max_age_s` before this call. Raises ApiError."""
        self.require_worker()
        oldest = self._clock() - max_age_s
        try:
            async with asyncio.timeout(_FRESH_WITHIN_S):
                # The Pong to a ping that is already out may be older than `oldest`.
                while self.snapshot is None or self._snapshot_asked_at < oldest:
                    self._ping()
                    await self._news.wait()
                    self.require_worker()
                return self.snapshot
        except TimeoutError:
            raise unavailable_error("The GPU worker does not answer.") from None

    # --- availability ------------------------------------------------------------------------------------------------

    def outage(self, patience_s: float) -> ApiError | None:
        """The error if there is no GPU worker, or if it has been silent for more than `patience_s`."""
        if self._refusal is not None:
            return unavailable_error(self._refusal)
        if not self.connected:
            outage = self._outage_file.read()
            if outage is None:
                return unavailable_error("The GPU worker is not there; it is starting, or it has died.")
            return unavailable_error(outage.reason, outage.retry_after_s())
        silent_s = self._clock() - self._heard_at
        if silent_s > patience_s:
            left_s = max(0.0, self._timeout_s - silent_s)
            reason = f"The GPU worker has not answered for {silent_s:.0f} s"
            return unavailable_error(f"{reason}; it is replaced after {self._timeout_s:.0f} s.", left_s + RETRY_AFTER_S)
        return None

    def require_worker(self) -> None:
        """Raise the outage if the GPU worker counts as lost."""
        error = self.outage(self._timeout_s)
        if error is not None:
            raise error

    async def wait_connected(self, timeout_s: float) -> None:
        """Wait for the GPU worker's Welcome, but no longer than `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.connected:
                    await self._news.wait()

    async def loss(self) -> ApiError:
        """Wait until the GPU worker is lost."""
        if self._loss is None:
            self._loss = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._loss)

    def note_loss(self, message: str) -> None:
        """Wake those that wait for the loss of the GPU worker, or for its next snapshot."""
        if self._loss is not None:
            self._loss.set_result(unavailable_error(message))
            self._loss = None
        self._tell_waiters()

    def disconnect(self) -> None:
        """The GPU worker is gone, or has forgotten this process: the next tick says Hello."""
        self.connected = False
        self._refusal = None
        self._hello_at = None
        self._ping_out = False

    # --- messages ----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Say Hello or ping. Call it every PING_INTERVAL_S."""
        now = self._clock()
        # After a pause of this process, the worker's messages may still lie unread in the socket.
        paused, self._ticked_at = now - self._ticked_at > _PAUSED_AFTER_S, now
        if not self.connected:
            # The handshake may have come before the monitor ran, and a Hello may have found no room.
            if self._hello_at is None or now - self._hello_at > _HELLO_INTERVAL_S:
                self.hello()
            return
        if paused:
            self._heard_at = now
        elif now - self._heard_at > self._timeout_s:
            self._on_silence(f"The GPU worker has not answered for {self._timeout_s:.0f} s.")
        self._ping()

    def hello(self) -> None:
        """Say Hello; the Welcome has the catalogue."""
        if self._send(Hello(version=VERSION, token=self._token)):
            self._hello_at = self._clock()

    def on_pong(self, pong: Pong) -> None:
        """Take the snapshot of a Pong, unless an earlier GPU worker sent it."""
        if self.connected and self._welcome and pong.boot_id == self._welcome.boot_id:
            self._ping_out = False
            self._record_snapshot(pong.snapshot, self._pinged_at)

    def on_welcome(self, welcome: Welcome) -> None:
        """The GPU worker takes this process, if both speak one version of the protocol."""
        if self._hello_at is None:
            return  # it answers a Hello of a connection that is gone
        if welcome.version != VERSION:
            self._refusal = f"The GPU worker speaks version {welcome.version} of the protocol, this server {VERSION}."
            log.error("worker_version_differs", worker_version=welcome.version, server_version=VERSION)
            return
        if not self.connected or self._welcome is None or self._welcome.boot_id != welcome.boot_id:
            log.info("worker_connected", pid=welcome.snapshot.pid, boot_id=welcome.boot_id)
            self._on_new_worker()
        self._refusal = None
        self.connected = True
        self._welcome, self.settings = welcome, welcome.settings
        self._record_snapshot(welcome.snapshot, self._hello_at)

    def on_refused(self, failed: Failed) -> None:
        """The GPU worker does not take this process."""
        self._refusal = f"The GPU worker refuses this server: {failed.message}"
        log.error("worker_refused_hello", code=failed.code, reason=failed.message)

    def _ping(self) -> None:
        if not self._ping_out:
            self._pinged_at = self._clock()
            ping = self._web.ping()
            self._ping_out = self._send(ping)
            if not self._ping_out:
                self._web.take_back(ping)

    def _record_snapshot(self, snapshot: Snapshot, asked_at: float) -> None:
        """`asked_at` is when the Ping or Hello was sent that `snapshot` answers."""
        before = self.snapshot
        self.snapshot = snapshot
        if before is not None and before.boot_id == snapshot.boot_id:
            self._empty_caches([name for name, times in snapshot.emptied.items() if times != before.emptied.get(name)])
        self._snapshot_asked_at = asked_at
        self._heard_at = self._clock()
        self._tell_waiters()

    def _empty_caches(self, names: list[CacheName]) -> None:
        for name in names:
            if name == "catalog":
                self.hello()  # the Welcome has it
            else:
                self._web.on_emptied(name)

    def _tell_waiters(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
