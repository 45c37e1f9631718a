"""Authentication and authorisation: the caller of a request, and the guards of routes. keys.py has the known keys.

Without configured keys every client may do everything, except the pages of other sites (see origins.py):
the server listens on loopback unless it is configured otherwise.
"""

from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.enums import ScopeType
from litestar.handlers import BaseRouteHandler

from server.http.elevenlabs_errors import KEY_HEADER
from server.http.errors import ApiError
from server.http.forwarded import client_network, client_view
from server.http.keys import Caller, Keyring, today
from server.http.origins import refuse_foreign
from shared.protocol import VoiceAccess
from shared.settings import Settings

_KEY_SUBPROTOCOL: Final = "openai-insecure-api-key."
"""A subprotocol that is a key, as OpenAI's clients in browsers offer it: a page can set no header."""

_CALLER: Final = "caller"
"""The place of the caller in the state of a request."""


def require_key(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """A guard that requires a known key; without keys for speech every client passes."""
    if _known(connection) is not None:
        return
    if keyring_of(connection).guards_speech:
        raise _unknown_key(connection)
    refuse_foreign(connection)


def require_admin(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """A guard that requires an admin key, and refuses pages of other sites even with one.

    Without any keys every other client passes.
    """
    is_guarded = keyring_of(connection).guards_admin
    if is_guarded:
        caller = _known(connection)
        if caller is None:
            raise _unknown_key(connection)
        if not caller.is_admin:
            raise ApiError("insufficient_permissions", "This needs an admin key.")
    refuse_foreign(connection, to_administer=True, with_key=is_guarded)


def admit_socket(connection: ASGIConnection[Any, Any, Any, Any], key: str = "") -> bool:
    """True if the client of a WebSocket may speak; False: it has not sent a key yet, and its first message may.

    `key` is that of the first message. Raises ApiError: the key is unknown, or the page that asks is foreign.
    """
    if _known(connection, key) is not None:
        return True
    if not keyring_of(connection).guards_speech:
        refuse_foreign(connection)
        return True
    if not (_key_of(connection) or key.strip()):
        return False
    raise ApiError("invalid_api_key", "This server does not know this API key.")


def subprotocol_for(offered: list[str]) -> str | None:
    """The subprotocol to accept of those that a client offers: a browser wants one of them, and one may be its key."""
    return next((name for name in offered if not name.startswith(_KEY_SUBPROTOCOL)), next(iter(offered), None))


def caller_of(settings: Settings, connection: ASGIConnection[Any, Any, Any, Any], key: str = "") -> Caller:
    """The sender of this request, by its key or else by its address.

    Without configured keys the address counts: many clients then send the same made-up API key.
    Behind a trusted proxy it is the address that the proxy has forwarded. `key` is one that no header has.
    """
    address = client_view(settings, connection.scope).address or "local"
    access = VoiceAccess(all=not keyring_of(connection).guards_admin)
    return _known(connection, key) or Caller(client=f"peer:{client_network(address)}", access=access)


def client_of(settings: Settings, connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """The fairness key of a request: the name or the digest of its API key, or its address. Never the key itself."""
    return caller_of(settings, connection).client


def owner_of(settings: Settings, connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """The client whose requests this one may look at; "" for those of all, where no key protects the service."""
    return client_of(settings, connection) if keyring_of(connection).guards_admin else ""


def keyring_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Keyring:
    """The keys that the application knows."""
    keyring: Keyring = connection.app.state.keyring
    return keyring


def _known(connection: ASGIConnection[Any, Any, Any, Any], key: str = "") -> Caller | None:
    """The caller by the request's key, or else by `key`; None if neither is known. ApiError if the key has expired.

    A request that was admitted stays its caller's to the end, also if a reload takes the key away meanwhile.
    A WebSocket may outlive many reloads, so its key is looked up each time.
    """
    state = connection.scope["state"]
    if _CALLER in state:
        admitted: Caller = state[_CALLER]
        return admitted
    key = _key_of(connection) or key.strip()
    caller = keyring_of(connection).find(key) if key else None
    if caller is not None and caller.is_expired(today()):
        raise ApiError("invalid_api_key", f"This API key has expired on {caller.expires}.")
    if caller is not None and connection.scope["type"] == ScopeType.HTTP:
        state[_CALLER] = caller
    return caller


def _key_of(connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """The key in `Authorization: Bearer`, in ElevenLabs' header, or in a WebSocket's subprotocol; "" without one."""
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = connection.headers.get(KEY_HEADER, "")
    offered: Any = connection.scope.get("subprotocols", [])
    in_subprotocol = (name.removeprefix(_KEY_SUBPROTOCOL) for name in offered if name.startswith(_KEY_SUBPROTOCOL))
    return key.strip() or next(in_subprotocol, "")


def _unknown_key(connection: ASGIConnection[Any, Any, Any, Any]) -> ApiError:
    if _key_of(connection):
        return ApiError("invalid_api_key", "This server does not know this API key.")
    return ApiError("invalid_api_key", "This server needs an API key: Authorization: Bearer …")
