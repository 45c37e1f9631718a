"""The label in answers: it names the model and the request, and TTS_PROVENANCE=false leaves it out."""

import base64
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.audio import tags_of
from tests.server.running import SHARED_LOOP, SPEECH, Serve

pytestmark = SHARED_LOOP


@pytest.mark.parametrize("more", [{}, {"stream": False}, {"stream": False, "response_format": "wav"}])
async def test_answers_have_it(serve: Serve, more: dict[str, Any]) -> None:
    """Streamed or whole, with the id of the client's request and the time of the speech."""
    client = await serve()
    body = {"input": "hello", "model": "espeak-ng", **more}
    answer = await client.post(SPEECH, json=body, headers={"x-request-id": "my-request"})
    tags = tags_of(answer.content)
    assert re.search(r"Model: espeak-ng\. Request: my-request\.$", tags["comment"])
    assert abs(datetime.now(UTC) - datetime.fromisoformat(tags["date"])) < timedelta(minutes=10)


async def test_a_batch_and_elevenlabs_have_it(serve: Serve) -> None:
    """As every route that makes files does."""
    client = await serve()
    batch = await client.post(f"{SPEECH}/batch", json={"items": [{"input": "hello"}], "response_format": "flac"})
    eleven = await client.post("/v1/text-to-speech/alloy", json={"text": "hello"})
    for audio in (base64.b64decode(batch.json()["results"][0]["audio_data"]), eleven.content):
        assert tags_of(audio)["comment"].startswith("Synthetic speech")


async def test_off(serve: Serve) -> None:
    """No tag of ours is in the file."""
    client = await serve(provenance=False)
    for audio_format in ("mp3", "opus", "flac", "wav"):
        body = {"input": "hello", "response_format": audio_format, "stream": False}
        answer = await client.post(SPEECH, json=body)
        assert tags_of(answer.content) == {}
