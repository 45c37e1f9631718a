"""The connection reaper: which connections it closes, on real sockets that this process has accepted."""

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from server.app import create_app
from server.http.open_requests import OpenRequest, OpenRequests
from server.processes.connection_reaper import ConnectionReaper
from server.processes.forked_web_worker import reaper_of
from shared.settings import Settings
from tests.ports import free_port
from tests.server.running import listening, responds, until

pytestmark = pytest.mark.asyncio

LIMIT = 8
"""Six connections may stay: a quarter of the places is kept free."""


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A listening socket, the connections to it, and a reaper that watches them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.requests = OpenRequests(self.clock)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.sockets: list[socket.socket] = [self.listener]
        self.accepted: list[socket.socket] = []
        self.reaper = self.watch()

    def watch(self, **options: Any) -> ConnectionReaper:
        """A reaper of these connections."""
        defaults: dict[str, Any] = {
            "port": self.listener.getsockname()[1],
            "limit": LIMIT,
            "address_limit": lambda: 100,
            "is_exempt": lambda _address: False,
            "read_timeout_s": lambda: 300.0,
            "is_stopping": lambda: False,
        }
        self.reaper = ConnectionReaper(self.requests, **{**defaults, **options})
        return self.reaper

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A new connection: the client's end, which never waits, and the accepted one."""
        client = socket.create_connection(self.listener.getsockname())
        accepted, _ = self.listener.accept()
        client.setblocking(False)
        accepted.setblocking(False)
        self.sockets += [client, accepted]
        self.accepted.append(accepted)
        return client, accepted

    def request(self, client: socket.socket, *, body: bool = False) -> OpenRequest:
        """A request that has arrived on the connection."""
        return self.requests.begin({"client": client.getsockname()}, has_body=body)

    async def after(self, seconds: float) -> None:
        """Sweep once, and once more after so long."""
        await self.reaper.sweep()
        self.clock.now += seconds
        await self.reaper.sweep()


def closed(client: socket.socket) -> bool:
    """True if the other end has closed the connection."""
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


def shut(accepted: socket.socket) -> bool:
    """True if this process may send no more on the connection."""
    try:
        accepted.send(b"x")
    except BrokenPipeError:
        return True
    except BlockingIOError:
        pass
    return False


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench whose kernel times are those of its clock: no byte was ever sent but what a test sends."""
    monkeypatch.setattr("server.processes.connection_reaper.seconds_since", lambda _milliseconds: float("inf"))
    bench = Bench()
    yield bench
    for each in bench.sockets:
        each.close()


async def test_an_idle_connection_is_closed(bench: Bench) -> None:
    """A connection without a request is closed after a minute, which begins at the end of its last request."""
    (idle, _), (busy, _) = bench.connect(), bench.connect()
    request = bench.request(busy)
    await bench.after(59)
    assert not closed(idle)
    await bench.after(2)
    assert closed(idle)
    await bench.after(1_000)
    assert not closed(busy)
    bench.requests.end(request)
    await bench.after(59)
    assert not closed(busy)
    await bench.after(2)
    assert closed(busy)


async def test_an_idle_connection_does_not_hold_up_the_end(bench: Bench, tmp_path: Path) -> None:
    """A stop of the service closes it after a second. One with a request stays open."""
    application = create_app(Settings(worker_url=f"ipc://{tmp_path}/none"))
    application.open_requests = bench.requests
    bench.reaper = reaper_of(bench.listener.getsockname()[1], LIMIT, application)
    (idle, _), (busy, _) = bench.connect(), bench.connect()
    bench.request(busy)
    await bench.after(2)
    assert not closed(idle)
    application.refuses_requests = True
    await bench.after(0)
    assert closed(idle)
    assert not closed(busy)


async def test_other_sockets_are_left_alone(bench: Bench) -> None:
    """Connections that this process has opened, and its listening socket, are none of the reaper's business."""
    client, accepted = bench.connect()
    bench.watch(port=client.getsockname()[1])
    elsewhere, other = socket.socketpair()
    elsewhere.setblocking(False)
    bench.sockets += [elsewhere, other]
    await bench.after(1_000)
    assert not closed(elsewhere)
    bench.watch()
    new, _ = bench.connect()
    assert not closed(new)
    assert accepted.fileno() > 0


async def test_the_longest_idle_make_room(bench: Bench) -> None:
    """Above three quarters of the places the longest idle are closed, none that has just come."""
    first = [bench.connect()[0] for _ in range(3)]
    await bench.reaper.sweep()
    bench.clock.now += 5
    then = [bench.connect()[0] for _ in range(5)]
    await bench.after(0.1)
    assert [closed(client) for client in first + then] == [True] * 2 + [False] * 6
    more = [bench.connect()[0] for _ in range(6)]
    await bench.after(0.1)
    assert [closed(client) for client in first[2:] + then] == [True] + [False] * 5
    await bench.after(1)
    assert [closed(client) for client in then + more] == [True] * 5 + [False] * 6


@pytest.mark.parametrize("used", [True, False])
async def test_a_request_on_its_way_keeps_its_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, used: bool
) -> None:
    """A connection that has sent bytes has five seconds, so that granian can pass its request on.

    They are seconds in which the event loop runs: on a busy machine it may stand still meanwhile.
    """
    monkeypatch.setattr("server.processes.connection_reaper.seconds_since", lambda _milliseconds: 1.5)
    clients = [bench.connect()[0] for _ in range(LIMIT)]
    if used:
        for client in clients:
            bench.requests.end(bench.request(client))
        await bench.reaper.sweep()
        bench.clock.now += 2
    for client in clients:
        client.send(b"G")
    for _ in range(9):
        await bench.after(60 if used else 0.5)
    assert not any(shut(accepted) for accepted in bench.accepted)
    await bench.after(0.5)
    await bench.after(0.5)
    assert sum(shut(accepted) for accepted in bench.accepted) == 2


async def test_dripping_bodies_go_first(bench: Bench) -> None:
    """A dripping body goes before an idle connection, and that before an upload."""
    uploading, idle, dripping = ([bench.connect()[0] for _ in range(number)] for number in (2, 4, 2))
    for client in uploading:
        bench.request(client, body=True).body_bytes = 1_000_000
    for client in dripping:
        bench.request(client, body=True)
    await bench.after(10)
    assert [closed(client) for client in uploading + idle + dripping] == [False] * 6 + [True] * 2
    more = [bench.connect()[0] for _ in range(4)]
    await bench.after(10)
    assert [closed(client) for client in uploading + idle + more] == [False] * 2 + [True] * 4 + [False] * 4


async def test_who_never_asked_counts_as_longer_idle(bench: Bench) -> None:
    """A connection that has never asked for anything goes before one that is idle for less than five times as long."""

    def asked(number: int) -> list[socket.socket]:
        clients = [bench.connect()[0] for _ in range(number)]
        for client in clients:
            bench.requests.end(bench.request(client))
        return clients

    old = asked(1)
    await bench.after(10)
    silent = [bench.connect()[0]]
    used = asked(5)
    await bench.after(2)
    assert [closed(client) for client in old + silent + used] == [True, *[False] * 6]
    used += asked(1)
    await bench.after(2)
    assert [closed(client) for client in silent + used] == [True, *[False] * 6]


async def test_a_request_is_never_closed_for_room(bench: Bench) -> None:
    """If all places are taken by requests that wait for this server, none is closed."""
    clients = [bench.connect()[0] for _ in range(LIMIT)]
    for client in clients:
        bench.request(client)
    await bench.after(1_000)
    assert not any(closed(client) for client in clients)


async def test_the_slowest_bodies_make_room(bench: Bench) -> None:
    """If requests take the places, those go whose bodies arrive slowest, and no whole one."""
    clients = [bench.connect()[0] for _ in range(LIMIT)]
    requests = [bench.request(client, body=True) for client in clients]
    for number, request in enumerate(requests):
        request.body_bytes = 10_000 * number
    requests[0].body_complete = True
    await bench.after(3)
    assert [closed(client) for client in clients] == [False, True, True, *[False] * 5]


@pytest.mark.parametrize("kind", ["silent", "idle", "body"])
async def test_an_upload_outlives_a_crowd(bench: Bench, kind: str) -> None:
    """An upload of some speed stays, also while none of the connections that crowd in is old enough to be closed."""
    uploading, _ = bench.connect()
    bench.request(uploading, body=True).body_bytes = 1_000_000
    bench.clock.now += 10
    crowd = [bench.connect()[0] for _ in range(LIMIT)]
    for client in crowd:
        request = bench.request(client, body=kind == "body") if kind != "silent" else None
        if request and kind == "idle":
            bench.requests.end(request)
    await bench.after(0.9)
    assert not any(closed(client) for client in (uploading, *crowd))
    await bench.after(2)
    assert [closed(client) for client in (uploading, *crowd)] == [False, *[True] * 3, *[False] * 5]


async def test_streams_with_unfinished_bodies_take_places(bench: Bench) -> None:
    """Many streams of one HTTP/2 connection that send nothing more count like as many connections."""
    (greedy, _), (modest, _) = bench.connect(), bench.connect()
    for _ in range(LIMIT):
        bench.request(greedy, body=True)
    bench.request(modest)
    await bench.after(3)
    assert (closed(greedy), closed(modest)) == (True, False)


@pytest.mark.parametrize("handler_returned", [True, False])
async def test_a_reader_may_be_slow(bench: Bench, *, handler_returned: bool) -> None:
    """A client that takes a part of its response now and then is not idle; one that takes nothing goes for room."""
    much = bytes(10_000_000)
    clients = [bench.connect() for _ in range(LIMIT)]
    for client, accepted in clients:
        if not handler_returned:
            bench.request(client)
        accepted.send(much)
    slow, accepted = clients[0]
    for _ in range(8):
        await bench.after(4)
        with contextlib.suppress(BlockingIOError):
            while slow.recv(1_000_000):
                pass
        with contextlib.suppress(BlockingIOError):
            accepted.send(much)
    ended = [shut(accepted) for _, accepted in clients]
    assert (ended[0], sum(ended)) == (False, 2)


async def test_an_address_has_a_limit(bench: Bench) -> None:
    """An address keeps so many connections, unless it is a proxy; its longest idle ones are closed."""
    bench.watch(address_limit=lambda: 2, limit=100)
    clients = [bench.connect()[0] for _ in range(4)]
    bench.request(clients[0])
    await bench.after(2)
    assert [closed(client) for client in clients] == [False, True, True, False]
    bench.watch(address_limit=lambda: 2, limit=100, is_exempt=lambda address: address == "127.0.0.1")
    more = [bench.connect()[0] for _ in range(4)]
    await bench.after(2)
    assert not any(closed(client) for client in more)


async def test_a_network_of_ipv6_has_the_limit_of_an_address(bench: Bench) -> None:
    """One machine has all addresses of a /64, so they count as one; a proxy among them does not count."""
    proxy = "2001:db8::2"
    bench.watch(address_limit=lambda: 2, limit=100, is_exempt=lambda address: address == proxy)
    clients = [bench.connect()[0] for _ in range(6)]
    await bench.reaper.sweep()
    hosts = ("2001:db8::1", proxy, "2001:db8::3", "2001:db8::4", "2001:db8:0:1::1", "2001:db8:0:1::2")
    for connection, host in zip(sorted(bench.reaper._connections.values(), key=lambda one: one.fd), hosts, strict=True):
        connection.peer = (host, connection.peer[1])
    await bench.after(2)
    assert [closed(client) for client in clients] == [True, False, False, False, False, False]


# --- with granian ----------------------------------------------------------------------------------------------------

PLACES = 16
FASTER = 5
"""The reaper's time runs so much faster than the clock, so that the tests need not wait."""


@pytest.fixture
async def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a granian with few places, each request of which is a connection of its own."""
    monkeypatch.setattr("server.processes.connection_reaper.seconds_since", lambda ms: ms / 1000 * FASTER)
    app, port = create_app(Settings(worker_url=f"ipc://{tmp_path}/none")), free_port()
    app.open_requests = OpenRequests(lambda: time.monotonic() * FASTER)
    reaper = ConnectionReaper(
        app.open_requests,
        port=port,
        limit=PLACES,
        address_limit=lambda: 1000,
        is_exempt=lambda _: True,
        read_timeout_s=lambda: 300.0,
        is_stopping=lambda: False,
    )
    app.app.on_startup.append(reaper.start)
    limits = httpx.Limits(max_keepalive_connections=0)
    async with (
        listening(app, port, backpressure=PLACES) as url,
        httpx.AsyncClient(base_url=url, timeout=20, limits=limits) as client,
    ):
        yield client


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n{",
        b"PRI * HTTP",
        b"GET /docs/static/redoc.standalone.js HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["silent", "idle", "unfinished body", "unfinished preface", "unread response"],
)
async def test_a_crowd_shuts_nobody_out(crowded: httpx.AsyncClient, first: bytes) -> None:
    """Among more connections than there are places, a new one is answered."""
    with contextlib.ExitStack() as stack:
        for _ in range(PLACES + PLACES // 2):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", crowded.base_url.port))
            one.setblocking(True)
            one.sendall(first)
        await until(lambda: responds(crowded, "/health"))


@pytest.mark.slow
async def test_an_idle_websocket_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own limits end it: for the reaper it is a request in progress, also where places are short."""
    monkeypatch.setattr("server.processes.connection_reaper.seconds_since", lambda _ms: 1_000.0)
    app, port, clock = create_app(Settings(worker_url=f"ipc://{tmp_path}/none")), free_port(), Clock()
    app.open_requests.clock = clock
    url = f"ws://127.0.0.1:{port}/v1/audio/speech/stream"
    async with listening(app, port), websockets.connect(url, proxy=None) as one:
        options: dict[str, Any] = {"is_exempt": lambda _address: False, "read_timeout_s": lambda: 300.0}
        options["is_stopping"] = lambda: False
        reaper = ConnectionReaper(app.open_requests, port=port, limit=1, address_limit=lambda: 1, **options)
        for _ in range(20):
            await reaper.sweep()
            clock.now += 1_000
        await (await one.ping())
