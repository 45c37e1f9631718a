"""The transport thread over a real socket: who may speak, who is still there, and what is passed on."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import pytest
import zmq

from gpu_worker.transport import LEASE_S, Incoming, PeerGone, Transport, TransportFailed
from shared.protocol import (
    VERSION,
    Audio,
    Cancel,
    Finished,
    Hello,
    Message,
    Ping,
    Speak,
    Timings,
    Usage,
    decode_from_worker,
    encode,
)
from shared.sockets import connect_dealer
from tests.gpu_worker.fakes import FakeClock

TOKEN = "open sesame"  # noqa: S105 -- no secret of anybody's
WAIT_MS = 5_000


class _Web:
    """A web worker's end of the socket."""

    def __init__(self, context: "zmq.Context[Any]", url: str) -> None:
        self._dealer = connect_dealer(context, url)
        self._dealer.setsockopt(zmq.SNDTIMEO, WAIT_MS)

    def say(self, message: Message, payload: bytes | None = None) -> Self:
        self._dealer.send_multipart(encode(message, payload))
        return self

    def send(self, *frames: bytes) -> None:
        self._dealer.send_multipart(frames)

    def hello(self, *, version: int = VERSION, token: str = TOKEN) -> Self:
        return self.say(Hello(version=version, token=token))

    def hear(self) -> tuple[Any, bytes | None]:
        assert self._dealer.poll(WAIT_MS), "nothing came"
        return decode_from_worker(self._dealer.recv_multipart())

    def leave(self) -> None:
        self._dealer.close()


class _Server:
    """A Transport, what it passed on, and web workers that connect to it."""

    def __init__(self, path: Path, inbox: Any = None) -> None:
        self.url = f"ipc://{path}/worker.ipc"
        self.inbox: Any = queue.SimpleQueue() if inbox is None else inbox
        self.clock = FakeClock()
        self.transport = Transport(self.url, TOKEN, self.inbox, self.clock)
        self._context: zmq.Context[Any] = zmq.Context()
        self._webs: list[_Web] = []

    def web(self) -> _Web:
        web = _Web(self._context, self.url)
        self._webs.append(web)
        return web

    def next(self) -> Any:
        return self.inbox.get(timeout=WAIT_MS / 1000)

    def close(self) -> None:
        for web in self._webs:
            web.leave()
        self._context.term()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    """A running transport."""
    server = _Server(tmp_path)
    server.transport.start()
    yield server
    server.transport.stop()
    server.close()


class TestWhoMaySpeak:
    """Version and token."""

    def test_passed_on(self, server: _Server) -> None:
        """After the Hello everything is passed on in order, with its payload and the name of who said it."""
        speak = Speak(id="r", client="c", model="m", task="Base", text="Grüße 😀", credit=3)
        server.web().hello().say(speak, b"\1\2").say(Ping())
        hello, spoken, ping = server.next(), server.next(), server.next()
        assert hello == Incoming(hello.peer, Hello(version=VERSION, token=TOKEN), None)
        assert spoken == Incoming(hello.peer, speak, b"\1\2")
        assert ping == Incoming(hello.peer, Ping(), None)

    def test_two_web_workers(self, server: _Server) -> None:
        """Each has a name of its own, and gets what is meant for it."""
        one, two = server.web().hello(), server.web()
        first = server.next().peer
        two.hello()
        second = server.next().peer
        assert first != second
        server.transport.send(second, Audio(id="r", seq=0), b"two")
        server.transport.send(first, Audio(id="r", seq=0), b"one")
        assert one.hear() == (Audio(id="r", seq=0), b"one")
        assert two.hear() == (Audio(id="r", seq=0), b"two")

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
        """A stranger is told why, nothing it says is passed on, and the token is not told."""
        web = server.web().hello(**hello)
        failed, _ = web.hear()
        assert (failed.id, failed.code) == ("", code)
        assert TOKEN not in failed.message
        web.say(Ping())
        assert web.hear()[0].code == "hello_expected"
        assert server.inbox.empty()

    def test_second_try(self, server: _Server) -> None:
        """Who says it right the next time is let in."""
        web = server.web().hello(token="wrong")  # noqa: S106 -- no secret of anybody's
        web.hear()
        web.hello()
        assert server.next().message == Hello(version=VERSION, token=TOKEN)

    def test_hello_expected(self, server: _Server) -> None:
        """Who has not said Hello is asked to."""
        failed, _ = server.web().say(Ping()).hear()
        assert (failed.id, failed.code) == ("", "hello_expected")
        assert server.inbox.empty()


class TestWhoIsThere:
    """Leases, and peers that cannot be reached."""

    def test_silence_ends_the_lease(self, server: _Server) -> None:
        """Who says nothing for so long is gone; who speaks stays; and the silent one has to say Hello again."""
        silent, talker = server.web().hello(), server.web()
        gone = server.next().peer
        talker.hello()
        server.next()
        server.clock.advance(LEASE_S - 1)
        talker.say(Ping())
        assert server.next().message == Ping()
        server.clock.advance(2)
        talker.say(Ping())
        assert {type(event) for event in (server.next(), server.next())} == {Incoming, PeerGone}
        failed, _ = silent.say(Cancel(id="r")).hear()
        assert failed.code == "hello_expected"
        silent.hello()
        assert server.next().peer == gone

    def test_which_one_is_gone(self, server: _Server) -> None:
        """The name in PeerGone is that of the silent one."""
        server.web().hello()
        silent = server.next().peer
        server.clock.advance(LEASE_S + 1)
        server.web().hello()
        assert PeerGone(silent) in (server.next(), server.next())

    def test_unreachable(self, server: _Server) -> None:
        """Speech for a web worker whose socket is closed: it is gone, said once; the others are not disturbed."""
        web, other = server.web().hello(), server.web()
        peer = server.next().peer
        other.hello()
        stays = server.next().peer
        web.leave()
        for seq in range(100_000):  # until the kernel has told that the other end is closed
            server.transport.send(peer, Audio(id="r", seq=seq), b"\0" * 8)
            if not server.inbox.empty():
                break
        assert server.next() == PeerGone(peer)
        server.transport.send(peer, Audio(id="r", seq=0), b"\0")
        server.transport.send(stays, Audio(id="s", seq=0), b"\1")
        assert other.hear() == (Audio(id="s", seq=0), b"\1")
        assert server.inbox.empty()

    def test_never_known(self, server: _Server) -> None:
        """A message for somebody who was never there harms nobody."""
        server.transport.send(b"nobody", Audio(id="r", seq=0), b"\0")
        server.web().hello()
        assert isinstance(server.next().message, Hello)


class TestGarbage:
    """What is no message."""

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

    def test_passed_over(self, server: _Server) -> None:
        """It is passed over, before and after Hello; what comes behind it is heard."""
        web = server.web()
        for frames in self.FRAMES:
            web.send(*frames)
        web.hello()
        assert isinstance(server.next().message, Hello)
        for frames in self.FRAMES:
            web.send(*frames)
            web.say(Ping())
            assert server.next().message == Ping()
        assert server.inbox.empty()


class TestEnd:
    """Stopping, and what stops by itself."""

    def test_last_words_arrive(self, tmp_path: Path) -> None:
        """What was queued before the stop reaches a web worker that reads."""
        server = _Server(tmp_path)
        server.transport.start()
        web = server.web().hello()
        peer = server.next().peer
        heard: list[Any] = []

        def read() -> None:
            while not heard or not isinstance(heard[-1], Finished):
                heard.append(web.hear()[0])

        reader = threading.Thread(target=read)
        reader.start()
        for seq in range(200):
            server.transport.send(peer, Audio(id="r", seq=seq), b"\0" * 19_200)
        timings = Timings(queue_s=0, load_s=0, first_audio_s=0, total_s=0)
        usage = Usage(input_tokens=1, output_tokens=1)
        server.transport.send(peer, Finished(id="r", reason="stop", usage=usage, timings=timings))
        server.transport.stop()
        reader.join()
        assert [message.seq for message in heard[:-1]] == list(range(200))
        server.close()

    def test_bind_fails(self, tmp_path: Path) -> None:
        """An address that cannot be bound is told to who starts it."""
        server = _Server(tmp_path / "nowhere")
        with pytest.raises(zmq.ZMQError):
            server.transport.start()
        server.transport.stop()
        server.close()

    def test_fault_is_told(self, tmp_path: Path) -> None:
        """Where the thread cannot go on, the loop hears of it instead of waiting for ever."""
        server = _Server(tmp_path, inbox=_Full())
        server.transport.start()
        server.web().hello()
        assert server.inbox.failure.get(timeout=5) == TransportFailed("MemoryError: no room for another command")
        server.transport.stop()
        server.close()

    def test_many_wakes(self, server: _Server) -> None:
        """More messages than the wake-up pipe holds bytes all arrive, in order."""
        web = server.web().hello()
        peer = server.next().peer
        for seq in range(20_000):
            server.transport.send(peer, Audio(id="r", seq=seq))
        assert [web.hear()[0].seq for _ in range(20_000)] == list(range(20_000))


class _Full:
    """An inbox that takes nothing but the news of a failure."""

    def __init__(self) -> None:
        self.failure: queue.SimpleQueue[TransportFailed] = queue.SimpleQueue()

    def put(self, command: object) -> None:
        if isinstance(command, TransportFailed):
            self.failure.put(command)
        else:
            raise MemoryError("no room for another command")  # noqa: TRY004 -- no matter of types
