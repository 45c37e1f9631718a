"""Requests that come through a proxy: the client's address, and the URL that the client used.

Only proxies of TTS_TRUSTED_PROXIES may speak for a client; the X-Forwarded-* headers of all others are ignored.
This module decides nothing: origins.py decides which pages may call, auth.py who shares a place in the queue.
"""

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from litestar.datastructures import Headers

from shared.settings import Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_BITS_OF_ONE_CLIENT: Final = 64
_LONGEST_ADDRESS: Final = 64
"""Characters of an IPv6 address with the name of an interface; Python takes a name of any length."""

_PREFIX: Final = re.compile(r"(/[\w.~-]+)+", re.ASCII)
_HOST: Final = re.compile(r"[\w.:\[\]-]{1,255}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ClientView:
    """A request as its client sees it; fields that no trusted proxy has sent are as this server sees them."""

    address: str | None
    """The client's IP address; None for a client that has none (a Unix socket)."""
    through_proxy: bool
    """True if the request may come from a trusted proxy: the address at the other end is one of theirs."""
    hosts: tuple[str, ...]
    """The authorities (host and port) that the request names, in lower case: X-Forwarded-Host, then Host."""
    scheme: str | None
    """`http` or `https` if a trusted proxy has said so."""
    prefix: str
    """The path below which the client finds this server: "" or `/tts`."""

    def url(self) -> str | None:
        """The base URL of this server for the client; None if no trusted proxy has sent all of it."""
        if self.scheme is None or len(self.hosts) < 2:  # noqa: PLR2004 - the proxy's and ours
            return None
        return f"{self.scheme}://{self.hosts[0]}{self.prefix}"


def client_view(settings: Settings, scope: Any) -> ClientView:
    """The client's view of the request with this ASGI scope."""
    headers = Headers.from_scope(scope)
    peer = str(scope["client"][0]) if scope.get("client") else None
    trusted = _networks(tuple(settings.trusted_proxies))
    own_host = tuple(host.lower() for host in headers.getall("host", []))
    if not is_trusted_proxy(settings, peer):
        return ClientView(_plain(peer), False, own_host, None, settings.root_path)
    forwarded_host = _first(headers, "x-forwarded-host").lower()
    scheme = _first(headers, "x-forwarded-proto").lower()
    prefix = _first(headers, "x-forwarded-prefix").rstrip("/")
    return ClientView(
        address=_forwarded_for(_entries(headers, "x-forwarded-for"), trusted) or _plain(peer),
        through_proxy=True,
        hosts=(forwarded_host, *own_host) if _HOST.fullmatch(forwarded_host) else own_host,
        scheme=scheme if scheme in {"http", "https"} else None,
        prefix=settings.root_path or (prefix if _PREFIX.fullmatch(prefix) else ""),
    )


def is_trusted_proxy(settings: Settings, peer: str | None) -> bool:
    """True if TTS_TRUSTED_PROXIES has `peer`, the address at the other end: many clients may stand behind it."""
    return _is_trusted(parse_address(peer), _networks(tuple(settings.trusted_proxies)))


def strip_root_path(scope: Any, root_path: str) -> None:
    """Remove `root_path` from the path of a request whose proxy has left it there."""
    path = scope["path"]
    if root_path and (path == root_path or path.startswith(root_path + "/")):
        scope["path"] = path[len(root_path) :] or "/"
        if raw := scope.get("raw_path"):
            scope["raw_path"] = raw[len(root_path) :] or b"/"


def split_authority(authority: str) -> tuple[str, str]:
    """Host and port of `host`, `host:port`, `[address]` or `[address]:port`; the port is "" if there is none."""
    name, colon, port = authority.rpartition(":")
    if colon and port.isdigit() and (":" not in name or name.endswith("]")):
        return name, port
    return authority, ""


def parse_address(text: str | None) -> Address | None:
    """The IP address that `text` is, with or without brackets; None if it is none."""
    if len(text or "") > _LONGEST_ADDRESS:
        return None
    try:
        address = ipaddress.ip_address((text or "").removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    # A socket for IPv6 and IPv4 shows clients with IPv4 so.
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=4_096)
def client_network(address: str) -> str:
    """The network that counts as one client: an IPv4 address, or the /64 of an IPv6 one, which one machine can own.

    Link-local addresses of all neighbours are in one /64, so each of them counts for itself.
    """
    parsed = parse_address(address)
    if not isinstance(parsed, ipaddress.IPv6Address) or parsed.is_link_local or parsed.is_loopback:
        return address
    return str(ipaddress.ip_network((parsed, _BITS_OF_ONE_CLIENT), strict=False))


def _plain(text: str | None) -> str | None:
    address = parse_address(text)
    return text if address is None else str(address)


@lru_cache(maxsize=8)
def _networks(trusted: tuple[str, ...]) -> tuple[_Network, ...]:
    return tuple(ipaddress.ip_network(network) for network in trusted)


def _is_trusted(address: Address | None, trusted: tuple[_Network, ...]) -> bool:
    return address is not None and any(address in network for network in trusted)


def _forwarded_for(entries: list[str], trusted: tuple[_Network, ...]) -> str | None:
    """The client's address: the last entry that is no trusted proxy, because a client can send entries of its own."""
    client = None
    for address in _addresses(reversed(entries)):
        client = str(address)
        if not _is_trusted(address, trusted):
            break
    return client


def _addresses(entries: Iterator[str]) -> Iterator[Address]:
    """The entries as addresses, up to the first one that is none (`unknown`, or a made-up name)."""
    for entry in entries:
        address = parse_address(entry) or parse_address(split_authority(entry)[0])
        if address is None:
            return
        yield address


def _entries(headers: Headers, name: str) -> list[str]:
    return [entry.strip() for line in headers.getall(name, []) for entry in line.split(",") if entry.strip()]


def _first(headers: Headers, name: str) -> str:
    """The first entry, which the proxy next to the client has written; "" if there is none."""
    return next(iter(_entries(headers, name)), "")
