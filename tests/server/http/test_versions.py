"""Versions of the API: every answer tells its own, and a request for another one is a 404 that names what there is."""

import httpx
import pytest

from tests.server.running import HANDSHAKE, SHARED_LOOP

pytestmark = SHARED_LOOP


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v2/voices", "/metrics", "/nothing", "/v1/audio/speech"])
async def test_answers_tell_the_version(client: httpx.AsyncClient, path: str) -> None:
    """Answers and errors have the header."""
    assert (await client.get(path)).headers["x-api-version"] == "1"


@pytest.mark.parametrize("headers", [{}, HANDSHAKE], ids=["http", "websocket"])
@pytest.mark.parametrize("path", ["/v2/audio/speech", "/v99/models", "/v0"])
async def test_a_path_of_another_version(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
    """The message names the version that there is, to WebSockets as well."""
    answer = await client.get(path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "the only version of this API is 1" in answer.json()["error"]["message"]
    assert "/v1" in answer.json()["error"]["message"]


async def test_other_paths_say_nothing_of_versions(client: httpx.AsyncClient) -> None:
    """A path within version 1, and one that only looks like a version, are wrong for other reasons."""
    for path in ("/v1/nothing", "/v2x/nothing", "/version"):
        assert "version of this API" not in (await client.get(path)).json()["error"]["message"]


@pytest.mark.parametrize("asked", ["1", "v1", "V1", ""])
async def test_the_version_may_be_asked_for(client: httpx.AsyncClient, asked: str) -> None:
    """A header that names this version changes nothing."""
    assert (await client.get("/v1/models", headers={"x-api-version": asked})).status_code == 200


@pytest.mark.parametrize("asked", ["2", "9", "v2", "2026-01-01", "1.5", "sk-tts-secret"])
async def test_a_header_of_another_version(client: httpx.AsyncClient, asked: str) -> None:
    """It is refused before anything is done, and its value is not repeated."""
    answer = await client.post("/v1/audio/speech", json={"input": "Hello."}, headers={"x-api-version": asked})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "not_found", "x-api-version")
    assert "the only version of this API is 1" in error["message"]
    assert "secret" not in answer.text
