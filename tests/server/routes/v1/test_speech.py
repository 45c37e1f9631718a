"""POST /v1/audio/speech: the fields of a request reach the GPU worker, and saved voices are found."""

import base64
import re
from pathlib import Path

import httpx
import msgspec
import pytest

from shared.protocol import Failed, SavedVoice, Segment, Speak
from tests.audio import tone, wav
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, Serve

pytestmark = SHARED_LOOP

LARGE = "qwen3-tts-1.7b-customvoice"
GRANDMA = SavedVoice(id="v1", name="Grandma", kind="clone", created_at=7, seconds=3.0, in_context=True)


async def test_resolved_fields_reach_the_worker(serve: Serve, worker: FakeWorker) -> None:
    """Names are resolved, defaults filled in, and the client's address is its fairness key."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE)
    client = await serve()
    body = {"text": "hi", "speaker": "ALLOY", "instruct": "softly", "language": "en-GB", "seed": 7, "keep_alive": "5m"}
    answer = await client.post(SPEECH, json={"model": "tts-1-hd", "nonsense": {"a": 1}, **body})
    assert answer.status_code == 200
    [speak] = worker.of(Speak)
    assert speak.segments == [Segment(text="hi")]
    assert (speak.voice, speak.instructions, speak.language) == ("ryan", "softly", "english")
    assert (speak.model, speak.task, speak.sampling.seed) == (LARGE, "CustomVoice", 7)
    assert (speak.keep_alive_s, speak.client) == (300.0, "peer:127.0.0.1")


async def test_a_voice_saved_a_moment_ago(serve: Serve, worker: FakeWorker) -> None:
    """If the snapshot lacks a saved voice, the worker is asked for it; the Base model speaks with it."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE)
    worker.saved.append(GRANDMA)
    client = await serve()
    answer = await client.post(SPEECH, json={"input": "hi", "voice": "Grandma"})
    assert answer.status_code == 200, answer.text
    [speak] = worker.of(Speak)
    assert (speak.model, speak.task, speak.voice, speak.saved_voice) == ("qwen3-tts-1.7b-base", "Base", "v1", True)


async def test_a_recording_in_the_request(serve: Serve, worker: FakeWorker) -> None:
    """ref_audio reaches the worker as PCM with its transcript; the Base model speaks."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE)
    client = await serve()
    recording = "data:audio/wav;base64," + base64.b64encode(wav(tone(2.0, fade_s=0))).decode()
    answer = await client.post(SPEECH, json={"input": "hi", "ref_audio": recording, "ref_text": "la"})
    assert answer.status_code == 200, answer.text
    [speak] = worker.of(Speak)
    assert (speak.model, speak.task, speak.reference_text) == ("qwen3-tts-1.7b-base", "Base", "la")
    assert [len(payload) for payload in worker.payloads if payload is not None] == [96_000]


@pytest.mark.parametrize(
    ("body", "media_type", "rate", "size"),
    [
        ({"response_format": "mp3", "sample_rate": 48000}, "audio/mpeg", 48_000, None),
        ({"response_format": "pcm", "sample_rate": 8000}, "audio/pcm", 8_000, 2 * 1_920),
        ({"response_format": "pcm", "sample_rate": 44100}, "audio/pcm", 44_100, 2 * 10_584),
        ({"response_format": "wav", "sample_rate": 16000}, "audio/wav", 16_000, 44 + 2 * 3_840),
        ({"response_format": "mp3", "sample_rate": 0}, "audio/mpeg", 24_000, None),
        ({"response_format": "pcm", "sample_rate": None}, "audio/pcm", 24_000, 2 * 5_760),
        ({"response_format": "ulaw"}, "audio/basic", 8_000, 1_920),
        ({"response_format": "alaw", "sample_rate": 8000}, "audio/x-alaw-basic", 8_000, 1_920),
        ({"response_format": " WAV ", "sample_rate": "16000"}, "audio/wav", 16_000, 44 + 2 * 3_840),
        ({"response_format": "ogg", "sample_rate": 12000}, "audio/ogg", 12_000, None),
        ({"response_format": "pcm", "sample_rate": 16000, "speed": 2.0}, "audio/pcm", 16_000, 2 * 1_920),
    ],
)
async def test_sample_rates(
    client: httpx.AsyncClient, body: dict[str, object], media_type: str, rate: int, size: int | None
) -> None:
    """The sound has the rate that was asked for, streamed, whole and as events, and x-sample-rate tells it."""
    streamed = await client.post(SPEECH, json={"input": "hi", **body})
    whole = await client.post(SPEECH, json={"input": "hi", "stream": False, **body})
    for answer in (streamed, whole):
        assert (answer.status_code, answer.headers["x-sample-rate"]) == (200, str(rate))
        assert answer.headers["content-type"] == media_type
        assert size is None or len(answer.content.partition(b"LIST")[0]) == size  # tags follow the sound of a whole wav
    events = await client.post(SPEECH, json={"input": "hi", "stream_format": "sse", **body})
    assert events.headers["x-sample-rate"] == str(rate)
    pieces = re.findall(r'"audio":"([^"]*)"', events.text)
    assert b"".join(map(base64.b64decode, pieces))[:4] == streamed.content[:4]
    if body["response_format"] == "pcm":
        assert streamed.content == whole.content


@pytest.mark.parametrize(
    ("response_format", "rate", "known"),
    [
        ("opus", 44_100, "8000, 12000, 16000, 24000, 48000."),
        ("ulaw", 16_000, "8000."),
        ("mp3", 96_000, "8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000."),
        ("pcm", -1, "8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000."),
    ],
)
async def test_other_sample_rates_are_refused(
    client: httpx.AsyncClient, worker: FakeWorker, response_format: str, rate: int, known: str
) -> None:
    """The refusal lists the rates of the format, and the worker hears nothing of the request."""
    answer = await client.post(SPEECH, json={"input": "hi", "response_format": response_format, "sample_rate": rate})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "sample_rate")
    assert error["message"].endswith(known)
    assert not worker.of(Speak)


async def test_the_input_is_read_in_its_format(serve: Serve, worker: FakeWorker, tmp_path: Path) -> None:
    """A request's format and pronunciations count before those of the settings; the worker gets what is spoken."""
    path = tmp_path / "words.toml"
    path.write_text('[en]\nnginx = "engine X"\n[de]\nnginx = "Engin X"\n[all]\nredis = "reddis"\n', encoding="utf-8")
    client = await serve(input_format="markdown", pronunciations=path)
    bodies: list[dict[str, object]] = [
        {"input": "**nginx** and `Redis`"},
        {"input": "**nginx**", "input_format": " TEXT ", "language": "de"},
        {"input": "nginx", "pronunciations": {"NGINX": "en jinx"}},
        {"input": "<speak>a<break time='1s'/><prosody rate='2'>b</prosody></speak>", "input_format": "auto"},
    ]
    for body in bodies:
        assert (await client.post(SPEECH, json=body)).status_code == 200
    assert [speak.segments for speak in worker.of(Speak)] == [
        [Segment(text="engine X and reddis")],
        [Segment(text="**Engin X**")],
        [Segment(text="en jinx")],
        [Segment(text="a", pause_ms=1000), Segment(text="b", rate=2.0)],
    ]


async def test_wrong_formats_and_pronunciations(serve: Serve, worker: FakeWorker) -> None:
    """Each is a 400 that names the field."""
    client = await serve()
    bodies: dict[str, list[dict[str, object]]] = {
        "input": [{"input_format": "ssml"}, {"input": "<speak>a"}, {"input": "hi[pause:31s]"}],
        "input_format": [{"input_format": "html"}, {"input_format": 1}],
        "pronunciations": [
            {"pronunciations": value}
            for value in (
                ["a"],
                {"": "b"},
                {"a": 1},
                {"a" * 101: "b"},
                {"a": "b" * 201},
                {str(n): "b" for n in range(201)},
            )
        ],
    }
    for field, wrong in bodies.items():
        for body in wrong:
            answer = await client.post(SPEECH, json={"input": "hi", **body})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), body
    assert "200 entries" in answer.json()["error"]["message"]
    assert (
        await client.post(SPEECH, json={"input": "hi", "pronunciations": {}, "input_format": ""})
    ).status_code == 200
    assert worker.of(Speak)[-1].segments == [Segment(text="hi")]


async def test_a_deadline(serve: Serve, worker: FakeWorker) -> None:
    """The GPU worker learns it in seconds; if it fails the request for it, the client reads a 504."""
    client = await serve()
    answer = await client.post(SPEECH, json={"input": "x"}, headers={"x-deadline-ms": "800"})
    assert answer.status_code == 200
    assert [speak.deadline_s for speak in worker.of(Speak)] == [0.8]
    worker.fail_with = Failed(id="", code="deadline_exceeded", message="no audio could be made within 0.8 s")
    answer = await client.post(SPEECH, json={"input": "x"}, headers={"x-deadline-ms": "800"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "soon", "100000000", "٣"])
async def test_wrong_deadlines(serve: Serve, worker: FakeWorker, value: str) -> None:
    """A header that is no number of milliseconds is refused, and named."""
    client = await serve()
    answer = await client.post(SPEECH, json={"input": "x"}, headers={"x-deadline-ms": value.encode()})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-deadline-ms")
    assert not worker.of(Speak)
