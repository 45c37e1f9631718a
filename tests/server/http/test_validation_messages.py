"""Messages about wrong values, as a client reads them."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.fakes import FakeWorker
from tests.server.running import SPEECH, serving

VOICES = "/v1/audio/voices"
SOUND = ("audio_sample", ("a.wav", b"x"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """A server that takes bodies of up to 1 MiB."""
    path: Path = tmp_path_factory.mktemp("wording")
    with FakeWorker(path / "w.ipc", chunks=1) as worker:
        async with serving(worker.url, max_body_mb=1) as client:
            yield client


@pytest.mark.parametrize(
    ("path", "request_", "message"),
    [
        (SPEECH, {"json": {"input": 7}}, "input: must be a string, not a number."),
        (SPEECH, {"json": {"input": ""}}, "input: must not be empty."),
        (
            SPEECH,
            {"json": {"input": "x", "response_format": "ogg"}},
            "response_format: must be one of mp3, opus, aac, flac, wav, pcm, not 'ogg'.",
        ),
        (SPEECH, {"json": {"input": "x", "voice": []}}, "voice: must be a string or an object, not a list."),
        (SPEECH, {"json": {"input": "x", "voice": {}}}, "voice: needs the field id."),
        (SPEECH, {"json": {"input": "x", "speed": 9}}, "speed: must be at most 4."),
        (SPEECH, {"json": {"input": "x", "top_p": 0}}, "top_p: must be more than 0."),
        (SPEECH, {"json": {"input": "x", "seed": 1.5}}, "seed: must be a whole number."),
        (SPEECH, {"json": {"input": "x", "model": "m" * 201}}, "model: must have at most 200 characters."),
        (
            SPEECH,
            {"content": rb'{"input": "\ud800"}'},
            r"The body is not valid JSON: \ud800 is half of a character.",
        ),
        (SPEECH, {"content": b'{"input": "x'}, "The body is not valid JSON: it ends too early."),
        (
            SPEECH,
            {"content": b"x" * 2**21, "headers": {"content-type": "application/json"}},
            "The request's body is larger than the 1 MiB that this server takes (TTS_MAX_BODY_MB).",
        ),
        (VOICES, {"files": [("name", ("n", b"x")), SOUND]}, "name: must be a string, not a file."),
        (VOICES, {"files": [("name", (None, "x")), ("audio_sample", (None, "x"))]}, "audio_sample: must be a file."),
        (
            VOICES,
            {"files": [("name", (None, "x")), ("type", (None, "song")), SOUND]},
            "type: must be one of clone, prompt, not 'song'.",
        ),
        (
            "/admin/models/espeak-ng/paint",
            {},
            "action: must be one of load, unload, pin, unpin, not 'paint'.",
        ),
        ("/admin/cleanup?trigger=perhaps", {}, "trigger: must be true or false."),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_what_clients_read(client: httpx.AsyncClient, path: str, request_: dict[str, Any], message: str) -> None:
    """Plain words that name the field, the choices and the limits."""
    assert (await client.post(path, **request_)).json()["error"]["message"] == message
