"""The drain of open sockets: quiet ones close at once, others when they have spoken, and the rest in the end."""

import asyncio

import pytest

from server.http.open_sockets import OpenSockets


class Socket:
    """A socket that closes when it is quiet, or when it is cut off."""

    def __init__(self, sockets: OpenSockets, *, quiet: bool = False, deaf: bool = False) -> None:
        self.sockets = sockets
        self.quiet = quiet
        self.deaf = deaf
        self.is_cut_off = False
        sockets.add(self)

    def drain(self) -> None:
        """Close if nothing is being said."""
        if self.quiet:
            self.sockets.discard(self)

    def cut_off(self) -> None:
        """Close."""
        self.is_cut_off = True
        if not self.deaf:
            self.sockets.discard(self)


async def test_quiet_sockets_close_at_once() -> None:
    """Then the drain is over; without sockets it takes no time."""
    sockets = OpenSockets()
    await sockets.drain(0)
    Socket(sockets, quiet=True)
    await sockets.drain(1000)
    assert sockets.count == 0
    Socket(sockets, quiet=True)
    assert sockets.count == 0


async def test_a_speaking_socket_is_waited_for() -> None:
    """It ends by itself, and is not cut off."""
    sockets = OpenSockets()
    speaking = Socket(sockets)
    draining = asyncio.create_task(sockets.drain(1000))
    await asyncio.sleep(0)
    assert sockets.draining
    assert not draining.done()
    sockets.discard(speaking)
    await draining
    assert not speaking.is_cut_off


@pytest.mark.slow
async def test_the_rest_is_cut_off() -> None:
    """After the timeout; even a socket that does not close then holds up nothing for long."""
    sockets = OpenSockets()
    rest = [Socket(sockets), Socket(sockets, deaf=True)]
    await sockets.drain(0.01)
    assert [socket.is_cut_off for socket in rest] == [True, True]
    assert sockets.count == 1
