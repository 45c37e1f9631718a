"""Request ids: a client's own id is taken over if it is harmless. Paths for the log."""

from typing import Any, cast

import pytest
from litestar.types import Scope

from server.http.request_scope import printable_path, request_id_of


def _scope(request_id: str | None) -> Scope:
    headers = [] if request_id is None else [(b"x-request-id", request_id.encode("latin-1", "replace"))]
    return cast("Any", {"type": "http", "headers": headers})


@pytest.mark.parametrize("request_id", ["r", "req_01:a.b-C", "0" * 128])
def test_a_sane_id_is_kept(request_id: str) -> None:
    """An id of letters, digits and some punctuation is the request's id."""
    assert request_id_of(_scope(request_id)) == request_id


@pytest.mark.parametrize(
    "request_id", [None, "", "0" * 129, "a b", "a\nb", "ä", "\u0663", "a\x1b[31m", "<b>", 'a"b', "a/b", "sk-tts-a_B-c"]
)
def test_another_id_is_replaced(request_id: str | None) -> None:
    """An id that could forge a log line or a header, or is a key, is replaced by a new one, which stays the same."""
    scope = _scope(request_id)
    assert len(request_id_of(scope)) == 32
    assert request_id_of(scope) == request_id_of(scope) != request_id


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v1/models", "/v1/models"),
        ("/a\x1b[31m", "/a%1B[31m"),
        ("/" + "a" * 300, "/" + "a" * 199 + "…"),
        ("/v1/models/sk-tts-a_B-c/x", "/v1/models/sk-tts-…/x"),
        ("/" + "a" * 190 + "sk-tts-secret", "/" + "a" * 190 + "sk-tts-…"),
    ],
)
def test_a_path_for_the_log(path: str, shown: str) -> None:
    """Short, printable, and without a key that stands where none belongs."""
    assert printable_path(cast("Any", {"path": path})) == shown
