"""The connection of a request is found by its client's address, and tells when its last byte came."""

import math
import socket

from server.http.connections import connection_of, seconds_since_received
from tests.system.service import eventually


def test_when_the_last_byte_came() -> None:
    """Any byte counts, also one that is no message yet."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as client:
            scope = {"client": client.getsockname()}
            with listener.accept()[0]:
                eventually(lambda: seconds_since_received(scope) > 0.2, 10, "silence")
                client.sendall(b"x")
                eventually(lambda: seconds_since_received(scope) < 0.2, 10, "a byte")
                found = connection_of(scope)
                assert found is not None
                found.close()
            assert connection_of(scope) is None
        assert math.isinf(seconds_since_received(scope))
