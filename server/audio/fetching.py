"""Recordings that clients name by URL are fetched here: from the public internet alone, bounded in size and time.

This module does not look into the files.
"""

import asyncio
import http.client
import io
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Callable, Sequence
from typing import IO, Final

from server.audio.decoder import MAX_REFERENCE_BYTES
from server.audio.file_kinds import InvalidAudioError

FETCH_TIMEOUT_S: Final = 15.0

_MAX_REDIRECTS: Final = 3
_HEADER_BYTES: Final = 64 * 1024
"""Limit of an HTTP response beside its body: header lines and the sizes of chunks."""

_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")
"""All public addresses of IPv6; wrapped, translated, site-local and reserved addresses lie outside."""

_NOT_GLOBAL: Final = [
    ipaddress.ip_network(network)
    # Protocol assignments (Teredo among them), documentation, 6to4, and documentation again.
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]
"""Parts of it that reach no host, or that have an IPv4 address inside. Python 3.11 knows half of them."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]
"""All addresses of a host, for connecting to a port."""

MayConnect = Callable[[Address], bool]


async def fetch_reference(
    url: str,
    *,
    max_bytes: int = MAX_REFERENCE_BYTES,
    timeout_s: float = FETCH_TIMEOUT_S,
    resolve: Resolve | None = None,
    may_connect: MayConnect | None = None,
) -> bytes:
    """The body behind an http(s) URL of the public internet: at most `max_bytes`, within `timeout_s`.

    For each redirect too, the name is resolved once, all its addresses are checked, and a checked address is used:
    neither a redirect nor a changing DNS answer leads into a private network.
    Raises InvalidAudioError. `resolve` and `may_connect` are for tests.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _fetch(url, max_bytes, resolve or _resolve, may_connect or is_public)
    except TimeoutError:
        raise InvalidAudioError(f"the URL did not answer completely within {timeout_s:g} s") from None
    # A response may have a Location that is no URL or a length that is no index: then Python's own errors are raised.
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        raise InvalidAudioError("the URL cannot be fetched") from error


def is_public(address: Address) -> bool:
    """True for an address of the public internet; an IPv4 address in IPv6 form counts as IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        return address in _GLOBAL_UNICAST and not any(address in network for network in _NOT_GLOBAL)
    return address.is_global and not address.is_multicast


async def _fetch(url: str, max_bytes: int, resolve: Resolve, may_connect: MayConnect) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        received = await _get(url, max_bytes, resolve, may_connect)
        status, location, body = await asyncio.to_thread(_parse_response, received)
        if status in {301, 302, 303, 307, 308} and location:
            url = urllib.parse.urljoin(url, location)
            continue
        if status != http.client.OK:
            raise InvalidAudioError(f"the URL answers with HTTP {status}")
        if len(body) > max_bytes:
            raise InvalidAudioError(f"the recording is larger than {max_bytes / 2**20:g} MiB")
        return body
    raise InvalidAudioError(f"the URL redirects more than {_MAX_REDIRECTS} times")


async def _get(url: str, max_bytes: int, resolve: Resolve, may_connect: MayConnect) -> bytes:
    """The whole response to one GET, with its head."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError) as error:
        raise InvalidAudioError("this is not an http(s) URL") from error
    if not host or parts.username is not None:
        raise InvalidAudioError("this is not an http(s) URL of a recording")
    addresses = await asyncio.to_thread(resolve, host, port)
    if not addresses or not all(may_connect(ipaddress.ip_address(address)) for address in addresses):
        raise InvalidAudioError("the URL does not lead to the public internet")
    target = urllib.parse.quote(
        urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), safe="/?&=%:+,;@!$'()*~"
    )
    # Reading the system's certificates takes 20 ms.
    tls = await asyncio.to_thread(ssl.create_default_context) if parts.scheme == "https" else None
    reader, writer = await asyncio.open_connection(addresses[0], port, ssl=tls, server_hostname=host if tls else None)
    try:
        host_header = f"[{host}]" if ":" in host else host
        # HTTP/1.0, so that the end of the connection is the end of the response.
        writer.write(f"GET {target} HTTP/1.0\r\nHost: {host_header}:{port}\r\nAccept: audio/*\r\n\r\n".encode("ascii"))
        received = bytearray()
        while piece := await reader.read(65_536):
            received += piece
            if len(received) > max_bytes + _HEADER_BYTES:
                raise InvalidAudioError(f"the recording is larger than {max_bytes / 2**20:g} MiB")
    finally:
        writer.close()
    return bytes(received)


def _parse_response(received: bytes) -> tuple[int, str | None, bytes]:
    """Status, Location and, of a 200, the body. A body of a million chunks takes seconds: not on the event loop."""
    response = http.client.HTTPResponse(_ReceivedBytes(received))  # type: ignore[arg-type]  # it only calls makefile
    response.begin()
    body = response.read() if response.status == http.client.OK else b""
    return response.status, response.getheader("Location"), body


def _resolve(host: str, port: int) -> list[str]:
    """All addresses of `host`, in the resolver's order."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class _ReceivedBytes:
    """In the place of a socket for http.client: a response that has already arrived."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> IO[bytes]:
        return io.BytesIO(self._data)
