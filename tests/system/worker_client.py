"""A web worker's end of the conversation with a GPU worker, and no more: it grants no credit unless told to."""

from typing import Final, Self

import zmq

from shared.protocol import VERSION, Hello, Message, Welcome, decode_from_worker, encode
from shared.sockets import connect_dealer

SILENCE_S: Final = 20.0
"""A test fails if the worker sends nothing for so long."""


class WorkerClient:
    """Connected to the worker at `url` inside its `with` block."""

    def __init__(self, url: str, token: str = "") -> None:
        self._token = token
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = connect_dealer(self._context, url)

    def __enter__(self) -> Self:
        """Send Hello as soon as the worker listens, and wait for its Welcome."""
        assert self._dealer.poll(30_000, zmq.POLLOUT), "no worker"
        self.send(Hello(version=VERSION, token=self._token))
        assert isinstance(self.receive(), Welcome)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self._dealer.close()
        self._context.term()

    def send(self, message: Message) -> None:
        """Send one message."""
        self._dealer.send_multipart(encode(message))

    def receive(self) -> Message:
        """Wait for the next message."""
        assert self.wait_for_message(SILENCE_S), f"the worker sent nothing for {SILENCE_S} s"
        message: Message = decode_from_worker(self._dealer.recv_multipart())[0]
        return message

    def wait_for_message(self, timeout_s: float) -> bool:
        """True if a message arrives within that time; `receive` then returns it."""
        return bool(self._dealer.poll(timeout_s * 1000))
