"""The addresses of TTS_HOST, and the hold on the port that keeps a second service out."""

import os
import socket
import threading
from contextlib import ExitStack, suppress

import pytest
from granian.server.common import SocketSpec

from server.processes import HostError, PortError, PortTakenError, addresses_of, hold_port, listening
from tests.ports import free_port

ANY = "0.0.0.0"  # noqa: S104 -- only its port is taken


def has_ipv6() -> bool:
    """True if this machine has the loopback of IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


with_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")


class TestHost:
    """The addresses that TTS_HOST means."""

    @pytest.mark.parametrize("host", ["127.0.0.1", ANY])
    def test_an_address_means_itself(self, host: str) -> None:
        """An address is taken as it is."""
        assert addresses_of(host) == [host]

    @with_ipv6
    def test_names_mean_both_families(self) -> None:
        """The name localhost is both loopbacks; * is one socket that takes IPv4 and IPv6."""
        assert addresses_of("localhost") == addresses_of("LocalHost") == ["127.0.0.1", "::1"]
        assert addresses_of("*") == ["::"]
        assert addresses_of("::1") == ["::1"]

    def test_without_ipv6(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a machine without IPv6 the names mean IPv4 alone."""
        real = listening._socket_for

        def only_ipv4(address: str) -> socket.socket:
            if ":" in address:
                raise OSError("Address family not supported by protocol")
            return real(address)

        monkeypatch.setattr(listening, "_socket_for", only_ipv4)
        assert addresses_of("localhost") == ["127.0.0.1"]
        assert addresses_of("*") == [ANY]

    @pytest.mark.parametrize("host", ["127.0.0.1:8000", "[::1]", "no.such.host.invalid", "a..b", "x" * 70])
    def test_a_name_without_an_address(self, host: str) -> None:
        """A name that cannot be resolved is one sentence that repeats it."""
        with pytest.raises(HostError, match="no IP address, and as a name it cannot be resolved") as caught:
            addresses_of(host)
        assert repr(host) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_an_address_of_another_machine(self) -> None:
        """An address that this machine lacks is refused."""
        with pytest.raises(HostError, match="no address of this machine"):
            addresses_of("203.0.113.7")


class TestPort:
    """The hold on the port."""

    @pytest.fixture(autouse=True)
    def _without_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listening, "_OWNER_WAIT_S", 0.0)

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (["127.0.0.1"], ["127.0.0.1"]),
            (["127.0.0.1"], [ANY]),
            ([ANY], ["127.0.0.1"]),
            pytest.param(["::"], ["127.0.0.1"], marks=with_ipv6),
            pytest.param(["127.0.0.1"], ["::"], marks=with_ipv6),
            pytest.param(["::1"], ["127.0.0.1", "::1"], marks=with_ipv6),
        ],
    )
    def test_a_port_has_one_holder(self, first: list[str], second: list[str]) -> None:
        """A held port is refused to every address that overlaps, and is free again once it is let go."""
        port = free_port()
        with hold_port(first, port), pytest.raises(PortTakenError, match=f"port {port} is in use"):
            hold_port(second, port)
        hold_port(second, port).close()

    def test_of_two_at_once_one_wins(self) -> None:
        """Of many that want the port in the same moment, exactly one gets it."""
        for _ in range(20):
            port = free_port()
            start = threading.Barrier(4)
            won: list[ExitStack] = []

            def try_it(port: int = port, start: threading.Barrier = start, won: list[ExitStack] = won) -> None:
                start.wait()
                with suppress(PortTakenError):
                    won.append(hold_port(["127.0.0.1"], port))

            threads = [threading.Thread(target=try_it) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            won[0].close()

    def test_web_workers_share_a_held_port(self) -> None:
        """Granian's sockets may listen beside the holder, which takes no connection; also after connections closed."""
        port = free_port()
        for _ in range(2):
            with hold_port(["127.0.0.1"], port):
                listeners = [
                    socket.socket(fileno=SocketSpec("127.0.0.1", port, 128).build().get_fd()) for _ in range(2)
                ]
                for listener in listeners:
                    listener.listen()
                    listener.setblocking(False)
                clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
                accepted = []
                for listener in listeners:
                    while True:
                        try:
                            accepted.append(listener.accept()[0])
                        except BlockingIOError:
                            break
                assert len(accepted) == len(clients)
                for closing in (*accepted, *clients, *listeners):  # the server closes first
                    closing.close()

    def test_the_owner_is_named(self) -> None:
        """The refusal has the number of the process that listens, and its command."""
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            with pytest.raises(PortTakenError, match=rf"in use by process {os.getpid()} \(.*python"):
                hold_port(["127.0.0.1"], other.getsockname()[1])

    def test_another_error_of_the_system(self) -> None:
        """An address that cannot be bound is one sentence, and no port stays taken."""
        port = free_port()
        with pytest.raises(PortError, match=f"203.0.113.7 port {port} cannot be listened on"):
            hold_port(["127.0.0.1", "203.0.113.7"], port)
        hold_port(["127.0.0.1"], port).close()
