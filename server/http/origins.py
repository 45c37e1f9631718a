"""Web pages as clients: which sites may call this server. Also refuses requests that CORS alone would let through.

CORS only hides responses: a page of any site can make a browser send a POST, and the GPU would work for it.
If keys are configured, such a request lacks one. Without keys its Origin header decides; other clients send none.
"""

import ipaddress
from typing import Any, Final

from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection

from server.http.errors import ApiError
from shared.settings import Settings

_EXPOSED: Final = ["x-request-id", "x-model", "x-sample-rate", "x-finish-reason", "Server-Timing", "Retry-After"]
"""Response headers that a script of another site may read."""

_READING_METHODS: Final = {"GET", "HEAD", "OPTIONS"}
_LONGEST_ORIGIN: Final = 200
"""Characters of an origin that an error message repeats."""


def cors_config(settings: Settings) -> CORSConfig | None:
    """Litestar's CORS for TTS_CORS_ORIGINS: by default no other site, with `*` every site without credentials."""
    if not settings.cors_origins:
        return None
    return CORSConfig(
        allow_origins=settings.cors_origins,
        allow_credentials="*" not in settings.cors_origins,
        expose_headers=_EXPOSED,
        max_age=600,
    )


def refuse_foreign(connection: ASGIConnection[Any, Any, Any, Any]) -> None:
    """Raise ApiError (`foreign_origin`) if the page of another site sent this request.

    Our own pages (same origin) may call, but only if the Host header is an IP address or localhost:
    with DNS rebinding, a foreign page's own host name points to this server, which makes the two the same origin.
    """
    origin = connection.headers.get("origin")
    if origin is None:
        # Old browsers send some requests without Origin.
        site = connection.headers.get("sec-fetch-site", "")
        if site == "cross-site" and connection.scope.get("method") not in _READING_METHODS:
            raise foreign_origin("another site")
        return
    cors = connection.app.cors_config
    if cors is not None and cors.is_origin_allowed(origin):
        return
    host = connection.headers.get("host", "")
    if origin.partition("://")[2].lower() != host.lower() or not _is_address(host):
        raise foreign_origin(origin)


def foreign_origin(origin: str) -> ApiError:
    """The error for a page of `origin`."""
    shown = origin if len(origin) <= _LONGEST_ORIGIN else origin[:_LONGEST_ORIGIN] + "…"
    return ApiError(
        "foreign_origin",
        f"Pages of {shown} may not call this server; to allow them, list their origin in TTS_CORS_ORIGINS.",
    )


def _is_address(host: str) -> bool:
    """True if a Host header is an IP address or localhost, which no DNS record can point elsewhere."""
    name, _, port = host.rpartition(":")
    name = name if name and port.isdigit() else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
