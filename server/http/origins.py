"""Scripts of web pages: which sites may call this server, and how those are kept out that CORS does not stop.

A page of any site can make a browser send a POST whose answer it cannot read; the GPU would have worked all the same.
Where a key is needed, such a request has none. Where none is, its Origin decides; what is no browser sends none.
"""

import ipaddress
from typing import Any, Final

from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection

from server.http.errors import ApiError
from shared.settings import Settings

_EXPOSED: Final = ["x-request-id", "x-model", "x-sample-rate", "x-finish-reason", "Server-Timing", "Retry-After"]
"""Headers of ours that a browser's script may read."""

_READING: Final = {"GET", "HEAD", "OPTIONS"}


def cors_config(settings: Settings) -> CORSConfig | None:
    """Which other sites' scripts may call: none by default, and with `*` none that carry credentials."""
    if not settings.cors_origins:
        return None
    return CORSConfig(
        allow_origins=settings.cors_origins,
        allow_credentials="*" not in settings.cors_origins,
        expose_headers=_EXPOSED,
        max_age=600,
    )


def refuse_foreign(connection: ASGIConnection[Any, Any, Any, Any]) -> None:
    """ApiError (`foreign_origin`) where a browser says that another site's page sent this request.

    Our own pages may, but only where they were found by address: to a page whose name was made to point here
    ("DNS rebinding"), this server is the same origin.
    """
    origin = connection.headers.get("origin")
    if origin is None:
        # Browsers tell more than one way; old ones sent no Origin with some requests.
        site = connection.headers.get("sec-fetch-site", "")
        if site == "cross-site" and connection.scope.get("method") not in _READING:
            raise foreign_origin("another site")
        return
    cors = connection.app.cors_config
    if cors is not None and cors.is_origin_allowed(origin):
        return
    host = connection.headers.get("host", "")
    if origin.partition("://")[2].lower() != host.lower() or not _is_address(host):
        raise foreign_origin(origin)


def foreign_origin(origin: str) -> ApiError:
    """What a page of `origin` is told."""
    shown = origin if len(origin) <= 200 else origin[:200] + "…"  # noqa: PLR2004 - long enough for any that is meant
    return ApiError(
        "foreign_origin",
        f"Pages of {shown} may not call this server; to let them, list their origin in TTS_CORS_ORIGINS.",
    )


def _is_address(host: str) -> bool:
    """Whether a Host header names this server by an IP address, or as localhost: no DNS answer leads there."""
    name, _, port = host.rpartition(":")
    name = name if name and port.isdigit() else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
