"""Web pages as clients: which pages may call this server. Also refuses requests that CORS alone would let through.

CORS only hides responses: a page of any site can make a browser send a POST, and the GPU would work for it.
If keys are configured, such a request lacks one. Without keys `refuse_foreign` decides, by the first row that fits:

| Origin | and | answer |
|---|---|---|
| none | the method only reads, or Sec-Fetch-Site is missing, `none` or `same-origin` | allowed: a program, our page |
| none | | refused: an old browser's request for the page of another site |
| one of TTS_CORS_ORIGINS | | allowed |
| `null`, or no URL of http or https | | refused: a file, a sandboxed frame, an extension |
| any | Sec-Fetch-Site is neither missing nor `same-origin` | refused: the browser says that the page is not ours |
| https, or a loopback host | Sec-Fetch-Site is `same-origin` | allowed: the browser says that the page is ours |
| its host is in TTS_ALLOWED_HOSTS | | allowed, whatever Host says |
| equal to Host or X-Forwarded-Host | the host is an IP address, localhost, or the machine's name | allowed |
| equal to Host or X-Forwarded-Host | TTS_ALLOWED_HOSTS has `*` | allowed |
| its host is an address or name of this machine | Host is a loopback host that a proxy may have written | allowed |
| any other | | refused |

Under /admin it decides with keys, too: a proxy may add the key to what a browser sends, and then a page of any site
could administer (CSRF). There, `*` in TTS_CORS_ORIGINS allows no page: an origin has to be named. And with a key, an
origin that equals Host is ours whatever its name: a rebound page has no key, and no cookie of that proxy.

DNS rebinding: a foreign page's own host name is made to point to this server. The page is then same-origin,
for the browser as well as by its Host header. So a host name counts only if it is known to be ours.

Why Sec-Fetch-Site can be believed: no script can set it. Browsers send it only to https, whose certificate names
the host, and to loopback hosts, which need no DNS: no rebound page can have it. For any other http origin
it would prove nothing, so `same-origin` does not count there.

Why a changed Host can be believed: nginx with a bare `proxy_pass http://127.0.0.1:8000` sends that address as Host.
A page at an address of this machine is then one that this machine serves. Loopback origins are left out:
there, every browser that knows Sec-Fetch-Site sends it, and programs of other users have their ports beside ours.
"""

import socket
from typing import Any, Final

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection

from server.http.errors import ApiError
from server.http.forwarded import ClientView, client_view, parse_address, split_authority
from shared.settings import Settings

_EXPOSED: Final = [
    *("x-request-id", "x-speech-id", "x-audio-url", "x-model", "x-sample-rate", "x-finish-reason", "x-ignored"),
    *(f"x-ratelimit-{part}-requests" for part in ("limit", "remaining", "reset")),
    *("x-api-version", "x-should-retry", "request-id", "Server-Timing", "Retry-After", "Content-Range", "ETag"),
    "Content-Disposition",
]
"""Response headers that a script of another site may read."""

_READING_METHODS: Final = {"GET", "HEAD", "OPTIONS"}
_LONGEST_ORIGIN: Final = 200
"""Characters of an origin that an error message repeats."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_DISCARD_PORT: Final = 9


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


def set_cors(app: Litestar, settings: Settings) -> None:
    """Let a running application answer by TTS_CORS_ORIGINS. Requests that are being answered keep what was."""
    app.cors_config = cors_config(settings)
    app.asgi_handler = app._create_asgi_handler()  # noqa: SLF001 -- Litestar builds the handler once, at its start


def refuse_foreign(
    connection: ASGIConnection[Any, Any, Any, Any], *, to_administer: bool = False, with_key: bool = False
) -> None:
    """Raise ApiError (`foreign_origin`) if a page that is neither ours nor configured sent this request.

    `to_administer`: the request is for /admin. `with_key`: it has an admin key.
    """
    origin = connection.headers.get("origin")
    site = connection.headers.get("sec-fetch-site", "")
    if origin is None:
        # Old browsers send some requests without Origin.
        if site not in {"", "none", "same-origin"} and connection.scope.get("method") not in _READING_METHODS:
            raise foreign_origin("another site")
        return
    cors = connection.app.cors_config
    is_named = cors is not None and origin != "*" and origin in cors.allow_origins
    if is_named or (cors is not None and not to_administer and cors.is_origin_allowed(origin)):
        return
    settings: Settings = connection.app.state.settings
    view = client_view(settings, connection.scope)
    allowed_hosts = {host.lower() for host in settings.allowed_hosts}
    if not _is_own_page(origin.lower(), site, view, allowed_hosts, any_name=with_key):
        raise foreign_origin(origin, to_administer=to_administer)


def foreign_origin(origin: str, *, to_administer: bool = False) -> ApiError:
    """The error for a page of `origin`."""
    shown = origin if len(origin) <= _LONGEST_ORIGIN else origin[:_LONGEST_ORIGIN] + "…"
    if origin == "null" and to_administer:
        advice = "open the page from a web server instead of a file, and list its origin in TTS_CORS_ORIGINS"
    elif origin == "null":
        advice = "open the page from a web server instead of a file, or allow every page with TTS_CORS_ORIGINS=*"
    elif origin.startswith(("http://", "https://")):
        advice = (
            "to allow them, list their origin in TTS_CORS_ORIGINS; "
            "if that is a name of this server itself, list the name in TTS_ALLOWED_HOSTS"
        )
    else:
        advice = "to allow them, list their origin in TTS_CORS_ORIGINS"
    return ApiError("foreign_origin", f"Pages of {shown} may not call this server; {advice}.")


def _is_own_page(origin: str, site: str, view: ClientView, allowed_hosts: set[str], *, any_name: bool) -> bool:
    """The rows of the table from `null` on, for an origin in lower case. `any_name`: Host may be any host name."""
    scheme, _, authority = origin.partition("://")
    name, port = split_authority(authority)
    if scheme not in {"http", "https"} or not name or site not in {"", "same-origin"}:
        return False
    if site == "same-origin" and (scheme == "https" or _is_loopback(name)):
        return True
    if name in allowed_hosts or f"{name}:{port or _DEFAULT_PORTS[scheme]}" in allowed_hosts:
        return True
    if authority in view.hosts:
        any_name = any_name or "*" in allowed_hosts
        return any_name or name == "localhost" or parse_address(name) is not None or _is_own_name(name)
    changed = view.through_proxy and any(_is_loopback(split_authority(host)[0]) for host in view.hosts)
    return changed and not _is_loopback(name) and (_is_own_name(name) or _is_own_address(name))


def _is_loopback(name: str) -> bool:
    """True if a host is this machine in every browser, without DNS."""
    address = parse_address(name)
    return name == "localhost" or (address is not None and address.is_loopback)


def _is_own_name(name: str) -> bool:
    """True if a host is the name of this machine, alone or with `.local` (multicast DNS): no outsider owns it."""
    own = socket.gethostname().lower()
    return name in {own, f"{own.partition('.')[0]}.local"}


def _is_own_address(name: str) -> bool:
    """True if a host is an IP address of this machine: the kernel then sends to it from that very address."""
    address = parse_address(name)
    if address is None:
        return False
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IPv4
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a UDP socket chooses the route and sends nothing.
            probe.connect((str(address), _DISCARD_PORT))
            return bool(parse_address(probe.getsockname()[0]) == address)
        except OSError:
            return False
