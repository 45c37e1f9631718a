"""The sockets' options, and the claim of an address."""

import os
import stat
from pathlib import Path

import pytest
import zmq

from shared.sockets import (
    MAX_MESSAGE_BYTES,
    AddressError,
    AlreadyRunningError,
    bind_router,
    claim,
    connect_dealer,
    ipc_path,
)


class TestAddress:
    """Which URLs are addresses."""

    def test_path(self) -> None:
        """An ipc URL has the path of a file."""
        assert ipc_path("ipc:///run/tts/worker.ipc") == Path("/run/tts/worker.ipc")

    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            ("tcp://127.0.0.1:5555", "ipc"),
            ("/run/worker.ipc", "ipc"),
            ("ipc://@abstract", "ipc"),
            ("ipc://relative/worker.ipc", "absolute"),
            ("ipc://", "absolute"),
            ("ipc:///" + "x" * 107, "107 bytes"),
            ("ipc:///" + "ü" * 54, "107 bytes"),
        ],
    )
    def test_no_address(self, url: str, problem: str) -> None:
        """Refused: another transport, a socket that any user can reach, a path that no socket can have."""
        with pytest.raises(AddressError, match=problem):
            ipc_path(url)

    def test_longest(self) -> None:
        """The longest path that the kernel accepts is accepted."""
        assert len(os.fsencode(ipc_path("ipc:///" + "x" * 106))) == 107


class TestClaim:
    """One worker has an address."""

    def test_private_directory(self, tmp_path: Path) -> None:
        """The directory is created, with its parents, for this user alone."""
        with claim(f"ipc://{tmp_path}/a/b/worker.ipc"):
            assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700

    def test_second(self, tmp_path: Path) -> None:
        """A second claim fails; after the first ended, the address is free."""
        url = f"ipc://{tmp_path}/run/worker.ipc"
        with claim(url), pytest.raises(AlreadyRunningError, match="already serving"):
            claim(url)
        claim(url).close()

    def test_other_address_beside_it(self, tmp_path: Path) -> None:
        """Two addresses in one directory are independent."""
        with claim(f"ipc://{tmp_path}/run/a.ipc"), claim(f"ipc://{tmp_path}/run/b.ipc"):
            pass

    @pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
    def test_open_directory(self, tmp_path: Path, mode: int) -> None:
        """A directory that other users can enter is refused and not changed."""
        directory = tmp_path / "run"
        directory.mkdir()
        directory.chmod(mode)
        with pytest.raises(AddressError, match="mode 0700"):
            claim(f"ipc://{directory}/worker.ipc")
        assert stat.S_IMODE(directory.stat().st_mode) == mode

    def test_another_users_directory(self) -> None:
        """A directory of another user, here /tmp, is refused."""
        with pytest.raises(AddressError):
            claim("ipc:///tmp/worker.ipc")

    def test_no_directory(self, tmp_path: Path) -> None:
        """If the directory cannot be created, the message has the reason."""
        (tmp_path / "file").write_text("")
        with pytest.raises(AddressError, match=r"Not a directory|File exists"):
            claim(f"ipc://{tmp_path}/file/worker.ipc")


class TestSockets:
    """The options that the protocol relies on."""

    def test_both_ends(self, tmp_path: Path) -> None:
        """The two sockets connect, and have the limits of this module."""
        url = f"ipc://{tmp_path}/worker.ipc"
        with zmq.Context() as context, bind_router(context, url) as router, connect_dealer(context, url) as dealer:
            dealer.setsockopt(zmq.SNDTIMEO, 5_000)
            dealer.send(b"hello")
            assert router.poll(5_000)
            peer, frame = router.recv_multipart()
            assert frame == b"hello"
            router.send_multipart([peer, b"welcome"])
            assert dealer.poll(5_000)
            for socket in (router, dealer):
                assert socket.getsockopt(zmq.MAXMSGSIZE) == MAX_MESSAGE_BYTES
                assert socket.getsockopt(zmq.LINGER) == 0
                assert socket.getsockopt(zmq.HEARTBEAT_IVL) == 0

    def test_unknown_peer(self, tmp_path: Path) -> None:
        """A message to a web worker that is not connected is an error, not a silent loss."""
        with zmq.Context() as context, bind_router(context, f"ipc://{tmp_path}/worker.ipc") as router:
            with pytest.raises(zmq.ZMQError) as caught:
                router.send_multipart([b"nobody", b"x"], zmq.NOBLOCK)
            assert caught.value.errno == zmq.EHOSTUNREACH

    def test_no_worker(self, tmp_path: Path) -> None:
        """Without a worker, a web worker's message fails at once and is not queued."""
        url = f"ipc://{tmp_path}/worker.ipc"
        with zmq.Context() as context, connect_dealer(context, url) as dealer, pytest.raises(zmq.Again):
            dealer.send(b"hello", zmq.NOBLOCK)

    def test_bind_fails(self, tmp_path: Path) -> None:
        """A failed bind leaves no socket that would block the end of the context."""
        with zmq.Context() as context, pytest.raises(AddressError, match="No such file"):
            bind_router(context, f"ipc://{tmp_path}/nowhere/worker.ipc")
