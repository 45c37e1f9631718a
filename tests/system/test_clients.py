"""Answers as clients receive them: the unmodified OpenAI SDK, every format and speed, the right words, no delay."""

import base64
import io
import json
import time
from typing import Any

import av
import elevenlabs
import httpx
import openai
import pytest
import soundfile

from shared.pcm import SAMPLE_RATE
from tests.audio import decode
from tests.recogniser import SENTENCES, recognise
from tests.system.service import NO_TLS, Service, eventually

FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
SOME_FORMATS = ["mp3", "pcm", *(pytest.param(name, marks=pytest.mark.soak) for name in FORMATS[1:-1])]
"""For what the encoder alone decides: tests/server/audio/test_encoder.py has it for each format."""

LONG = " ".join(SENTENCES * 5)
"""Four minutes of speech."""


@pytest.fixture
def client(shared_service: Service) -> openai.OpenAI:
    """OpenAI's SDK with our address, and no other change."""
    return openai.OpenAI(base_url=f"{shared_service.url}/v1", api_key="none", max_retries=0)


def measured(data: bytes, audio_format: str) -> tuple[int, int, int]:
    """Samples, rate and channels of `data`, by libsndfile for mp3 and opus.

    libsndfile has no AAC, and it rejects the WAV and FLAC of a stream, whose headers do not know the length.
    """
    if audio_format in {"mp3", "opus"}:
        sound, rate = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
        return len(sound), rate, sound.shape[1]
    if audio_format == "pcm":
        return len(data) // 2, SAMPLE_RATE, 1
    with av.open(io.BytesIO(data), format=audio_format) as container:
        stream = container.streams.audio[0]
        return sum(frame.samples for frame in container.decode(stream)), stream.rate, stream.channels


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_sdk_gets_every_format(client: openai.OpenAI, audio_format: Any, *, streamed: bool) -> None:
    """Both calls of the SDK give 24 kHz mono of the pcm answer's length within 3 %, with the right words."""
    sentence = SENTENCES[FORMATS.index(audio_format)]
    request: dict[str, Any] = {"model": "tts-1", "voice": "alloy", "input": sentence}
    pcm = client.audio.speech.create(**request, response_format="pcm").content
    if streamed:
        with client.audio.speech.with_streaming_response.create(**request, response_format=audio_format) as answer:
            data = b"".join(answer.iter_bytes())
    else:
        body = {"stream": False}
        data = client.audio.speech.create(**request, response_format=audio_format, extra_body=body).content
    samples, rate, channels = measured(data, audio_format)
    assert (rate, channels) == (SAMPLE_RATE, 1)
    assert samples == pytest.approx(len(pcm) / 2, rel=0.03)
    assert recognise(decode(data, audio_format)) == sentence


@pytest.mark.parametrize("audio_format", SOME_FORMATS)
@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_speed_changes_the_length_and_not_the_words(shared_service: Service, audio_format: str, speed: float) -> None:
    """At half and double speed every format lasts twice and half as long, within 3 %, whole as well as streamed."""
    # Long enough that AAC's and Opus's whole frames do not show: 1,024 samples are 3 % of a second and a half.
    text = " ".join(SENTENCES[6:8])
    pcm = shared_service.speech(text, response_format="pcm").content
    for stream in (False, True):
        data = shared_service.speech(text, response_format=audio_format, speed=speed, stream=stream).content
        samples, _, _ = measured(data, audio_format)
        assert samples == pytest.approx(len(pcm) / 2 / speed, rel=0.03)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_text_is_read_as_its_format_says(shared_service: Service, *, stream: bool) -> None:
    """The words of Markdown around a pause are heard, and nothing of its marks, thoughts and code."""
    first, second = SENTENCES[:2]
    hidden = f"<think>{SENTENCES[2]}</think>\n\n```\n{SENTENCES[3]}\n```\n\n"
    text = f"{hidden}**{first}** [pause:1.5s]\n\n- [{second}](http://a.b)"
    answer = shared_service.speech(text, response_format="pcm", input_format="markdown", stream=stream)
    start = answer.content.index(bytes(72_000))
    start += start % 2  # the last byte of the speech may be zero, too
    before, after = answer.content[:start], answer.content[start + 72_000 :]
    assert [recognise(before), recognise(after)] == [first, second]


@pytest.mark.soak
def test_every_sentence_is_told_from_nineteen_others(shared_service: Service) -> None:
    """A recogniser with a closed grammar hears each of the twenty sentences."""
    said = [recognise(shared_service.speech(sentence, response_format="pcm").content) for sentence in SENTENCES]
    assert said == list(SENTENCES)


def test_sdk_exceptions_carry_our_message(client: openai.OpenAI) -> None:
    """An error arrives as the SDK's own exception with our message, param and code."""
    with pytest.raises(openai.BadRequestError, match="no voice") as caught:
        client.audio.speech.create(model="tts-1", voice="nobody", input="Hello.")
    assert (caught.value.code, caught.value.param) == ("voice_not_found", "voice")
    with pytest.raises(openai.NotFoundError, match="espeak-ng") as missing:
        client.audio.speech.create(model="no-such-model", voice="alloy", input="Hello.")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError, match=r"qwen3-tts-1\.7b-customvoice") as gone:
        client.audio.speech.create(model="qwen3-tts-1.7b-customvoice", voice="ryan", input="Hello.")
    assert (gone.value.status_code, gone.value.code) == (503, "model_unavailable")


def test_sdk_lists_models(client: openai.OpenAI) -> None:
    """The SDK's models.list and models.retrieve work, by id and by Hugging Face id with its slash."""
    assert {"espeak-ng", "qwen3-tts-1.7b-base"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("Qwen/Qwen3-TTS-12Hz-1.7B-Base").id == "qwen3-tts-1.7b-base"


@pytest.mark.parametrize("audio_format", SOME_FORMATS)
def test_first_bytes_come_before_the_end_and_decode_alone(shared_service: Service, audio_format: str) -> None:
    """The first bytes arrive while the request is still running, and they decode to audio by themselves."""
    with shared_service.stream(" ".join(SENTENCES * 3), response_format=audio_format) as answer:
        first = b""
        chunks = answer.iter_raw()
        while len(first) < 400 or not decode(first, audio_format):
            first += next(chunks)
        # The request is open until its last piece is sent.
        eventually(lambda: shared_service.open_requests() >= 1, 60, "an open request")
        assert len(decode(first, audio_format)) / 2 / SAMPLE_RATE < 2.0
        rest = first + b"".join(chunks)
    assert len(decode(rest, audio_format)) / 2 / SAMPLE_RATE > 60


def test_events_are_openais(shared_service: Service) -> None:
    """SSE: deltas whose bytes make up the format asked for, then done with the usage; `data: ` with its space."""
    with shared_service.stream(SENTENCES[3], stream_format="sse", response_format="mp3") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: {") for line in lines)
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    assert events[-1]["type"] == "speech.audio.done"
    usage = events[-1]["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert recognise(decode(sound, "mp3")) == SENTENCES[3]


def test_whole_answers_say_how_they_went(shared_service: Service) -> None:
    """A whole answer has length, finish reason and timings in its headers; a stream has the audio without them."""
    whole = shared_service.speech(SENTENCES[5], response_format="pcm", stream=False)
    streamed = shared_service.speech(SENTENCES[5], response_format="pcm")
    assert int(whole.headers["content-length"]) == len(whole.content)
    assert whole.headers["x-finish-reason"] == "stop"
    assert "first_audio;dur=" in whole.headers["server-timing"]
    assert "content-length" not in streamed.headers
    # espeak-ng adds noise: samples differ from run to run, and their number slightly.
    assert len(streamed.content) == pytest.approx(len(whole.content), rel=0.001)


def test_how_a_stream_ended(shared_service: Service) -> None:
    """Any web worker says how a request is going, or how it ended: the last audio was made, or the client left."""
    headers = {"x-request-id": "after-the-stream"}

    def outcome(name: str) -> Any:
        # The kernel hands each new connection to either web worker.
        with httpx.Client(base_url=shared_service.url, trust_env=False, verify=NO_TLS) as http:
            return http.get(f"/v1/audio/speech/{name}").json()

    body = {"input": SENTENCES[4], "response_format": "pcm"}
    said = shared_service.http.post("/v1/audio/speech", json=body, headers=headers)
    for name in ("after-the-stream", said.headers["x-speech-id"]) * 3:
        ended = outcome(name)
        assert (ended["status"], ended["finish_reason"], ended["voice"]) == ("done", "stop", "en-us+f2")
        assert ended["usage"]["input_tokens"] == len(SENTENCES[4].split())
        assert 0 < ended["timings"]["first_audio_s"] <= ended["timings"]["total_s"]
    with shared_service.stream(LONG, response_format="pcm") as answer:
        name = answer.headers["x-speech-id"]
        pieces = answer.iter_raw()
        next(pieces)
        assert outcome(name)["status"] == "speaking"
    eventually(lambda: outcome(name)["status"] == "cancelled", 60, "a cancelled request")
    assert outcome("no-such-request")["error"]["code"] == "not_found"


def test_captioned_speech_is_timed(shared_service: Service) -> None:
    """JSON lines whose audio is the speech, with each word of the input once, and none of them in the pause."""
    text = f"{SENTENCES[8]} [pause:1s] {SENTENCES[9]}"
    answer = shared_service.http.post("/dev/captioned_speech", json={"input": text, "response_format": "pcm"})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    pcm = b"".join(base64.b64decode(line["audio"]) for line in lines)
    words = [word for line in lines for word in line["timestamps"]]
    spoken = [word.strip(".,?!") for word in f"{SENTENCES[8]} {SENTENCES[9]}".split()]
    assert [word["word"] for word in words] == spoken
    first = len(SENTENCES[8].split())
    assert words[first]["start_time"] - words[first - 1]["end_time"] >= 1
    for part in (words[:first], words[first:]):
        begin, end = (round(second * SAMPLE_RATE) * 2 for second in (part[0]["start_time"], part[-1]["end_time"]))
        assert recognise(pcm[begin:end]) == SENTENCES[8 if part[0] is words[0] else 9]


def test_captions_are_the_words_of_the_input(shared_service: Service) -> None:
    """Through Markdown, respelled words and SSML, each word is the one that stands in the input."""
    body = {
        "input": "# A **query**\n\nAsk [the SQL docs](https://example.com/a/b): `x` is 42!",
        "input_format": "markdown",
        "pronunciations": {"SQL": "my sequel"},
        "stream": False,
    }
    words = shared_service.http.post("/dev/captioned_speech", json=body).json()["timestamps"]
    assert [word["word"] for word in words] == ["A", "query", "Ask", "the", "SQL", "docs", "x", "is", "42"]
    body = {"input": '<speak>Tom &amp; Ann <sub alias="Doctor Who">Dr W</sub></speak>', "stream": False}
    words = shared_service.http.post("/dev/captioned_speech", json=body).json()["timestamps"]
    names = [word["word"] for word in words]
    assert (names[0], *names[-2:]) == ("Tom", "Ann", "Dr W")


def test_elevenlabs_sdk_is_understood(shared_service: Service) -> None:
    """ElevenLabs' SDK with our address alone: a whole MP3 at its default rate, and a stream for a telephone."""
    with httpx.Client(trust_env=False) as connections:
        sdk = elevenlabs.ElevenLabs(base_url=shared_service.url, api_key="none", httpx_client=connections)
        voice = sdk.voices.get_all().voices[0].voice_id
        whole = b"".join(sdk.text_to_speech.convert(voice, text=SENTENCES[7], model_id="eleven_flash_v2_5"))
        assert measured(whole, "mp3")[1:] == (44_100, 1)
        telephone = b"".join(sdk.text_to_speech.stream(voice, text=SENTENCES[7], output_format="ulaw_8000"))
    assert recognise(decode(whole, "mp3")) == SENTENCES[7]
    assert len(telephone) / 8_000 == pytest.approx(measured(whole, "mp3")[0] / 44_100, rel=0.05)


def test_stored_audio_is_played_from_any_web_worker(shared_service: Service) -> None:
    """A player without a header of ours reads a whole MP3 in two ranges, each from whichever web worker answers."""
    said = shared_service.speech(SENTENCES[2], response_format="mp3", store=True)
    url = shared_service.url + said.headers["x-audio-url"]
    plain: dict[str, Any] = {"trust_env": False, "verify": NO_TLS}
    for _ in range(4):
        first = httpx.get(url, headers={"range": "bytes=0-1999"}, **plain)
        rest = httpx.get(url, headers={"range": "bytes=2000-", "if-range": first.headers["etag"]}, **plain)
        assert (first.status_code, rest.status_code) == (206, 206)
        data = first.content + rest.content
        assert len(data) == int(httpx.head(url, **plain).headers["content-length"])
    assert recognise(decode(data, "mp3")) == SENTENCES[2]


def test_two_web_workers_share_one_gpu_worker(shared_service: Service) -> None:
    """Both web workers answer, and both report the same GPU worker process."""
    web_pids: set[int] = set()
    workers: set[int] = set()

    def both_answered() -> bool:
        # The kernel hands each new connection to either of them.
        with httpx.Client(base_url=shared_service.url, trust_env=False, verify=NO_TLS) as http:
            answer = http.get("/admin/stats").json()
        workers.add(answer["worker"]["pid"])
        web_pids.add(answer["web_pid"])
        return len(web_pids) == 2

    eventually(both_answered, 60, "answers of both web workers")
    assert len(workers) == 1
    assert workers.isdisjoint(web_pids)


def test_stats_are_fresh(shared_service: Service) -> None:
    """/admin/stats is never older than 250 ms: the worker's uptime in it grows with the clock."""
    began = time.monotonic()
    first = shared_service.stats()["worker"]["uptime_s"]
    answered = asked = time.monotonic()
    while asked < answered + 1.5:
        asked = time.monotonic()
        later = shared_service.stats()["worker"]["uptime_s"]
        # At most 250 ms old at the request, and as much again for its way through a busy machine.
        assert asked - answered - 0.5 <= later - first <= time.monotonic() - began + 0.5
        time.sleep(0.05)  # the figures grow older meanwhile


def test_an_admin_sees_what_was_spoken(shared_service: Service) -> None:
    """Percentiles, caches of both web workers, and a stream of events that tells of a request by itself."""
    http = shared_service.http
    with http.stream("GET", "/admin/events") as answer:
        events = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
        before = next(events)["stats"]["requests"]["finished"]
        shared_service.speech("Good morning.", response_format="pcm")
        event = next(event for event in events if event["stats"]["requests"]["finished"] > before)
    assert event["problem"] is None

    def spoken() -> dict[str, Any] | None:
        models = http.get("/admin/performance").json()["models"]
        return next((model["windows"][-1] for model in models if model["id"] == "espeak-ng"), None)

    eventually(lambda: (spoken() or {}).get("streams"), 60, "figures of the speech")
    window = spoken()
    assert window is not None
    for figures in ("first_audio_s", "queue_wait_s", "real_time_factor", "batch_size"):
        assert window[figures]["count"] >= 1
        assert 0 < window[figures]["p50"] <= window[figures]["p99"] < 60
    caches = {cache["name"]: cache for cache in http.get("/admin/cache").json()["caches"]}
    assert caches.keys() >= {"recordings", "catalog", "pronunciations", "stored_audio"}
    assert caches["catalog"]["hits"] >= 1
    assert http.delete("/admin/cache/recordings").status_code == 200
