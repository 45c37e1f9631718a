"""The order in which a client prefers media types."""

import pytest

from server.http.accept import preferred_type, takes_gzip

OFFERED = ["application/json", "text/html"]


@pytest.mark.parametrize(
    ("accept", "preferred"),
    [
        (None, 0),
        ("", 0),
        ("*/*", 0),
        ("text/html", 1),
        ("text/html,*/*;q=0.8", 1),
        ("text/html;q=0.5, application/json", 0),
        ("text/html;q=inf", 0),
        ("text/html;q=1e999", 0),
        ("text/html;q=nan", 1),
        (";;;", 0),
        ("a/b/c,,", 0),
    ],
)
def test_media_types(accept: str | None, preferred: int) -> None:
    """The best of those that are offered, and the first one for nonsense."""
    assert preferred_type({} if accept is None else {"accept": accept}, OFFERED) == OFFERED[preferred]


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("", False),
        ("br", False),
        ("x-gzip", False),
        ("gzip, deflate, br", True),
        ("br;q=1, GZIP; q=0.1", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
    ],
)
def test_gzip(header: str, *, taken: bool) -> None:
    """A weight of 0 excludes it."""
    assert takes_gzip({"accept-encoding": header}) is taken
