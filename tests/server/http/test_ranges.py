"""Byte ranges: the part that a request asks for, by RFC 9110."""

import pytest

from server.http.ranges import UnsatisfiableError, http_date, is_unchanged, requested_range

SIZE = 1000
ETAG = '"abc"'
DATE = http_date(1_700_000_000)
HUGE = "9" * 300


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-0", range(1)),
        ("bytes=0-", range(SIZE)),
        ("bytes=0-1", range(2)),  # Safari's first question
        ("bytes=200-299", range(200, 300)),
        ("bytes=999-", range(999, SIZE)),
        ("bytes=900-5000", range(900, SIZE)),
        (f"bytes=10-{HUGE}", range(10, SIZE)),
        ("bytes=-1", range(999, SIZE)),
        ("bytes=-5000", range(SIZE)),
        (f"bytes=-{HUGE}", range(SIZE)),
        ("BYTES = 5-6", range(5, 7)),
        (" bytes=5-6 ", range(5, 7)),
    ],
)
def test_one_range(header: str, part: range) -> None:
    """First and last offset, an open end, and the last bytes."""
    assert requested_range({"range": header}, SIZE, etag=ETAG, modified=DATE) == part


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=1000-2000", f"bytes={HUGE}-", "bytes=-0"])
def test_no_such_part(header: str) -> None:
    """A range behind the end."""
    with pytest.raises(UnsatisfiableError):
        requested_range({"range": header}, SIZE, etag=ETAG, modified=DATE)


@pytest.mark.parametrize(
    "header",
    [
        *("", "bytes", "bytes=", "bytes=-", "bytes=5-4", "bytes=a-b", "bytes=0x1-2", "bytes=--1", "bytes=+1-2"),
        *(
            "bytes=1-2,4-5",
            "items=0-1",
            "bytes=1.5-2",
            "bytes=\uff11-\uff12",
            "bytes=1-2;",
            "bytes:1-2",
            "bytes=" + "1" * 5000,
        ),
    ],
)
def test_all_of_it(header: str) -> None:
    """Several ranges, another unit, and what is no range."""
    assert requested_range({"range": header}, SIZE, etag=ETAG, modified=DATE) is None


@pytest.mark.parametrize(
    ("condition", "applies"),
    [
        (ETAG, True),
        (DATE, True),
        ('"other"', False),
        ("W/" + ETAG, False),
        (http_date(1_700_000_001), False),
        ("", False),
    ],
)
def test_if_range(condition: str, *, applies: bool) -> None:
    """Of other audio a part would not fit: the whole is sent."""
    part = requested_range({"range": "bytes=5-6", "if-range": condition}, SIZE, etag=ETAG, modified=DATE)
    assert part == (range(5, 7) if applies else None)


@pytest.mark.parametrize(
    ("header", "unchanged"),
    [(ETAG, True), (f'"x", {ETAG}', True), (f"W/{ETAG}", True), ("*", True), ('"x"', False), ("", False)],
)
def test_if_none_match(header: str, *, unchanged: bool) -> None:
    """A client that has the body already."""
    assert is_unchanged({"if-none-match": header}, ETAG) is unchanged
    assert not is_unchanged({}, ETAG)
