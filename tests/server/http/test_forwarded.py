"""Requests through a proxy: whose X-Forwarded-* headers count, and what they say."""

from typing import Any

import pytest

from server.http.forwarded import client_network, client_view, split_authority, strip_root_path
from server.http.open_requests import OpenRequests
from shared.protocol import Speak
from shared.settings import Settings
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, Serve

PROXY = "127.0.0.1"
CLIENT = "203.0.113.7"
NETWORK = Settings(trusted_proxies=["172.16.0.0/12", "::1"])


def view_of(settings: Settings, peer: str | None, **headers: str) -> Any:
    """The client's view of a request from `peer`."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return client_view(settings, {"type": "http", "headers": raw, "client": (peer, 1) if peer else None})


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address"),
    [
        (PROXY, CLIENT, CLIENT),
        (PROXY, f"198.51.100.1, {CLIENT}", CLIENT),  # the client has sent the first entry itself
        (PROXY, f"{CLIENT}, 127.0.0.1", CLIENT),  # two proxies
        (PROXY, "127.0.0.2, 127.0.0.1", "127.0.0.2"),
        (PROXY, f"{CLIENT}:4711", CLIENT),
        (PROXY, "[2001:db8::1]:4711", "2001:db8::1"),
        (PROXY, "2001:db8::1", "2001:db8::1"),
        (PROXY, f"{CLIENT}, unknown", PROXY),
        (PROXY, "fe80::1%eth0", "fe80::1%eth0"),
        (PROXY, "fe80::1%" + "x" * 300, PROXY),  # the GPU worker takes no client with such a long name
        (PROXY, "", PROXY),
        ("::1", CLIENT, CLIENT),
        ("::ffff:127.0.0.1", CLIENT, CLIENT),
        ("::ffff:198.51.100.9", CLIENT, "198.51.100.9"),
        ("198.51.100.9", CLIENT, "198.51.100.9"),
        (None, CLIENT, None),
    ],
)
def test_the_address_of_a_client(peer: str | None, forwarded_for: str, address: str | None) -> None:
    """The last entry that is no trusted proxy; without a trusted proxy, the address at the other end."""
    assert view_of(Settings(), peer, x_forwarded_for=forwarded_for).address == address


def test_only_configured_proxies_are_trusted() -> None:
    """A network may be configured; the loopback then counts no more."""
    assert view_of(NETWORK, "172.18.0.1", x_forwarded_for=CLIENT).address == CLIENT
    assert view_of(NETWORK, PROXY, x_forwarded_for=CLIENT).address == PROXY


@pytest.mark.parametrize(
    ("headers", "url"),
    [
        ({"host": "up:8000"}, None),
        ({"host": "up:8000", "x_forwarded_proto": "https"}, None),
        ({"host": "up:8000", "x_forwarded_host": "Tts.Example"}, None),
        ({"host": "up:8000", "x_forwarded_host": "Tts.Example", "x_forwarded_proto": "https"}, "https://tts.example"),
        (
            {"host": "up", "x_forwarded_host": "a:81", "x_forwarded_proto": "HTTP", "x_forwarded_prefix": "/tts/"},
            "http://a:81/tts",
        ),
        ({"host": "up", "x_forwarded_host": "a, b", "x_forwarded_proto": "https, http"}, "https://a"),
        ({"host": "up", "x_forwarded_host": "a/<b>", "x_forwarded_proto": "https"}, None),
        ({"host": "up", "x_forwarded_host": "a", "x_forwarded_proto": "javascript"}, None),
    ],
)
def test_the_url_of_a_client(headers: dict[str, str], url: str | None) -> None:
    """Known if a trusted proxy has sent both scheme and host; a value that is none is ignored."""
    assert view_of(Settings(), PROXY, **headers).url() == url
    assert view_of(NETWORK, PROXY, **headers).url() is None


@pytest.mark.parametrize(
    ("settings", "prefix", "shown"),
    [
        (Settings(), "/tts", "/tts"),
        (Settings(), "/a/b/", "/a/b"),
        (Settings(), "//evil.example", ""),
        (Settings(), "/a b", ""),
        (Settings(root_path="/own"), "/tts", "/own"),
        (Settings(root_path="/own", trusted_proxies=["192.0.2.1"]), "/tts", "/own"),
        (Settings(trusted_proxies=["192.0.2.1"]), "/tts", ""),
    ],
)
def test_the_prefix(settings: Settings, prefix: str, shown: str) -> None:
    """TTS_ROOT_PATH, else what a trusted proxy has sent."""
    assert view_of(settings, PROXY, x_forwarded_prefix=prefix).prefix == shown


@pytest.mark.parametrize(
    ("path", "stripped"),
    [("/tts/v1/models", "/v1/models"), ("/tts", "/"), ("/tts/", "/"), ("/ttsx/v1", "/ttsx/v1"), ("/v1", "/v1")],
)
def test_the_root_path_may_be_left_in_a_path(path: str, stripped: str) -> None:
    """A proxy may remove the prefix from the path or leave it there."""
    scope = {"path": path, "raw_path": path.encode()}
    strip_root_path(scope, "/tts")
    assert scope == {"path": stripped, "raw_path": stripped.encode()}


@pytest.mark.parametrize(
    ("authority", "parts"),
    [
        ("a", ("a", "")),
        ("a:80", ("a", "80")),
        ("[::1]:80", ("[::1]", "80")),
        ("[::1]", ("[::1]", "")),
        ("::1", ("::1", "")),
        ("a:b", ("a:b", "")),
    ],
)
def test_the_parts_of_an_authority(authority: str, parts: tuple[str, str]) -> None:
    """Host and port, also of IPv6 addresses."""
    assert split_authority(authority) == parts


@SHARED_LOOP
async def test_clients_behind_a_proxy_queue_by_their_own_addresses(serve: Serve, worker: FakeWorker) -> None:
    """Fairness: the clients of a trusted proxy are not one client."""
    client = await serve()
    for address in (CLIENT, "203.0.113.8"):
        await client.post(SPEECH, json={"input": "x"}, headers={"x-forwarded-for": address})
    assert [speak.client for speak in worker.of(Speak)] == [f"peer:{CLIENT}", "peer:203.0.113.8"]


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "::ffff:203.0.113.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1:2:3", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("fe80::1", "fe80::1"),  # all neighbours have this /64
        ("::1", "::1"),
        ("local", "local"),
    ],
)
def test_what_counts_as_one_client(address: str, network: str) -> None:
    """An address of IPv4 and a /64 of IPv6."""
    assert client_network(address) == network


def test_requests_of_one_network() -> None:
    """Requests from a /64 count together, and are forgotten when they end."""
    requests = OpenRequests()
    begun = [requests.begin({"client": (f"2001:db8::{host}", 1)}, has_body=False) for host in (1, 2)]
    assert requests.of_address("2001:db8::3") == 2
    for request in begun:
        requests.end(request)
    assert requests.of_address("2001:db8::1") == 0


@SHARED_LOOP
async def test_clients_of_one_ipv6_network_share(serve: Serve, worker: FakeWorker) -> None:
    """Fairness: another address of the same /64 is no other client."""
    client = await serve()
    for address in ("2001:db8::1", "2001:db8::2"):
        await client.post(SPEECH, json={"input": "x"}, headers={"x-forwarded-for": address})
    assert [speak.client for speak in worker.of(Speak)] == ["peer:2001:db8::/64"] * 2


@SHARED_LOOP
async def test_the_service_answers_below_its_root_path(serve: Serve) -> None:
    """With TTS_ROOT_PATH, a path may have the prefix or not."""
    client = await serve(root_path="/tts")
    for path in ("/tts/v1/models", "/v1/models", "/tts/docs", "/tts"):
        assert (await client.get(path)).status_code == 200, path
