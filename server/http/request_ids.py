"""One id for every request: the client's own where it is sane, else a new one; on every answer, errors included."""

import uuid

from litestar.datastructures import Headers, MutableScopeHeaders
from litestar.types import Message, Scope

from shared.log import sane_request_id


def request_id_of(scope: Scope) -> str:
    """The id of the request behind `scope`; the same one each time it is asked."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers.from_scope(scope).get("x-request-id")
        state["request_id"] = sane_request_id(given) or uuid.uuid4().hex
    return str(state["request_id"])


async def put_request_id(message: Message, scope: Scope) -> None:
    """Litestar's hook before each message is sent: put the id on the head of an answer."""
    if message["type"] == "http.response.start":
        MutableScopeHeaders(message)["x-request-id"] = request_id_of(scope)
