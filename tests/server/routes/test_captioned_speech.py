"""POST /dev/captioned_speech and `timestamps`: words with times in lines, events and batches."""

import asyncio
import base64
import json
from typing import Any

import httpx
import msgspec
import pytest

from shared.protocol import Cancel, Failed, Speak, Word
from tests.fakes import FakeWorker, tone
from tests.server.running import SHARED_LOOP, SPEECH, Serve

pytestmark = SHARED_LOOP

CAPTIONED = "/dev/captioned_speech"
TEXT = "one two three"
PCM = b"".join(tone(TEXT, 3))
TIMES = [
    {"word": "one", "start_time": 0.0, "end_time": 0.05},
    {"word": "two", "start_time": 0.05, "end_time": 0.1},
    {"word": "three", "start_time": 0.1, "end_time": 0.24},
]
LARGE = "qwen3-tts-1.7b-customvoice"


@pytest.fixture
def timed(worker: FakeWorker) -> FakeWorker:
    """A worker that knows the words of TEXT, which it speaks in three pieces of 80 ms."""
    worker.words = {0: [Word(0, 0, 3, 0.0, 0.05), Word(0, 4, 7, 0.05, 0.1)], 1: [Word(0, 8, 13, 0.1, 0.24)]}
    return worker


def lines_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The JSON objects of an answer."""
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.usefixtures("timed")
async def test_lines_of_audio_and_words(client: httpx.AsyncClient) -> None:
    """Each line has audio and the words that are complete; all lines together are the speech."""
    answer = await client.post(CAPTIONED, json={"input": TEXT, "response_format": "pcm", "model": "tts-1"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    lines = lines_of(answer)
    assert len(lines) >= 3
    assert all(set(line) == {"audio", "audio_format", "timestamps"} for line in lines)
    assert {line["audio_format"] for line in lines} == {"audio/pcm"}
    assert b"".join(base64.b64decode(line["audio"]) for line in lines) == PCM
    assert [word for line in lines for word in line["timestamps"]] == TIMES
    assert lines[0]["timestamps"] == TIMES[:1]


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("stream", [True, False])
async def test_fields_without_an_effect(client: httpx.AsyncClient, *, stream: bool) -> None:
    """They are named: the audio is not stored, and the form of the answer is this route's own."""
    body = {"input": TEXT, "store": True, "stream": stream}
    answer = await client.post(CAPTIONED, json=body | {"stream_format": "sse"})
    assert (answer.status_code, answer.headers["x-ignored"]) == (200, "store, stream_format")
    answer = await client.post(CAPTIONED, json=body | {"store": False, "stream_format": "audio"})
    assert "x-ignored" not in answer.headers


@pytest.mark.usefixtures("timed")
async def test_one_object(client: httpx.AsyncClient) -> None:
    """`stream: false`: the whole audio and all words."""
    body = {"input": TEXT, "response_format": "pcm", "stream": False, "return_timestamps": True, "lang_code": "a"}
    answer = (await client.post(CAPTIONED, json=body)).json()
    assert base64.b64decode(answer["audio"]) == PCM
    assert answer["timestamps"] == TIMES


@pytest.mark.usefixtures("timed")
async def test_speed_moves_the_words(client: httpx.AsyncClient) -> None:
    """At half speed words are said twice as late."""
    body = {"input": TEXT, "response_format": "pcm", "stream": False, "speed": 0.5}
    words = (await client.post(CAPTIONED, json=body)).json()["timestamps"]
    assert [word["end_time"] for word in words] == [0.1, 0.2, 0.48]


async def test_without_times(serve: Serve, worker: FakeWorker) -> None:
    """`return_timestamps: false` asks for none, so any model will do."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE)
    client = await serve()
    for stream in (False, True):
        body = {"input": TEXT, "response_format": "pcm", "return_timestamps": False, "stream": stream}
        lines = lines_of(await client.post(CAPTIONED, json=body))
        assert b"".join(base64.b64decode(line["audio"]) for line in lines) == PCM
        assert {line["timestamps"] for line in lines} == {None}
    assert not any(speak.timestamps for speak in worker.of(Speak))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CAPTIONED, {}),
        (CAPTIONED, {"stream": False}),
        (SPEECH, {"timestamps": True}),
        (SPEECH, {"timestamps": True, "stream_format": "sse"}),
    ],
)
async def test_models_that_know_no_times(serve: Serve, worker: FakeWorker, path: str, fields: dict[str, Any]) -> None:
    """A 400 of its own code, and nothing is spoken."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE)
    client = await serve()
    answer = await client.post(path, json={"input": TEXT, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "timestamps_unavailable", "timestamps")
    assert not worker.of(Speak)


@pytest.mark.usefixtures("timed")
async def test_events_have_words(client: httpx.AsyncClient) -> None:
    """`timestamps` with server-sent events: in the deltas, and the rest in the last event; else in none of them."""
    body = {"input": TEXT, "response_format": "pcm", "stream_format": "sse"}
    answer = await client.post(SPEECH, json=body | {"timestamps": True})
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data:")]
    assert [word for event in events for word in event["timestamps"]] == TIMES
    assert events[-1]["type"] == "speech.audio.done"
    answer = await client.post(SPEECH, json=body)
    assert "timestamps" not in answer.text


async def test_bytes_have_no_place_for_words(client: httpx.AsyncClient, timed: FakeWorker) -> None:
    """The speech comes all the same, and the answer says what it has not."""
    for stream in (True, False):
        body = {"input": TEXT, "response_format": "pcm", "timestamps": True, "stream": stream}
        answer = await client.post(SPEECH, json=body)
        assert (answer.content, answer.headers["x-ignored"]) == (PCM, "timestamps")
    assert len(timed.of(Speak)) == 2


@pytest.mark.usefixtures("timed")
async def test_a_batch_has_words(client: httpx.AsyncClient) -> None:
    """Of the items that ask for them."""
    items = [{"input": TEXT, "timestamps": True}, {"input": TEXT}]
    results = (await client.post(f"{SPEECH}/batch", json={"items": items})).json()["results"]
    assert [result["timestamps"] for result in results] == [TIMES, None]


async def test_a_text_without_anything_speakable(client: httpx.AsyncClient) -> None:
    """Silence without a word."""
    answer = (await client.post(CAPTIONED, json={"input": "…", "stream": False})).json()
    assert answer["timestamps"] == []
    assert answer["audio"]


async def test_failures(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Before the first line a status; after it the transfer breaks. A client that leaves cancels its request."""
    assert (await client.post(CAPTIONED, json={"input": TEXT, "voice": "nobody"})).status_code == 400
    assert (await client.post(CAPTIONED, json={"input": " "})).status_code == 400
    assert (await client.post(CAPTIONED, content=b"{")).status_code == 400
    worker.fail_with = Failed(id="", code="queue_full", message="no")
    assert (await client.post(CAPTIONED, json={"input": TEXT})).status_code == 429
    worker.chunks, worker.break_after = 10, 2
    with pytest.raises(httpx.ReadError):
        await client.post(CAPTIONED, json={"input": TEXT, "response_format": "pcm"})
    worker.chunks, worker.break_after, worker.fail_with = 100_000, None, None
    async with client.stream("POST", CAPTIONED, json={"input": TEXT}) as answer:
        await anext(answer.aiter_bytes())
    await asyncio.to_thread(worker.wait_for, Cancel)


async def test_it_needs_a_key(serve: Serve) -> None:
    """As every request for speech."""
    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
    assert (await client.post(CAPTIONED, json={"input": TEXT})).status_code == 401
