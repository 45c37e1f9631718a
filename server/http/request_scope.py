"""Facts about one request that are kept in its ASGI scope or derived from it: its id and its path for log lines."""

import uuid
from typing import Final

from litestar.datastructures import Headers
from litestar.types import Scope

from shared.redaction import redact

BODY_ERROR: Final = "body_error"
"""The key in `scope["state"]` for the ApiError of a body that middleware.py has given up."""

ASKED_WITH_HEAD: Final = "asked_with_head"
"""The key in `scope["state"]` that middleware.py sets when it turns HEAD into GET."""

ERROR_CODE: Final = "error_code"
"""The key in `scope["state"]` of the code of an error whose body has not OpenAI's shape."""

SOCKET_ERROR: Final = "socket_error"
"""The key in `scope["state"]` of the ApiError with which a handler refuses a WebSocket's handshake."""

RELAYED: Final = "relayed"
"""The key in `scope["state"]` of a request whose connection another process owns: this one cannot reset it."""

_MAX_REQUEST_ID: Final = 128
"""Characters of a client's request id; a longer one is replaced."""

_LONGEST_PATH: Final = 200
"""Characters of a path that are logged: more than any path of this server has."""


def request_id_of(scope: Scope) -> str:
    """The request's id: the client's own `x-request-id` if it is sane, else a new one; the same at each call."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers.from_scope(scope).get("x-request-id")
        state["request_id"] = given if given and _is_sane(given) else uuid.uuid4().hex
    return str(state["request_id"])


def is_head(scope: Scope) -> bool:
    """True if the client sees the headers of the response alone."""
    return ASKED_WITH_HEAD in scope.get("state", {})


def _is_sane(request_id: str) -> bool:
    """True if a client's request id can forge neither a log line nor a header, and is no API key."""
    allowed = all(char.isalnum() or char in "-_.:" for char in request_id)
    return len(request_id) <= _MAX_REQUEST_ID and request_id.isascii() and allowed and redact(request_id) == request_id


def printable_path(scope: Scope) -> str:
    """The request's path for log lines and messages: shortened, with unprintable characters in hexadecimal.

    A client may send a path of any length, with escape sequences that would steer a terminal, or with its API key.
    """
    path = redact(str(scope["path"]))
    shown = path if len(path) <= _LONGEST_PATH else path[:_LONGEST_PATH] + "…"
    return "".join(char if char.isprintable() else f"%{ord(char):02X}" for char in shown)
