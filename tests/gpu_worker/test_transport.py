"""The transport thread over a real socket: Hello, leases, and the messages that it delivers."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import msgspec
import pytest
import zmq

from gpu_worker import transport
from gpu_worker.transport import LEASE_S, Incoming, PeerGone, Transport, TransportEvent, TransportFailed
from shared.protocol import (
    VERSION,
    Audio,
    Cancel,
    Failed,
    Finished,
    Hello,
    Message,
    Ping,
    Probe,
    Segment,
    Speak,
    Timings,
    Usage,
    decode_from_worker,
    encode,
)
from shared.sockets import AddressError, connect_dealer
from tests.gpu_worker.fakes import FakeClock
from tests.system.service import eventually

TOKEN = "open sesame"  # noqa: S105 -- not a secret
WAIT_MS = 5_000


class _Web:
    """A web worker's end of the socket."""

    def __init__(self, context: "zmq.Context[Any]", url: str) -> None:
        self._dealer = connect_dealer(context, url)
        self._dealer.setsockopt(zmq.SNDTIMEO, WAIT_MS)

    def send(self, message: Message, payload: bytes | None = None) -> Self:
        self._dealer.send_multipart(encode(message, payload))
        return self

    def send_frames(self, *frames: bytes) -> None:
        self._dealer.send_multipart(frames)

    def hello(self, *, version: int = VERSION, token: str = TOKEN) -> Self:
        return self.send(Hello(version=version, token=token))

    def receive(self) -> tuple[Any, bytes | None]:
        assert self._dealer.poll(WAIT_MS), "no message came"
        return decode_from_worker(self._dealer.recv_multipart())

    def leave(self) -> None:
        self._dealer.close()


class _Server:
    """A Transport, the events it delivered, and the web workers connected to it."""

    def __init__(self, path: Path, deliver: Callable[[TransportEvent], None] | None = None) -> None:
        self.url = f"ipc://{path}/worker.ipc"
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.clock = FakeClock()
        self.transport = Transport(self.url, TOKEN, deliver or self.inbox.put, self.clock)
        self._context: zmq.Context[Any] = zmq.Context()
        self._webs: list[_Web] = []

    def web(self) -> _Web:
        web = _Web(self._context, self.url)
        self._webs.append(web)
        return web

    def next(self) -> Any:
        return self.inbox.get(timeout=WAIT_MS / 1000)

    def tick(self, web: _Web) -> None:
        """Let a second pass in which `web` pings, until the transport has looked at the leases."""
        self.clock.advance(1)
        web.send(Ping())
        eventually(lambda: self.transport._checked_at >= self.clock(), WAIT_MS / 1000, "a look at the leases")

    def close(self) -> None:
        for web in self._webs:
            web.leave()
        self._context.term()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    """A running transport that ends at once: the tests of its end have one of their own."""
    monkeypatch.setattr(transport, "_LINGER_S", 0.0)
    server = _Server(tmp_path)
    server.transport.start()
    yield server
    server.transport.stop()
    server.close()


class TestHello:
    """Version and token."""

    def test_delivered(self, server: _Server) -> None:
        """After the Hello every message is delivered in order, with its payload and its sender."""
        speak = Speak(id="r", client="c", model="m", task="Base", segments=[Segment(text="Grüße 😀")], credit=3)
        server.web().hello().send(speak, b"\1\2").send(Ping())
        hello, spoken, ping = server.next(), server.next(), server.next()
        assert hello == Incoming(hello.peer, Hello(version=VERSION, token=TOKEN), None)
        assert spoken == Incoming(hello.peer, speak, b"\1\2")
        assert ping == Incoming(hello.peer, Ping(), None)

    def test_two_web_workers(self, server: _Server) -> None:
        """Each web worker has its own identity and receives its own messages."""
        one, two = server.web().hello(), server.web()
        first = server.next().peer
        two.hello()
        second = server.next().peer
        assert first != second
        server.transport.send(second, Audio(id="r", seq=0), b"two")
        server.transport.send(first, Audio(id="r", seq=0), b"one")
        assert one.receive() == (Audio(id="r", seq=0), b"one")
        assert two.receive() == (Audio(id="r", seq=0), b"two")

    @pytest.mark.parametrize(
        ("hello", "code"),
        [
            ({"version": VERSION + 1}, "version_mismatch"),
            ({"token": ""}, "wrong_token"),
            ({"token": TOKEN + " "}, "wrong_token"),
            ({"token": "ünïcode"}, "wrong_token"),
        ],
    )
    def test_refused(self, server: _Server, hello: dict[str, Any], code: str) -> None:
        """A refused Hello is answered with the reason, but not with the token; later messages are not delivered."""
        web = server.web().hello(**hello)
        failed, _ = web.receive()
        assert (failed.id, failed.code) == ("", code)
        assert TOKEN not in failed.message
        web.send(Ping())
        assert web.receive()[0].code == "hello_expected"
        assert server.inbox.empty()

    def test_second_try(self, server: _Server) -> None:
        """A correct Hello after a refused one is accepted."""
        web = server.web().hello(token="wrong")  # noqa: S106 -- not a secret
        web.receive()
        web.hello()
        assert server.next().message == Hello(version=VERSION, token=TOKEN)

    def test_hello_expected(self, server: _Server) -> None:
        """A message before the Hello is refused."""
        failed, _ = server.web().send(Ping()).receive()
        assert (failed.id, failed.code) == ("", "hello_expected")
        assert server.inbox.empty()


class TestLeases:
    """Web workers that are silent or unreachable."""

    def test_silence_ends_the_lease(self, server: _Server) -> None:
        """A web worker without a message for LEASE_S is gone and has to send Hello again; the others stay."""
        silent, active = server.web().hello(), server.web().hello()
        peers = {server.next().peer, server.next().peer}
        # In steps that do not look like a pause of the transport itself.
        for _ in range(int(LEASE_S)):
            server.tick(active)
            assert server.next().message == Ping()
        server.tick(active)
        events = {type(event): event.peer for event in (server.next(), server.next())}
        assert events.keys() == {Incoming, PeerGone}
        assert set(events.values()) == peers
        silent.send(Cancel(id="r"))
        while isinstance(message := silent.receive()[0], Probe):
            pass
        assert isinstance(message, Failed)
        assert message.code == "hello_expected"
        silent.hello()
        assert server.next().peer == events[PeerGone]

    def test_a_dead_one_without_a_message(self, server: _Server) -> None:
        """A web worker that died is gone long before its lease ends, though no request of it has anything to say."""
        web, other = server.web().hello(), server.web().hello()
        peers = {server.next().peer, server.next().peer}
        web.leave()
        gone: set[bytes] = set()
        for _ in range(int(LEASE_S / 2)):
            server.tick(other)
            time.sleep(0.05)  # ZeroMQ notices the closed socket in a thread of its own
            while not server.inbox.empty():
                if isinstance(event := server.next(), PeerGone):
                    gone.add(event.peer)
            if gone:
                break
        assert len(gone) == 1
        assert gone < peers

    def test_a_pause_of_this_process_ends_no_lease(self, server: _Server) -> None:
        """After a pause, the web workers get a whole lease: their pings may still lie in the socket."""
        web = server.web().hello()
        server.next()
        server.clock.advance(10 * LEASE_S)
        server.web().hello()
        server.next()
        web.send(Ping())
        assert server.next().message == Ping()

    def test_unreachable(self, server: _Server) -> None:
        """A web worker with a closed socket is gone, reported once; the others still receive."""
        web, other = server.web().hello(), server.web()
        peer = server.next().peer
        other.hello()
        stays = server.next().peer
        web.leave()
        for seq in range(100_000):  # until the kernel reports that the other end is closed
            server.transport.send(peer, Audio(id="r", seq=seq), b"\0" * 8)
            if not server.inbox.empty():
                break
        assert server.next() == PeerGone(peer)
        server.transport.send(peer, Audio(id="r", seq=0), b"\0")
        server.transport.send(stays, Audio(id="s", seq=0), b"\1")
        assert other.receive() == (Audio(id="s", seq=0), b"\1")
        assert server.inbox.empty()

    def test_never_known(self, server: _Server) -> None:
        """A message for an unknown identity is dropped."""
        server.transport.send(b"unknown", Audio(id="r", seq=0), b"\0")
        server.web().hello()
        assert isinstance(server.next().message, Hello)


class TestGarbage:
    """Frames that are not messages."""

    FRAMES: ClassVar = [
        [b""],
        [b"\xff\xff\xff"],
        [b"{}"],
        [b"a", b"b", b"c"],
        [b"a"] * 50,
        [msgspec.msgpack.encode({"type": "Nonsense"})],
        [msgspec.msgpack.encode({"type": "Cancel"})],
        [msgspec.msgpack.encode({"type": "Cancel", "id": 7})],
        [encode(Audio(id="r", seq=0))[0]],
        [b"\x82\xa4type\xa4Ping\xa1x" + b"\x91" * 50_000 + b"\xc0"],
        [b"\x82\xa4type\xa6Cancel\xa2id\xa1\xff"],
    ]

    def test_ignored(self, server: _Server) -> None:
        """They are ignored, before and after Hello; the next message is delivered."""
        web = server.web()
        for frames in self.FRAMES:
            web.send_frames(*frames)
        web.hello()
        assert isinstance(server.next().message, Hello)
        for frames in self.FRAMES:
            web.send_frames(*frames)
            web.send(Ping())
            assert server.next().message == Ping()
        assert server.inbox.empty()

    @pytest.mark.parametrize(
        "message",
        [
            {"type": "Speak", "id": "r", "credit": "many"},
            {"type": "Speak", "id": "r", "sampling": {"top_k": -1}},
            {"type": "Call", "id": "r", "action": {"type": "Nonsense"}},
        ],
    )
    def test_a_request_that_cannot_be_read_fails(self, server: _Server, message: dict[str, Any]) -> None:
        """The web worker gets an error for it at once: no other answer would ever come."""
        web = server.web().hello()
        server.next()
        web.send_frames(msgspec.msgpack.encode(message))
        failed, _ = web.receive()
        assert isinstance(failed, Failed)
        assert (failed.id, failed.code) == ("r", "internal_error")
        assert "cannot read this request" in failed.message
        web.send(Ping())
        assert server.next().message == Ping()


class TestEnd:
    """Stop and failure."""

    def test_last_messages_arrive(self, tmp_path: Path) -> None:
        """Messages queued before the stop reach a web worker that reads."""
        server = _Server(tmp_path)
        server.transport.start()
        web = server.web().hello()
        peer = server.next().peer
        received: list[Any] = []

        def read() -> None:
            while not received or not isinstance(received[-1], Finished):
                received.append(web.receive()[0])

        reader = threading.Thread(target=read)
        reader.start()
        for seq in range(200):
            server.transport.send(peer, Audio(id="r", seq=seq), b"\0" * 19_200)
        timings = Timings(queue_s=0, load_s=0, first_audio_s=0, total_s=0)
        usage = Usage(input_tokens=1, output_tokens=1)
        server.transport.send(peer, Finished(id="r", reason="stop", usage=usage, timings=timings))
        server.transport.stop()
        reader.join()
        assert [message.seq for message in received[:-1]] == list(range(200))
        server.close()

    def test_nothing_waits_for_who_has_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The socket stays open for a web worker that may have to read, not for one that has ended."""
        pauses: list[float] = []
        monkeypatch.setattr(transport, "time", SimpleNamespace(sleep=pauses.append))  # other threads may sleep
        for leaves in (False, True):
            server = _Server(tmp_path)
            server.transport.start()
            web = server.web().hello()
            server.next()
            if leaves:
                web.leave()
                server.web().hello(version=VERSION + 1).receive()  # the socket has seen the end that came before this
            server.transport.stop()
            server.close()
        assert pauses == [transport._LINGER_S]

    def test_bind_fails(self, tmp_path: Path) -> None:
        """An address that cannot be bound is an error of `start`."""
        server = _Server(tmp_path / "nowhere")
        with pytest.raises(AddressError, match="no socket can be made there"):
            server.transport.start()
        server.transport.stop()
        server.close()

    def test_failure_is_delivered(self, tmp_path: Path) -> None:
        """If the thread fails, the synthesis loop gets TransportFailed instead of waiting for ever."""
        failures: queue.SimpleQueue[TransportFailed] = queue.SimpleQueue()

        def deliver(event: TransportEvent) -> None:
            if not isinstance(event, TransportFailed):
                raise MemoryError("no room for another command")  # noqa: TRY004 -- not about the type
            failures.put(event)

        server = _Server(tmp_path, deliver)
        server.transport.start()
        server.web().hello()
        assert failures.get(timeout=5) == TransportFailed("MemoryError: no room for another command")
        server.transport.stop()
        server.close()

    @pytest.mark.slow
    def test_many_wake_ups(self, server: _Server) -> None:
        """More messages than the wake-up pipe can hold bytes arrive in order."""
        web = server.web().hello()
        peer = server.next().peer
        for seq in range(20_000):
            server.transport.send(peer, Audio(id="r", seq=seq))
        assert [web.receive()[0].seq for _ in range(20_000)] == list(range(20_000))
