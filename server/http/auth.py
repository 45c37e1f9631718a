"""API keys: who may speak, who may administer, and the fairness key under which a client's requests queue.

Without configured keys every client may do everything, except the pages of other sites (see origins.py):
the server listens on loopback unless it is configured otherwise.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from server.http.elevenlabs_errors import KEY_HEADER
from server.http.errors import ApiError
from server.http.forwarded import client_view
from server.http.origins import refuse_foreign
from shared.settings import Settings

_KEY_SUBPROTOCOL: Final = "openai-insecure-api-key."
"""A subprotocol that is a key, as OpenAI's clients in browsers offer it: a page can set no header."""

Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], None]


def require_key(settings: Settings) -> Guard:
    """A guard that requires an API key or an admin key; without API keys every client passes."""

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
        if _is_among(_key_of(connection), [*settings.api_keys, *settings.admin_keys]):
            return
        if settings.api_keys:
            raise _unknown_key(connection)
        refuse_foreign(settings, connection)

    return guard


def require_admin(settings: Settings) -> Guard:
    """A guard that requires an admin key; without keys of either kind every client passes."""

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
        if not settings.api_keys and not settings.admin_keys:
            refuse_foreign(settings, connection)
            return
        key = _key_of(connection)
        if _is_among(key, settings.admin_keys):
            return
        if _is_among(key, settings.api_keys):
            raise ApiError("insufficient_permissions", "This needs an admin key (TTS_ADMIN_KEYS).")
        raise _unknown_key(connection)

    return guard


def admit_socket(settings: Settings, connection: ASGIConnection[Any, Any, Any, Any], key: str = "") -> bool:
    """Whether the client of a WebSocket may speak; False: it has not sent a key yet, and its first message may.

    `key` is that of the first message. Raises ApiError: the key is unknown, or the page that asks is foreign.
    """
    key = _key_of(connection) or key.strip()
    if not settings.api_keys:
        if not _is_among(key, settings.admin_keys):
            refuse_foreign(settings, connection)
        return True
    if not key:
        return False
    if not _is_among(key, [*settings.api_keys, *settings.admin_keys]):
        raise ApiError("invalid_api_key", "This server does not know this API key.")
    return True


def subprotocol_for(offered: list[str]) -> str | None:
    """The subprotocol to accept of those that a client offers: a browser wants one of them, and one may be its key."""
    return next((name for name in offered if not name.startswith(_KEY_SUBPROTOCOL)), next(iter(offered), None))


def client_of(settings: Settings, connection: ASGIConnection[Any, Any, Any, Any], key: str = "") -> str:
    """The fairness key: a digest of the client's API key, else the client's address. Never the API key itself.

    Without configured keys the address counts: many clients then send the same made-up API key.
    Behind a trusted proxy it is the address that the proxy has forwarded. `key` is one that no header has.
    """
    key = _key_of(connection) or key.strip()
    if key and (settings.api_keys or settings.admin_keys):
        return "key:" + hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"peer:{client_view(settings, connection.scope).address or 'local'}"


def owner_of(settings: Settings, connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """The client whose requests this one may look at; "" for those of all, where no key protects the service."""
    return client_of(settings, connection) if settings.api_keys or settings.admin_keys else ""


def _key_of(connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """The key in `Authorization: Bearer`, in ElevenLabs' header, or in a WebSocket's subprotocol; "" without one."""
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = connection.headers.get(KEY_HEADER, "")
    offered: Any = connection.scope.get("subprotocols", [])
    in_subprotocol = (name.removeprefix(_KEY_SUBPROTOCOL) for name in offered if name.startswith(_KEY_SUBPROTOCOL))
    return key.strip() or next(in_subprotocol, "")


def _is_among(key: str, keys: list[str]) -> bool:
    """True if `key` is one of `keys`; the time that this takes does not depend on how much of `key` is right."""
    given = key.encode()
    return any([hmac.compare_digest(given, known.encode()) for known in keys])  # noqa: C419 - any() must not stop early


def _unknown_key(connection: ASGIConnection[Any, Any, Any, Any]) -> ApiError:
    if _key_of(connection):
        return ApiError("invalid_api_key", "This server does not know this API key.")
    return ApiError("invalid_api_key", "This server needs an API key: Authorization: Bearer …")
