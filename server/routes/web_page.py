"""The page that browsers get at /, and the files that the page loads.

The page is plain ES modules in server/web/page, and libraries in server/web/vendor; nothing is built.
Its Content-Security-Policy allows no inline script or style and no other origin.
"""

import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from litestar import Request, Response, get
from litestar.exceptions import NotFoundException
from litestar.params import FromPath

from server.http.accept import preferred_type, takes_gzip
from server.http.forwarded import client_view
from server.http.ranges import is_unchanged
from shared.settings import Settings

_WEB: Final = Path(__file__).resolve().parent.parent / "web"
_LIBRARIES: Final = ("preact.js", "preact-hooks.js", "htm.js", "uplot.js", "uplot.css")
_LATER: Final = ("theme-early", "voices/", "watch/", "vendor/uplot")
"""Scripts that are no modules of the first view."""

_MEDIA_TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "media-src 'self' blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_YEAR: Final = "public, max-age=31536000, immutable"
_REVALIDATE: Final = "no-cache"


class WebFile(msgspec.Struct, frozen=True):
    """A file as it is sent: its bytes, the same compressed, its media type and its ETag."""

    content: bytes
    compressed: bytes
    media_type: str
    etag: str


class WebFiles(msgspec.Struct, frozen=True):
    """All files by their path below the page's own; `digest` of all of them is part of their URLs.

    `preloads` are the links that let a browser fetch all modules of the first view at once, instead of one import
    after the other.
    """

    files: dict[str, WebFile]
    digest: str
    preloads: str


def wants_page(request: Request[Any, Any, Any]) -> bool:
    """True if the client is a browser that shows a page, by its Accept header."""
    return preferred_type(request.headers, ["application/json", "text/html"]) == "text/html"


def page_response(request: Request[Any, Any, Any], settings: Settings) -> Response[bytes]:
    """The page. It names its files relative to itself, or below the path that the proxy in front has told."""
    web = _read_all()
    prefix = client_view(settings, request.scope).prefix
    base = f"{prefix}/" if prefix else ""
    html = web.files["index.html"].content.replace(b"{preloads}", web.preloads.encode())
    html = html.replace(b"{files}", f"{base}page/{web.digest}".encode())
    html = html.replace(b"{base}", base.encode())
    page = _file(html, "text/html")
    headers = {
        "Content-Security-Policy": _POLICY,
        "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
        "Referrer-Policy": "no-referrer",
    }
    return _response(request, page, headers | {"Cache-Control": _REVALIDATE, "Vary": "Accept, Accept-Encoding"})


@get("/page/{digest:str}/{name:path}", include_in_schema=False, sync_to_thread=True)
def page_file(request: Request[Any, Any, Any], digest: FromPath[str], name: FromPath[str]) -> Response[bytes]:
    """One of the files that the page loads, and no other.

    Browsers keep a file for good under the digest of today's files. A page that was opened before an update of the
    server names the old digest.
    """
    web = _read_all()
    file = web.files.get(name.removeprefix("/"))
    if file is None:
        raise NotFoundException
    caching = _YEAR if digest == web.digest else _REVALIDATE
    return _response(request, file, {"Cache-Control": caching, "Vary": "Accept-Encoding"})


def _response(request: Request[Any, Any, Any], file: WebFile, headers: dict[str, str]) -> Response[bytes]:
    headers = headers | {"ETag": file.etag, "X-Content-Type-Options": "nosniff"}
    if is_unchanged(request.headers, file.etag.removeprefix("W/")):
        return Response(b"", status_code=304, headers=headers)
    content = file.content
    if takes_gzip(request.headers):
        content, headers = file.compressed, headers | {"Content-Encoding": "gzip"}
    return Response(content, media_type=file.media_type, headers=headers)


@cache
def _read_all() -> WebFiles:
    """The files, once for all requests: 0.3 MB."""
    page = _WEB / "page"
    paths = {str(path.relative_to(page)): path for path in sorted(page.rglob("*")) if path.is_file()}
    paths |= {f"vendor/{name}": _WEB / "vendor" / name for name in _LIBRARIES}
    files = {name: _file(path.read_bytes(), _MEDIA_TYPES[path.suffix]) for name, path in paths.items()}
    digest = hashlib.sha256("".join(name + file.etag for name, file in files.items()).encode()).hexdigest()
    first = [name for name in files if name.endswith(".js") and not name.startswith(_LATER)]
    preloads = "\n    ".join(f'<link rel="modulepreload" href="{{files}}/{name}">' for name in first)
    return WebFiles(files, digest[:16], preloads)


def _file(content: bytes, media_type: str) -> WebFile:
    etag = f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
    return WebFile(content, gzip.compress(content, mtime=0), media_type, etag)
