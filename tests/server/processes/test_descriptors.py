"""The limit of file descriptors: raised to what the connections need, or the connections fewer."""

import resource

import pytest
import structlog

from server.processes.descriptors import RESERVE, places_for_connections

WANTED = 4096
NEEDED = WANTED + RESERVE


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "places"),
    [
        (1024, 20_000, NEEDED, WANTED),
        (1024, resource.RLIM_INFINITY, NEEDED, WANTED),
        (20_000, 20_000, None, WANTED),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, WANTED),
        (1024, 2048, 2048, 2048 - RESERVE),
        (1024, 1024, None, 1024 - RESERVE),
    ],
)
def test_the_limit(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised_to: int | None, places: int) -> None:
    """The soft limit is raised as far as needed, never lowered; a warning says that the hard limit is too low."""
    limits = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.append(new))
    with structlog.testing.capture_logs() as logged:
        assert places_for_connections(WANTED) == places
    assert limits == ([] if raised_to is None else [(raised_to, hard)])
    assert [line["event"] for line in logged] == ["file_descriptor_limit_too_low"] * (places < WANTED)
