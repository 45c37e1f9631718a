"""Recordings named by URL: only public addresses are connected to, whatever the URL looks like."""

import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pytest

from server.audio.fetching import Address, fetch_reference, is_public
from server.audio.file_kinds import InvalidAudioError


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("2001:4860:4860::8888", True),
        ("2a00:1450:4001:82f::200e", True),
        ("2001:200::1", True),
        ("3ffe::1", True),
        ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("240.0.0.1", False),
        ("0.0.0.0", False),  # noqa: S104 - nothing is bound
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:0:7f00:1", False),
        ("::ffff:0:5db8:d822", False),
        ("::127.0.0.1", False),
        ("::93.184.216.34", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("64:ff9b:1:fffe::1", False),
        ("100::1", False),
        ("100:0:0:1::1", False),
        ("1fff::1", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("2001:2::1", False),
        ("2001:10::1", False),
        ("2001:20::1", False),
        ("2001:1ff::1", False),
        ("2001:db8::1", False),
        ("2002:7f00:1::", False),
        ("2002:5db8:d822::1", False),
        ("3fff::1", False),
        ("3fff:fff::1", False),
        ("4000::1", False),
        ("5f00::1", False),
        ("fec0::1", False),
        ("fe80::1%lo", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:  # noqa: FBT001 - a column of the table above
    """Only addresses of the public internet are public, in whatever form they are written."""
    assert is_public(ip_address(address)) is public


@pytest.fixture
def site() -> Iterator[tuple[str, list[str]]]:
    """A web site on the loopback, and the paths that were requested."""
    requested: list[str] = []

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            if self.path == "/never":
                released.wait(10)
                return
            self.send_response(302 if self.path.startswith(("/to?", "/loop")) else 404 if self.path == "/gone" else 200)
            if self.path.startswith("/to?"):
                self.send_header("Location", self.path.removeprefix("/to?"))
            if self.path == "/loop":
                self.send_header("Location", "/loop")
            if self.path == "/short":
                self.send_header("Content-Length", "1000")
            if self.path == "/endless":
                self.send_header("Content-Length", "9" * 30)
            if self.path == "/chunk":
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            size = {"/voice": 5_000, "/short": 10, "/endless": 10, "/large": 2_000_000}.get(self.path, 0)
            self.wfile.write(b"f" * 30 + b"\r\nabc" if self.path == "/chunk" else bytes(size))

        def log_message(self, *_arguments: object) -> None:
            """Log nothing."""

    released = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://site.test:{server.server_port}", requested
    released.set()
    server.shutdown()
    thread.join()
    server.server_close()


async def fetched(
    url: str,
    *,
    resolve: Callable[[str, int], Sequence[str]] = lambda _host, _port: ["127.0.0.1"],
    may_connect: Callable[[Address], bool] = lambda address: str(address) == "127.0.0.1",
    max_bytes: int = 100_000,
    timeout_s: float = 20.0,
) -> bytes:
    """Fetch as if the loopback were public."""
    return await fetch_reference(
        url, max_bytes=max_bytes, timeout_s=timeout_s, resolve=resolve, may_connect=may_connect
    )


async def test_a_url_is_fetched(site: tuple[str, list[str]]) -> None:
    """The body of a response is returned, also after a redirect."""
    url, requested = site
    assert await fetched(f"{url}/voice") == bytes(5_000)
    assert await fetched(f"{url}/to?/voice") == bytes(5_000)
    assert requested == ["/voice", "/to?/voice", "/voice"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/large", "larger than"),
        ("/gone", "HTTP 404"),
        ("/loop", "redirects more than 3 times"),
        ("/short", "cannot be fetched"),
        ("/endless", "cannot be fetched"),
        ("/chunk", "cannot be fetched"),
        ("/to?http://[bad", "cannot be fetched"),
        ("/to?http://a:bad/", r"not an http\(s\) URL"),
        ("/to?ftp://site.test/voice", r"not an http\(s\) URL"),
        ("/to?file:///etc/passwd", r"not an http\(s\) URL"),
    ],
)
async def test_bad_responses_are_refused(site: tuple[str, list[str]], path: str, said: str) -> None:
    """A response that is too large, missing, a loop, truncated or of another protocol is an InvalidAudioError."""
    with pytest.raises(InvalidAudioError, match=said):
        await fetched(site[0] + path)


async def test_a_silent_server_times_out(site: tuple[str, list[str]]) -> None:
    """The timeout holds for the whole fetch."""
    with pytest.raises(InvalidAudioError, match=r"within 0\.2 s"):
        await fetched(f"{site[0]}/never", timeout_s=0.2)


async def test_a_slow_name_server_times_out() -> None:
    """The timeout holds for name resolution too, although its thread goes on."""
    released, resolved = threading.Event(), []

    def resolve(host: str, _port: int) -> list[str]:
        released.wait(60)
        resolved.append(host)
        return []

    try:
        with pytest.raises(InvalidAudioError, match=r"within 0\.2 s"):
            await fetched("http://site.test/voice", resolve=resolve, timeout_s=0.2)
        assert not resolved
    finally:
        released.set()


async def test_private_addresses_get_no_request(site: tuple[str, list[str]]) -> None:
    """A private address, by name or number, directly or after a redirect, is refused and gets no request."""
    url, requested = site
    port = url.rpartition(":")[2]
    for target in (f"http://127.0.0.1:{port}/voice", f"http://localhost:{port}/voice", f"http://[::1]:{port}/voice"):
        with pytest.raises(InvalidAudioError, match="not lead to the public internet"):
            await fetch_reference(target, timeout_s=5)
    assert requested == []
    names = {"site.test": ["127.0.0.1"], "inside.test": ["10.0.0.1"]}
    with pytest.raises(InvalidAudioError, match="not lead to the public internet"):
        await fetched(f"{url}/to?http://inside.test/voice", resolve=lambda host, _port: names[host])


async def test_one_private_address_refuses_the_name(site: tuple[str, list[str]]) -> None:
    """A name with one private address among public ones is refused."""
    with pytest.raises(InvalidAudioError, match="not lead to the public internet"):
        await fetched(f"{site[0]}/voice", resolve=lambda _host, _port: ["127.0.0.1", "10.0.0.1"])


async def test_the_checked_address_is_the_one_connected_to(site: tuple[str, list[str]]) -> None:
    """A name is resolved once for each redirect and never after the check, so a changing answer has no effect."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    assert await fetched(f"{site[0]}/voice", resolve=lambda _host, _port: next(answers)) == bytes(5_000)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://a:99999/",
        "ftp://site.test/",
        "http://user@site.test/",
        "http://[::1",
        "nonsense",
    ],
)
async def test_wrong_urls_are_refused(url: str) -> None:
    """A wrong URL is an InvalidAudioError."""
    with pytest.raises(InvalidAudioError, match="not an http"):
        await fetched(url)


async def test_a_url_cannot_write_headers(site: tuple[str, list[str]]) -> None:
    """Line breaks and spaces in a URL stay part of its path, and make no header."""
    url, requested = site
    await fetched(f"{url}/a b?c= d")
    assert requested == ["/a%20b?c=%20d"]
