"""API keys: who may speak, who may administer, and the name under which a client's requests queue.

Without configured keys everyone may do everything, except pages of other sites in somebody's browser (origins.py):
the server listens on loopback unless told otherwise.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from server.http.errors import ApiError
from server.http.origins import refuse_foreign
from shared.settings import Settings

Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], None]


def key_of(connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """The key that the client shows in `Authorization: Bearer`, "" where it shows none."""
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def require_key(settings: Settings) -> Guard:
    """A guard that lets holders of an API key or an admin key pass, and everyone where there are no API keys."""

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
        if _is_among(key_of(connection), [*settings.api_keys, *settings.admin_keys]):
            return
        if settings.api_keys:
            raise _unknown_key(connection)
        refuse_foreign(connection)

    return guard


def require_admin(settings: Settings) -> Guard:
    """A guard that lets holders of an admin key pass, and everyone where there are no keys of any kind."""

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
        if not settings.api_keys and not settings.admin_keys:
            refuse_foreign(connection)
            return
        key = key_of(connection)
        if _is_among(key, settings.admin_keys):
            return
        if _is_among(key, settings.api_keys):
            raise ApiError("insufficient_permissions", "This needs an admin key (TTS_ADMIN_KEYS).")
        raise _unknown_key(connection)

    return guard


def client_of(settings: Settings, connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """The name under which a client's requests queue: a digest of its key, else its address. Never the key itself.

    Where no keys are configured a key says nothing about who it is: many clients send the same made-up one.
    """
    key = key_of(connection)
    if key and (settings.api_keys or settings.admin_keys):
        return "key:" + hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"peer:{connection.client.host}" if connection.client else "peer:local"


def _is_among(key: str, keys: list[str]) -> bool:
    """Whether `key` is one of `keys`, in a time that does not tell how much of it was right."""
    given = key.encode()
    return any([hmac.compare_digest(given, known.encode()) for known in keys])  # noqa: C419 - any() must not stop early


def _unknown_key(connection: ASGIConnection[Any, Any, Any, Any]) -> ApiError:
    said = "This API key is not known here." if key_of(connection) else "An API key is needed: Authorization: Bearer …"
    return ApiError("invalid_api_key", said)
