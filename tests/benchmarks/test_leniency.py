"""The bodies of the benchmark of leniency are what their names say."""

import pytest

from server.http.json_bodies import JsonDecoder
from server.schemas import ALIASES, SpeechRequest
from tests.benchmarks.leniency import BODIES, is_strict


@pytest.mark.parametrize("name", BODIES)
def test_the_server_takes_every_body(name: str) -> None:
    """The decoder takes each body; msgspec alone refuses those that need leniency."""
    assert JsonDecoder(SpeechRequest, ALIASES).decode(BODIES[name], "").voice
    assert is_strict(BODIES[name]) == (name in {"three fields", "every field", "4,096 characters"})
