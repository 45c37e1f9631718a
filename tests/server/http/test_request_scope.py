"""Request ids: a client's own id is taken over if it is harmless."""

from typing import Any, cast

import pytest
from litestar.types import Scope

from server.http.request_scope import request_id_of


def _scope(request_id: str | None) -> Scope:
    headers = [] if request_id is None else [(b"x-request-id", request_id.encode("latin-1", "replace"))]
    return cast("Any", {"type": "http", "headers": headers})


@pytest.mark.parametrize("request_id", ["r", "req_01:a.b-C", "0" * 128])
def test_a_sane_id_is_kept(request_id: str) -> None:
    """An id of letters, digits and some punctuation is the request's id."""
    assert request_id_of(_scope(request_id)) == request_id


@pytest.mark.parametrize(
    "request_id", [None, "", "0" * 129, "a b", "a\nb", "ä", "\u0663", "a\x1b[31m", "<b>", 'a"b', "a/b"]
)
def test_another_id_is_replaced(request_id: str | None) -> None:
    """An id that could forge a log line or a header is replaced by a new one, which stays the same."""
    scope = _scope(request_id)
    assert len(request_id_of(scope)) == 32
    assert request_id_of(scope) == request_id_of(scope) != request_id
