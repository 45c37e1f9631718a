"""The connection reaper: closes connections that hold a place and ask for nothing, in this web worker.

Granian accepts as many connections as it has places for, and then none: what fills the places silences the service.
Measured with granian 2.8.7:

- An idle connection costs 23 kB in HTTP/1.1, so 4,096 places cost 94 MB. Places for every connection that an attacker
  can open would cost more memory than speech does.
- Granian closes an HTTP/1.1 connection whose next request is not complete within `header_read_timeout`.
  It never closes one that sends nothing, one that drips the 24 bytes of HTTP/2's preface, or an idle one of HTTP/2:
  when granian stops, it waits for that one to answer, and a client that reads nothing between two requests does not.
- At the limit of file descriptors it spins: a core is busy, and nothing is accepted.

Granian has no hook for its connections, so the reaper reads them from /proc/self/fd.
It closes a connection with shutdown() on a duplicate of the descriptor, after it has compared the inode:
granian closes descriptors in other threads, and the kernel gives their numbers to the next connection.
A sweep of 4,096 connections takes about 20 ms, and lets the event loop run in between.
"""

import asyncio
import contextlib
import errno
import math
import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import structlog

from server.http.forwarded import client_network
from server.http.open_requests import MIN_BODY_BYTES_PER_S, OpenRequests, Peer, peer_of

SWEEP_PAUSE_S: Final = 0.25
"""The pause between two sweeps."""

HURRIED_PAUSE_S: Final = 0.05
"""The pause while places are short: a flood of new connections waits for the next sweep."""

_CONNECTIONS_PER_S: Final = 20_000
_CONNECTIONS_PER_S_IN_A_HURRY: Final = 80_000
"""Sweeps look at no more connections a second: that takes some 10 % of a core, and 40 %."""

_LONGEST_STEP_S: Final = 0.5
"""The most that a sweep adds to the time since the last one, where a request may be on its way.

On a machine that is too busy, granian and the event loop lag behind by seconds.
"""

IDLE_TIMEOUT_S: Final = 60.0
"""A connection without a request is closed after so long. HTTP/1.1 has granian's shorter limit."""

KEPT_FREE: Final = 0.25
"""The share of the places that is kept for new connections: above it, connections are closed before their time."""

MIN_IDLE_S: Final = 1.0
"""Not even then is a connection closed sooner: its request may be on its way.

With 0.25 s, a busy client lost one connection in five of those that it opened at once: it had not sent its request yet.
This bounds how many new idle connections a second one web worker survives: one for each place.
Beyond, they wait in the backlog; when that is full, clients repeat their handshakes after 1, 3, 7 and 15 s.
"""

SILENT_WEIGHT: Final = 5
"""A connection that has never asked for anything counts as idle for so much longer.

If all of these went first, a crowd that always makes room short would leave none of them a second.
"""

MIN_ASKING_S: Final = 5.0
"""Nor a connection whose last bytes came within this time and have no answer: they may be a request.

The time is that of `ConnectionReaper.clock`.
"""

MIN_BODY_S: Final = 2.0
"""Nor a connection whose request is younger, if its body is not complete."""

MIN_STALLED_S: Final = 5.0
"""Nor a connection whose client has taken a part of its response within this time."""

_LOG_PAUSE_S: Final = 10.0
_FDS_AT_ONCE: Final = 256

_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""The kernel finds a client that is gone without a word within two minutes, where nothing is being sent."""

_TCP_INFO: Final = struct.Struct("=24xI16xI4xI64xQQ8xI")
"""Of the kernel's tcp_info (include/uapi/linux/tcp.h).

tcpi_unacked, tcpi_last_data_sent and tcpi_last_data_recv (ms), tcpi_bytes_acked, tcpi_bytes_received,
tcpi_notsent_bytes.
"""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Rule:
    """The conditions under which a connection may be closed."""

    idle_s: float
    """With nothing to be sent: no request and no byte sent for so long."""
    stalled_s: float
    """With something to be sent: the client has taken nothing for so long."""
    only_idle: bool = True
    """Only a connection without a request."""


_IDLE: Final = _Rule(MIN_IDLE_S, MIN_STALLED_S)
_SLOW_BODY: Final = _Rule(0.0, 0.0, only_idle=False)
_STALLED: Final = _Rule(math.inf, MIN_STALLED_S, only_idle=False)


@dataclass(slots=True, eq=False)
class Connection:
    """One accepted connection."""

    inode: int
    """The identity of the socket; the kernel reuses `fd` at once, and inodes after four billion."""
    fd: int
    peer: Peer
    idle_since: float
    """The time at which its last request ended, or at which it was first seen."""
    has_asked: bool = False
    """True if there has been a request on it."""
    asking_since: float | None = None
    """The time at which bytes without an answer were first seen."""
    acked: int = -1
    """The bytes that the client had taken at the last look; -1 if nothing was left to be sent."""
    acked_since: float = 0.0


class ConnectionReaper:
    """Watches the connections that this process has accepted on `port`.

    `limit` is the number of places, `address_limit()` that of one client address unless `is_exempt` of it is true.
    `read_timeout_s()` is how long a client may read nothing of a response that its handler has finished.
    `is_stopping()`: the service stops, and an idle connection would hold that up.
    """

    def __init__(
        self,
        requests: OpenRequests,
        *,
        port: int,
        limit: int,
        address_limit: Callable[[], int],
        is_exempt: Callable[[str], bool],
        read_timeout_s: Callable[[], float],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._requests = requests
        self._port = port
        self._high_water = max(1, int(limit * (1 - KEPT_FREE)))
        self._address_limit = address_limit
        self._is_exempt = is_exempt
        self._read_timeout_s = read_timeout_s
        self._is_stopping = is_stopping
        self._connections: dict[int, Connection] = {}
        self._short = False
        self._shut: set[int] = set()
        """The inodes of connections that the reaper has shut down, and granian has not closed yet."""
        self.clock = 0.0
        """Seconds of the event loop's time: it stands still where the event loop does."""
        self.sweeps = 0
        """How many sweeps have ended."""
        self._swept_at = requests.clock()
        self._closed: Counter[str] = Counter()
        self._logged_at = -_LOG_PAUSE_S
        self._task: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        """The connections that the last sweep has found."""
        return len(self._connections) + len(self._shut)

    async def start(self) -> None:
        """Sweep in a task of its own for as long as the event loop runs."""
        self._task = asyncio.create_task(self._run(), name="connection-reaper")

    async def _run(self) -> None:
        while True:
            try:
                await self.sweep()
            except Exception:  # without sweeps, idle connections could silence the service
                log.exception("connection_sweep_failed")
            if self._short:
                pause_s = max(HURRIED_PAUSE_S, len(self._connections) / _CONNECTIONS_PER_S_IN_A_HURRY)
            else:
                pause_s = max(SWEEP_PAUSE_S, len(self._connections) / _CONNECTIONS_PER_S)
            await asyncio.sleep(pause_s)

    async def sweep(self) -> None:
        """Look at all connections once, and close those that must go."""
        now = self._requests.clock()
        self.clock += min(now - self._swept_at, _LONGEST_STEP_S)
        self._swept_at = now
        await self._find()
        idle = self._idle()
        timeout_s = MIN_IDLE_S if self._is_stopping() else IDLE_TIMEOUT_S
        overdue = [one for one in idle if self._idle_s(one) >= timeout_s]
        await self._close("idle", overdue, len(overdue), _Rule(timeout_s, self._read_timeout_s()))
        await self._close_for_addresses(idle)
        await self._close_for_room(idle)
        self._log()
        self.sweeps += 1

    async def _find(self) -> None:
        """Bring the list of connections up to date."""
        ended = self._requests.take_ended()
        found: dict[int, Connection] = {}
        shut = set()
        names = os.listdir("/proc/self/fd")  # noqa: PTH208 - Path objects would triple the time of a sweep
        for number, name in enumerate(names, 1):
            if number % _FDS_AT_ONCE == 0:
                await asyncio.sleep(0)
            fd = int(name)
            with contextlib.suppress(OSError):  # closed meanwhile
                status = os.fstat(fd)
                if not stat.S_ISSOCK(status.st_mode):
                    continue
                if status.st_ino in self._shut:
                    shut.add(status.st_ino)
                    continue
                connection = self._connections.get(status.st_ino) or self._identify(fd, status.st_ino)
                if connection:
                    found[status.st_ino] = connection
                    self._note_requests(connection, ended)
        self._connections = found
        self._shut = shut

    def _note_requests(self, one: Connection, ended: dict[Peer, float]) -> None:
        if self._requests.of(one.peer):
            one.idle_since, one.has_asked, one.asking_since = self._requests.clock(), True, None
        elif one.peer in ended:
            one.idle_since, one.has_asked, one.asking_since = ended[one.peer], True, None

    def _identify(self, fd: int, inode: int) -> Connection | None:
        """The connection behind `fd`; None for a socket that granian has not accepted. OSError if it is closed."""
        with _duplicate(fd, inode) as own:
            if own.family not in {socket.AF_INET, socket.AF_INET6} or own.getsockname()[1] != self._port:
                return None
            peer = peer_of(own.getpeername())  # OSError for the listening socket
            own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                own.setsockopt(socket.IPPROTO_TCP, option, value)
            return Connection(inode, fd, peer, self._requests.clock())

    def _idle(self) -> list[Connection]:
        """The connections without a request, the longest idle first."""
        idle = [one for one in self._connections.values() if not self._requests.of(one.peer)]
        return sorted(idle, key=lambda one: one.idle_since)

    def _idle_s(self, one: Connection) -> float:
        # A request may have ended since the list was brought up to date.
        return self._requests.clock() - max(one.idle_since, self._requests.last_end(one.peer))

    async def _close_for_addresses(self, idle: list[Connection]) -> None:
        """Close the longest idle connections of addresses that have too many. An IPv6 address counts as its /64."""
        limit = self._address_limit()
        counts = Counter(one.peer[0] for one in self._connections.values())
        networks = Counter[str]()
        for address, count in counts.items():
            networks[client_network(address)] += count
        crowded = {network for network, count in networks.items() if count > limit}
        for network in crowded:
            exempt = {one for one in counts if client_network(one) == network and self._is_exempt(one)}
            too_many = networks[network] - limit - sum(counts[address] for address in exempt)
            own = [one for one in idle if client_network(one.peer[0]) == network and one.peer[0] not in exempt]
            await self._close("too_many_of_address", own, too_many, _IDLE)

    async def _close_for_room(self, idle: list[Connection]) -> None:
        """Keep a share of the places free.

        First go bodies that drip, then the longest idle, then slow bodies,
        at last stalled readers, first those that have taken least: a player that pauses has taken more.
        No upload and no reader goes while enough younger connections may soon turn out to be idle.
        """
        self._short = self._missing() > 0
        if not self._short:
            return
        drip, slow, young = self._slow_bodies()
        await self._close("dripping_body_for_room", drip, self._missing(), _SLOW_BODY)
        idle.sort(key=lambda one: self._idle_s(one) * (1 if one.has_asked else SILENT_WEIGHT), reverse=True)
        await self._close("idle_for_room", idle, self._missing(), _IDLE)
        if young + sum(one.inode in self._connections for one in idle) >= self._missing():
            return
        await self._close("slow_body_for_room", slow, self._missing(), _SLOW_BODY)
        waiting = [one for one in self._connections.values() if self._requests.of(one.peer)]
        waiting.sort(key=lambda one: one.acked)
        await self._close("stalled_for_room", waiting, self._missing(), _STALLED)

    def _missing(self) -> int:
        """How many places are taken that should be free; each further request of an HTTP/2 connection takes one."""
        further = sum(max(0, len(self._requests.of(one.peer)) - 1) for one in self._connections.values())
        return len(self._connections) + further - self._high_water

    def _slow_bodies(self) -> tuple[list[Connection], list[Connection], int]:
        """The connections that only send bodies: those too slow to be let finish, others, and the number of young ones.

        The slowest are the first.
        """
        now = self._requests.clock()
        speeds, young = [], 0
        for one in self._connections.values():
            requests = self._requests.of(one.peer)
            if not requests or any(request.body_complete for request in requests):
                continue
            age_s = now - min(request.began for request in requests)
            if age_s < MIN_BODY_S:
                young += 1
            else:
                speeds.append((sum(request.body_bytes for request in requests) / age_s / len(requests), one))
        speeds.sort(key=lambda pair: pair[0])
        drip = [one for speed, one in speeds if speed < MIN_BODY_BYTES_PER_S]
        return drip, [one for _, one in speeds[len(drip) :]], young

    async def _close(self, why: str, candidates: Iterable[Connection], places: int, rule: _Rule) -> None:
        """Close candidates that `rule` allows to close, until `places` are free."""
        for number, one in enumerate(candidates, 1):
            if places <= 0:
                return
            if number % _FDS_AT_ONCE == 0:
                await asyncio.sleep(0)
            requests = self._requests.of(one.peer)
            if one.inode not in self._connections or (requests and rule.only_idle):
                continue
            with contextlib.suppress(OSError), _duplicate(one.fd, one.inode) as own:  # OSError: closed meanwhile
                if not self._allows(rule, one, own):
                    continue
                own.shutdown(socket.SHUT_RDWR)
                self._shut.add(one.inode)
                self._closed[why] += 1
            places -= max(1, len(requests))
            del self._connections[one.inode]

    def _allows(self, rule: _Rule, one: Connection, own: socket.socket) -> bool:
        """True if the connection is idle, or its client takes nothing of its response, for as long as `rule` says."""
        now, idle_s = self._requests.clock(), self._idle_s(one)
        info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        unacked, sent_ms, received_ms, acked, received, unsent = _TCP_INFO.unpack(info)
        if unacked or unsent:
            if acked != one.acked:
                one.acked, one.acked_since = acked, now
            return bool(now - one.acked_since >= rule.stalled_s)
        one.acked = -1
        has_answer = one.has_asked and sent_ms <= received_ms and idle_s <= seconds_since(received_ms)
        if has_answer or not received:
            one.asking_since = None
        elif one.asking_since is None:
            one.asking_since = self.clock
        if rule.only_idle and one.asking_since is not None and self.clock - one.asking_since < MIN_ASKING_S:
            return False
        return min(idle_s, seconds_since(sent_ms)) >= rule.idle_s

    def _log(self) -> None:
        """One line for everything that was closed within some seconds, unless all of it was merely idle."""
        now = self._requests.clock()
        if now - self._logged_at < _LOG_PAUSE_S or not self._closed:
            return
        write = log.debug if set(self._closed) == {"idle"} else log.warning
        write("connections_closed", **self._closed, open=len(self._connections))
        self._closed.clear()
        self._logged_at = now


def seconds_since(milliseconds: int) -> float:
    """How long ago the last byte went by as the kernel counts it; tests have a clock of their own."""
    return milliseconds / 1000


@contextlib.contextmanager
def _duplicate(fd: int, inode: int) -> Iterator[socket.socket]:
    """The socket behind `fd` on a descriptor of its own; OSError if `fd` is another file by now."""
    number = os.dup(fd)
    try:
        own = socket.socket(fileno=number)
    except OSError:
        os.close(number)
        raise
    with own:
        if os.fstat(number).st_ino != inode:
            raise OSError(errno.ESTALE, "the descriptor was closed and its number given to another file")
        yield own
