"""A crowd of connections that ask for nothing, in a process: `python -m tests.system.crowd KIND PORT NUMBER`.

KIND is idle (one GET /health, then nothing), silent (nothing at all), or body (a body that drips a byte a second).
What the server closes is opened again, at most a hundred a second, as somebody with bad intent would.
The process ends with its standard input.
"""

import itertools
import resource
import select
import socket
import sys
from typing import Final

FIRST: Final = {
    "idle": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "silent": b"",
    "body": b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{",
}
REOPENED_AT_ONCE: Final = 100
OPENED_BY_ADDRESS: Final = 10_000
"""Connections from one address of the loopback: there are only 28,000 ports."""


class Crowd:
    """The connections of this process."""

    def __init__(self, kind: str, port: int) -> None:
        self._first = FIRST[kind]
        self._drips = kind == "body"
        self._port = port
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._addresses = itertools.count()

    def open(self, number: int) -> None:
        """Open connections until there are `number` more."""
        for _ in range(number):
            source = f"127.0.1.{1 + next(self._addresses) // OPENED_BY_ADDRESS % 200}"
            try:
                one = socket.create_connection(("127.0.0.1", self._port), timeout=30, source_address=(source, 0))
                one.sendall(self._first)
            except OSError:
                continue
            one.setblocking(False)
            self._sockets[one.fileno()] = one
            self._poll.register(one, select.EPOLLIN | select.EPOLLHUP)

    def tend(self) -> int:
        """Send what drips, and read what has come; the number of connections that the server has closed."""
        closed = set()
        if self._drips:
            for fd, one in self._sockets.items():
                try:
                    one.send(b" ")
                except OSError:
                    closed.add(fd)
        for fd, _ in self._poll.poll(0):
            try:
                if not self._sockets[fd].recv(65_536):
                    closed.add(fd)
            except OSError:
                closed.add(fd)
        for fd in closed:
            self._poll.unregister(fd)
            self._sockets.pop(fd).close()
        return len(closed)


def main() -> None:
    """Hold the crowd until standard input ends."""
    kind, port, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    crowd = Crowd(kind, port)
    crowd.open(number)
    missing = 0
    while not select.select([sys.stdin], [], [], 1)[0]:
        missing += crowd.tend()
        again = min(missing, REOPENED_AT_ONCE)
        crowd.open(again)
        missing -= again


if __name__ == "__main__":
    main()
