"""ElevenLabs' routes: its unmodified SDK, the names of its formats, its errors, and what it may leave out."""

import asyncio
import json
from typing import Any

import elevenlabs
import httpx
import msgspec
import pytest
import structlog
from elevenlabs.core import ApiError
from elevenlabs.errors import UnprocessableEntityError

from shared.protocol import Cancel, Failed, SavedVoice, Segment, Speak
from tests.fakes import FakeWorker, tone
from tests.server.running import SHARED_LOOP, Serve

pytestmark = SHARED_LOOP

SPEAK = "/v1/text-to-speech"
PCM = b"".join(tone("hello", 3))
LARGE = "qwen3-tts-1.7b-customvoice"


def sdk_of(client: httpx.AsyncClient, key: str = "sk-made-up") -> elevenlabs.AsyncElevenLabs:
    """The SDK with our address; its connections are those of `client`, which the fixture closes."""
    return elevenlabs.AsyncElevenLabs(base_url=str(client.base_url), api_key=key, httpx_client=client)


async def read(pieces: Any) -> bytes:
    """All of a stream."""
    return b"".join([piece async for piece in pieces])


async def test_the_sdk_converts_and_streams(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Both calls give the audio; model, language, speed and seed are resolved."""
    sdk = sdk_of(client)
    settings = elevenlabs.VoiceSettings(stability=0.3, similarity_boost=0.9, style=0.1, speed=1.0)
    options: dict[str, Any] = {"model_id": "eleven_multilingual_v2", "voice_settings": settings, "language_code": "de"}
    whole = await read(sdk.text_to_speech.convert("nova", text="hello", output_format="pcm_24000", seed=7, **options))
    streamed = await read(sdk.text_to_speech.stream("Nova", text="hello", output_format="pcm_24000", **options))
    assert whole == streamed == PCM
    first, second = worker.of(Speak)
    assert (first.model, first.language, first.voice) == ("espeak-ng", "german", second.voice)
    # espeak-ng takes no seed.
    assert first.sampling.seed is None


async def test_pauses(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A break tag is a pause: in a text of ElevenLabs, which is no SSML, as well as in SSML."""
    marked = [
        'Hello <break time="1.5s" />there.<break time=".25s"/>',
        "Hello <break time = '1500 ms'>there.[pause:250ms]",
        '<speak>Hello <break time="1.5s" />there.<break time="250ms"/></speak>',
    ]
    for text in marked:
        assert (await client.post(f"{SPEAK}/nova", json={"text": text})).status_code == 200
    pauses = [Segment(text="Hello ", pause_ms=1500), Segment(text="there.", pause_ms=250)]
    assert [speak.segments for speak in worker.of(Speak)] == [pauses] * 3
    refused = await client.post(f"{SPEAK}/nova", json={"text": 'Hello <break time="31s"/>'})
    assert "at most 30 s" in refused.text
    assert (await client.post(f"{SPEAK}/nova", json={"text": "a <break time='soon'/>"})).status_code == 200


async def test_a_seed_and_a_language_that_the_model_knows(serve: Serve, worker: FakeWorker) -> None:
    """They reach the model; a language that it does not know is left out, and the answer says so."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE)
    client = await serve()
    body = {"text": "hello", "seed": 7, "language_code": "fr"}
    answer = await client.post(f"{SPEAK}/ryan", json=body)
    assert "x-ignored" not in answer.headers
    answer = await client.post(f"{SPEAK}/ryan", json=body | {"language_code": "sw"})
    assert answer.headers["x-ignored"] == "language_code"
    first, second = worker.of(Speak)
    assert (first.sampling.seed, first.language) == (7, "french")
    assert (second.sampling.seed, second.language) == (7, "auto")


@pytest.mark.parametrize(
    ("output_format", "media_type", "rate"),
    [
        (None, "audio/mpeg", 44_100),
        ("", "audio/mpeg", 44_100),
        ("mp3_22050_32", "audio/mpeg", 22_050),
        ("MP3_44100_192", "audio/mpeg", 44_100),
        ("pcm_16000", "audio/pcm", 16_000),
        ("pcm_44100", "audio/pcm", 44_100),
        ("wav_48000", "audio/wav", 48_000),
        ("opus_48000_64", "audio/ogg", 48_000),
        ("ulaw_8000", "audio/basic", 8_000),
        ("alaw_8000", "audio/x-alaw-basic", 8_000),
    ],
)
async def test_output_formats(client: httpx.AsyncClient, output_format: str | None, media_type: str, rate: int) -> None:
    """Codec and sample rate by ElevenLabs' names."""
    params = {} if output_format is None else {"output_format": output_format}
    for path in (f"{SPEAK}/nova", f"{SPEAK}/nova/stream"):
        answer = await client.post(path, json={"text": "hello"}, params=params)
        assert answer.status_code == 200, answer.text
        assert (answer.headers["content-type"], answer.headers["x-sample-rate"]) == (media_type, str(rate))
        assert answer.headers["request-id"] == answer.headers["x-request-id"]
        assert ("content-length" in answer.headers) == (path == f"{SPEAK}/nova")


@pytest.mark.parametrize(
    "output_format",
    [
        "mp3",
        "mp3_",
        "mp3_1",
        "mp3_44100_",
        "ulaw_16000",
        "opus_44100_64",
        "flac_44100",
        "pcm_-1",
        "pcm_\u0661",
        "x" * 60,
        "pcm_24000_1_2",
    ],
)
async def test_bad_output_formats(client: httpx.AsyncClient, worker: FakeWorker, output_format: str) -> None:
    """A 422 that names the field."""
    answer = await client.post(f"{SPEAK}/nova", json={"text": "hello"}, params={"output_format": output_format})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "output_format"]
    assert not worker.of(Speak)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"text": "  "}, "text"),
        ({"text": 5}, "text"),
        ({"text": "x" * 5000}, "text"),
        ({"text": "a", "voice_settings": {"speed": 99}}, "voice_settings"),
        ({"text": "a", "voice_settings": 1}, "voice_settings"),
        ({"text": "a", "seed": -5}, "seed"),
        ({"text": "a", "seed": 2**40}, "seed"),
        ({"text": "a", "model_id": 3}, "model_id"),
    ],
    ids=str,
)
async def test_wrong_fields(client: httpx.AsyncClient, body: dict[str, Any], field: str) -> None:
    """A 422 with a list, which the SDK raises as an error of its own."""
    answer = await client.post(f"{SPEAK}/nova", json=body)
    assert answer.status_code == 422, answer.text
    [problem] = answer.json()["detail"]
    assert problem["loc"] == ["body", field]
    assert problem["msg"]


async def test_what_has_no_counterpart_is_taken(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Every other field of ElevenLabs, and fields that nobody knows."""
    body = {
        "text": "hello",
        "previous_text": "before",
        "next_text": "after",
        "previous_request_ids": ["a"],
        "pronunciation_dictionary_locators": [{"pronunciation_dictionary_id": "x", "version_id": None}],
        "apply_text_normalization": "auto",
        "use_pvc_as_ivc": False,
        "audio_effects": {},
        "voice_settings": {"stability": 1, "use_speaker_boost": True, "speed": None},
        "language_code": None,
        "seed": None,
        "model_id": "",
    }
    params = {"enable_logging": "false", "optimize_streaming_latency": "3", "output_format": "pcm_24000"}
    answer = await client.post(f"{SPEAK}/nova/stream", json=body, params=params)
    assert answer.content == PCM
    assert len(worker.of(Speak)) == 1


async def test_errors_are_the_sdks(serve: Serve, worker: FakeWorker) -> None:
    """An unknown voice or model, a wrong key, a full queue: the SDK's errors, with status and message."""
    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
    sdk = sdk_of(client, "user-1")

    async def refused(voice: str, by: elevenlabs.AsyncElevenLabs = sdk, **fields: Any) -> tuple[int | None, Any]:
        with pytest.raises(ApiError) as caught:
            await read(by.text_to_speech.convert(voice, **{"text": "hello", **fields}))
        return caught.value.status_code, caught.value.body["detail"]

    with structlog.testing.capture_logs() as logs:
        status, detail = await refused("21m00Tcm4TlvDq8ikWAM")
    assert (status, detail["status"], detail["param"]) == (404, "voice_not_found", "voice_id")
    assert [repr(line["status"]) for line in logs if line["event"] == "request_refused"] == ["404"]
    assert "21m00Tcm4TlvDq8ikWAM" in detail["message"]
    status, detail = await refused("nova", model_id="no-such-model")
    assert (status, detail["status"]) == (404, "model_not_found")
    status, detail = await refused("nova", sdk_of(client, "wrong"))
    assert (status, detail["status"]) == (401, "invalid_api_key")
    with pytest.raises(UnprocessableEntityError) as caught:
        await read(sdk.text_to_speech.convert("nova", text=" "))
    assert caught.value.body["detail"][0]["loc"] == ["body", "text"]
    with pytest.raises(ApiError) as wrong_key:
        await sdk_of(client, "wrong").models.list()
    assert wrong_key.value.body["detail"]["status"] == "invalid_api_key"
    worker.fail_with = Failed(id="", code="queue_full", message="3 wait", retry_after_s=2)
    answer = await client.post(f"{SPEAK}/nova", json={"text": "hello"}, headers={"xi-api-key": "user-2"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.json()["detail"]["message"] == "3 wait"


async def test_the_key_is_the_clients(serve: Serve, worker: FakeWorker) -> None:
    """`xi-api-key` is a key like any other: its client is the same, also on OpenAI's routes."""
    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
    await client.post(f"{SPEAK}/nova", json={"text": "hello"}, headers={"xi-api-key": "user-1"})
    await client.post(f"{SPEAK}/nova", json={"text": "hello"}, headers={"authorization": "Bearer user-1"})
    one, other = worker.of(Speak)
    assert one.client == other.client
    assert one.client.startswith("key:")
    assert (await client.get("/v1/models", headers={"xi-api-key": "user-1"})).status_code == 200
    assert (await client.get("/v1/models", headers={"xi-api-key": "user"})).status_code == 401
    assert (await client.post(f"{SPEAK}/nova", json={"text": "hello"})).status_code == 401


async def test_the_sdk_lists_voices(serve: Serve, worker: FakeWorker) -> None:
    """Every id of the list can be spoken with; one voice by its id or name; an unknown one is a 404."""
    grandma = SavedVoice(id="v1", name="Grandma", kind="clone", created_at=7, seconds=3.0, in_context=True)
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE, voices=[grandma])
    client = await serve()
    sdk = sdk_of(client)
    voices = (await sdk.voices.get_all()).voices
    categories = {voice.voice_id: voice.category for voice in voices}
    assert (categories["ryan"], categories["alloy"], categories["v1"]) == ("premade", "premade", "cloned")
    assert (await sdk.voices.search()).total_count == len(voices) == len(categories)
    assert (await sdk.voices.get("grandma")).voice_id == "v1"
    with pytest.raises(ApiError) as caught:
        await sdk.voices.get("nobody")
    assert (caught.value.status_code, caught.value.body["detail"]["status"]) == (404, "voice_not_found")
    for voice in voices:
        answer = await client.post(f"{SPEAK}/{voice.voice_id}", json={"text": "hello"})
        assert answer.status_code == 200, voice.voice_id


async def test_the_sdk_lists_models(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The models that can speak; the same path without that key header stays OpenAI's."""
    gone = [msgspec.structs.replace(model, state="unavailable") for model in worker.snapshot.models[1:]]
    worker.snapshot = msgspec.structs.replace(worker.snapshot, models=[worker.snapshot.models[0], *gone])
    models = await sdk_of(client).models.list()
    assert [model.model_id for model in models] == ["espeak-ng"]
    assert models[0].can_do_text_to_speech
    assert models[0].maximum_text_length_per_request == 4096
    assert any(language.language_id == "en" for language in models[0].languages or [])
    assert (await client.get("/v1/models")).json()["object"] == "list"


async def test_a_broken_stream_breaks(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The SDK raises in the middle of a stream; a client that leaves cancels its request."""
    worker.chunks, worker.break_after = 10, 2
    worker.fail_with = Failed(id="", code="synthesis_failed", message="broke")
    with pytest.raises(httpx.RemoteProtocolError):
        await read(sdk_of(client).text_to_speech.stream("nova", text="hello", output_format="pcm_24000"))
    worker.chunks, worker.break_after, worker.fail_with = 100_000, None, None
    async with client.stream("POST", f"{SPEAK}/nova/stream", json={"text": "hello"}) as answer:
        await anext(answer.aiter_bytes())
    await asyncio.to_thread(worker.wait_for, Cancel)


@pytest.mark.parametrize("voice", ["%2e%2e", "x" * 300, "%00", "a%20b", "nobody%2Fstream"])
async def test_hostile_voices(client: httpx.AsyncClient, worker: FakeWorker, voice: str) -> None:
    """No voice of that name: a refusal in ElevenLabs' shape, and nothing is spoken."""
    answer = await client.post(f"{SPEAK}/{voice}", json={"text": "hello"})
    assert answer.status_code in {404, 422}
    assert "detail" in answer.json()
    assert not worker.of(Speak)


async def test_a_body_that_is_no_json(client: httpx.AsyncClient) -> None:
    """A 422 as for every wrong body; a wrong method has the shape, too."""
    for content in (b"{", b"[]", b"\xff", json.dumps("x").encode()):
        answer = await client.post(f"{SPEAK}/nova", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body"]
    answer = await client.get(f"{SPEAK}/nova")
    assert (answer.status_code, answer.json()["detail"]["status"]) == (405, "method_not_allowed")
