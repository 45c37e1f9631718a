"""Qwen3-TTS over HTTP, with small random checkpoints: every task, exact frames, many requests at once, refusals."""

import base64
import contextlib
import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
import soundfile
from websockets.sync.client import connect

from gpu_worker.voices import VoiceFiles, VoiceRecord
from shared.pcm import FRAME_SAMPLES, SAMPLE_RATE
from tests.audio import decode
from tests.checkpoints import tiny
from tests.system.service import Service, eventually, running_service, soon

CUSTOM_SMALL: Final = "qwen3-tts-0.6b-customvoice"
CUSTOM: Final = "qwen3-tts-1.7b-customvoice"
DESIGN: Final = "qwen3-tts-1.7b-voicedesign"
BASE: Final = "qwen3-tts-1.7b-base"
FRAME_BYTES: Final = FRAME_SAMPLES * 2
SLOTS: Final = 4
"""With eight, the default, each load would take twice as long."""


@pytest.fixture(scope="module")
def voices_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a voice as a GPU worker leaves it at its end."""
    directory = tmp_path_factory.mktemp("saved")
    pcm = soundfile.read(io.BytesIO(BERTA), dtype="int16")[0].astype("<i2").tobytes()
    record = VoiceRecord(id="voice_berta", name="Berta", kind="clone", created_at=1, samples=len(pcm) // 2)
    VoiceFiles(directory).save(record, pcm)
    return directory


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, voices_dir: Path) -> Iterator[Service]:
    """A service whose Qwen3-TTS models are small random checkpoints, with four slots each. Its end is quiet."""
    paths = {
        CUSTOM_SMALL: tiny("custom_voice", "0b6"),
        CUSTOM: tiny("custom_voice", "1b7"),
        DESIGN: tiny("voice_design", "1b7"),
        BASE: tiny("base", "1b7"),
    }
    settings = {
        "MODEL_PATHS": ",".join(f"{model}={path.resolve()}" for model, path in paths.items()),
        "DEFAULT_MODEL": CUSTOM,
        "MAX_CONCURRENCY": SLOTS,
        "WEB_WORKERS": 2,
        "VOICES_DIR": voices_dir,
    }
    with running_service(tmp_path_factory.mktemp("qwen"), **settings) as service:
        yield service
    log = service.log.read_text()
    assert "leaked" not in log
    assert "function_not_traced" not in log


def recording(seconds: float, *, rate: int = SAMPLE_RATE, silent: bool = False, audio_format: str = "WAV") -> bytes:
    """A voice-like sound: a buzz whose loudness goes up and down."""
    time = np.arange(round(seconds * rate)) / rate
    sound = 0.3 * np.sign(np.sin(2 * np.pi * 140 * time)) * np.abs(np.sin(2 * np.pi * 3 * time))
    file = io.BytesIO()
    soundfile.write(file, sound * (not silent), rate, format=audio_format)
    return file.getvalue()


BERTA: Final = recording(2.0, audio_format="FLAC")
"""The recording of a voice that was saved before the service began."""


def data_url(data: bytes, kind: str = "audio/wav") -> str:
    """`data` as a data URL, the form in which clients send audio in JSON."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def speak(service: Service, **fields: Any) -> httpx.Response:
    """POST /v1/audio/speech; `fields` replace the defaults: pcm, a seed and few frames."""
    defaults: dict[str, Any] = {"input": "Good morning.", "response_format": "pcm", "seed": 7, "max_new_tokens": 12}
    return service.http.post("/v1/audio/speech", json=defaults | fields)


TASKS: Final[dict[str, dict[str, Any]]] = {
    "custom": {"model": CUSTOM, "voice": "Vivian"},
    "custom, instructed": {"model": CUSTOM, "voice": "ryan", "instructions": "Whisper."},
    "custom, small": {"model": CUSTOM_SMALL, "voice": "alloy"},
    "custom, whole text first": {"model": CUSTOM, "voice": "sohee", "non_streaming_mode": True},
    "dialect": {"model": CUSTOM, "voice": "dylan", "language": "zh", "input": "你好。"},
    "design": {"model": DESIGN, "instructions": "An old sea captain."},
    "design by task": {"task_type": "VoiceDesign", "instructions": "An old sea captain."},
    "clone in context": {"ref_audio": data_url(recording(2.0)), "ref_text": "Buzz."},
    "clone from embedding": {"model": BASE, "ref_audio": data_url(recording(2.0)), "x_vector_only_mode": True},
}


@pytest.mark.parametrize("fields", TASKS.values(), ids=TASKS)
def test_every_task_streams_its_whole_answer(service: Service, fields: dict[str, Any]) -> None:
    """For each task the stream equals the whole answer, sample for sample, in frames of 1,920 samples."""
    whole = speak(service, **fields, stream=False)
    assert whole.status_code == httpx.codes.OK, whole.text
    assert len(whole.content) % FRAME_BYTES == 0
    assert 1 <= len(whole.content) // FRAME_BYTES <= 12
    assert speak(service, **fields).content == whole.content


@pytest.mark.parametrize(("sample_rate", "speed"), [(8_000, 1.0), (44_100, 1.3)])
def test_a_stream_equals_its_whole_answer_at_any_rate(service: Service, sample_rate: int, speed: float) -> None:
    """Resampled, faster and with a pause, every sample is the same, and the pause is in it."""
    fields = {"input": "Good [pause:300ms] morning.", "sample_rate": sample_rate, "speed": speed}
    whole = speak(service, **fields, stream=False)
    assert whole.headers["x-sample-rate"] == str(sample_rate)
    assert len(whole.content) > 2 * 0.3 * sample_rate
    assert speak(service, **fields).content == whole.content


@pytest.mark.parametrize(
    "audio_format", ["mp3", *(pytest.param(name, marks=pytest.mark.soak) for name in ("opus", "aac", "flac", "wav"))]
)
def test_every_format(service: Service, audio_format: str) -> None:
    """Every format gives as much audio as pcm. The encoder knows no engine, and test_clients.py hears each format."""
    pcm = speak(service, max_new_tokens=30).content
    data = speak(service, max_new_tokens=30, response_format=audio_format).content
    # AAC and MP3 have frames of up to 1,152 samples, and only whole ones.
    assert len(decode(data, audio_format)) == pytest.approx(len(pcm), abs=2 * 2 * 1152)


def test_max_new_tokens_is_exact(service: Service) -> None:
    """`max_new_tokens` limits the number of frames exactly, and the finish reason is `length`."""
    for frames in (1, 2, 5, 9):
        answer = speak(service, max_new_tokens=frames, stream=False)
        assert len(answer.content) == frames * FRAME_BYTES
        assert answer.headers["x-finish-reason"] == "length"


def test_pauses_are_exact(service: Service) -> None:
    """Streamed and whole answers are the same bytes: the words as without pauses, and silence exact to a sample.

    It comes on top of the 150 ms between sentences. The same in SSML is the same speech.
    """
    fields = {"model": CUSTOM, "voice": "vivian", "max_new_tokens": None}
    alone = speak(service, **fields).content
    text = "[pause:80ms]Good morning.[pause:1.5s] Good evening.[pause:20ms]"
    ssml = "<speak><break time='80ms'/>Good morning.<break time='1.5s'/> Good evening.<break time='20ms'/></speak>"
    whole = speak(service, input=text, stream=False, **fields)
    assert whole.headers["x-finish-reason"] == "stop"
    assert whole.content == speak(service, input=text, **fields).content == speak(service, input=ssml, **fields).content
    assert whole.content.startswith(bytes(FRAME_BYTES) + alone + bytes(7_200 + 72_000))
    assert whole.content.endswith(bytes(960))
    assert (len(whole.content) - 7_200 - 72_000 - 960) % FRAME_BYTES == 0


def test_first_chunk_is_one_frame_and_does_not_wait_for_the_text(service: Service) -> None:
    """The first chunk of a stream is a single frame, and it arrives long before a long text is finished."""
    text = "This is a sentence. " * 60
    with service.stream(text, response_format="pcm", seed=1) as answer:
        chunks = answer.iter_raw()
        assert len(next(chunks)) == FRAME_BYTES
        eventually(lambda: service.running() == 1, 60, "a running request")
    soon(lambda: service.running() == 0, 0.5, "the slot freed")


GROWING: Final = (
    "The clock struck 12:30, said Ann\u2019s caf\u00e9 \u2026 \u4f60\u597d\uff0c\u4e16\u754c! \U0001f642 Well."
)
"""A text whose tokens depend on what follows: quotes, digits, accents, an emoji, and a script without spaces."""


@pytest.mark.parametrize(
    "fields",
    [
        {"model": CUSTOM, "voice": "ryan", "instructions": "Calmly.", "language": "english"},
        {"model": BASE, "ref_audio": data_url(recording(1.5)), "ref_text": "Well."},
    ],
    ids=["preset", "clone"],
)
def test_a_growing_text_equals_the_whole(service: Service, fields: dict[str, Any]) -> None:
    """Byte for byte, however it is cut: the whole text in the streaming layout, with the same seed."""
    for seed in range(30):  # some random speech ends at once
        body = fields | {"seed": seed, "max_new_tokens": 25}
        whole = speak(service, input=GROWING, non_streaming_mode=False, **body).content
        if len(whole) > 20 * FRAME_BYTES:
            break
    assert len(whole) > 20 * FRAME_BYTES
    config = {"type": "session.config", "response_format": "pcm", **body}
    with connect(f"ws://127.0.0.1:{service.port}/v1/audio/speech/stream", proxy=None, max_size=None) as socket:
        socket.send(json.dumps(config))
        for pieces in (re.findall(r"\S+\s*", GROWING), list(GROWING)):
            for message in (*({"type": "input.text", "text": piece} for piece in pieces), {"type": "input.done"}):
                socket.send(json.dumps(message))
            heard = b""
            while isinstance(message := socket.recv(60), bytes) or json.loads(message)["type"] != "session.done":
                heard += message if isinstance(message, bytes) else b""
            assert heard == whole, len(pieces)


def test_seed_decides_and_greedy_needs_none(service: Service) -> None:
    """The same seed gives the same speech, another seed another one; greedy decoding is the same without any."""
    assert speak(service, seed=1).content == speak(service, seed=1).content
    assert speak(service, seed=1).content != speak(service, seed=2).content
    assert speak(service, seed=None).content != speak(service, seed=None).content
    greedy = [speak(service, seed=None, temperature=0).content for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_sixteen_clients_on_four_slots(service: Service) -> None:
    """16 clients at once get exactly the audio that each gets alone, by its seed."""
    requests = [
        {
            "input": f"Client number {number} speaks.",
            "seed": number,
            "max_new_tokens": 4 + number % 13,
            "voice": ("vivian", "ryan", "serena")[number % 3],
        }
        for number in range(16)
    ]
    alone = [speak(service, **request).content for request in requests]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda request: speak(service, **request), requests))
    assert [answer.status_code for answer in together] == [200] * 16
    assert [answer.content for answer in together] == alone


@pytest.mark.soak
def test_no_voice_leaks_into_another(service: Service) -> None:
    """20 clones of 20 recordings get alone the samples that they get among 30 others: each has its own voice."""
    spoken = {"model": BASE, "max_new_tokens": 12, "ref_text": "Buzz."}
    clones = [
        {**spoken, "ref_audio": data_url(recording(1.5 + number / 10)), "seed": number, "input": f"Clone {number}."}
        for number in range(20)
    ]
    others = [
        {"model": CUSTOM, "voice": ("vivian", "ryan", "serena")[number % 3], "input": "Others. " * (1 + number % 4)}
        for number in range(30)
    ]
    alone = [speak(service, **clone).content for clone in clones]
    crowd = [request for pair in zip(clones, others, strict=False) for request in pair] + others[len(clones) :]
    with ThreadPoolExecutor(len(crowd)) as pool:
        together = list(pool.map(lambda request: speak(service, **request), crowd))
    assert [answer.status_code for answer in together] == [200] * 50
    assert [answer.content for answer in together[: 2 * len(clones) : 2]] == alone
    assert len(set(alone)) == len(clones)


def test_clients_that_leave_free_their_slots(service: Service) -> None:
    """All slots are taken: others get theirs all the same, and exact audio; clients that disconnect leave nothing."""
    expected = speak(service, seed=3).content
    long_text = "This goes on and on. " * 100
    with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as listeners:
        for _ in range(SLOTS):
            listeners.enter_context(service.stream(long_text, response_format="pcm"))
        eventually(lambda: service.running() == SLOTS, 60, "every slot taken")
        others = [pool.submit(speak, service, seed=3) for _ in range(4)]
        assert [answer.result(60).content for answer in others] == [expected] * 4
    soon(lambda: service.open_requests() == 0, 1, "no requests")


REFUSED: Final[dict[str, tuple[dict[str, Any], int, str, str | None]]] = {
    "another model's voice": ({"model": CUSTOM, "voice": "en-us+f2"}, 400, "voice_not_found", "voice"),
    "instructions on 0.6B": (
        {"model": CUSTOM_SMALL, "instructions": "Whisper."},
        400,
        "invalid_value",
        "instructions",
    ),
    "in context without words": ({"ref_audio": data_url(recording(2.0))}, 400, "invalid_value", "ref_text"),
    "0.2 s": ({"ref_audio": data_url(recording(0.2)), "ref_text": "b"}, 400, "invalid_audio", "ref_audio"),
    "10 min": (
        {"ref_audio": data_url(recording(600.0, rate=8_000, audio_format="FLAC")), "ref_text": "b"},
        400,
        "invalid_audio",
        "ref_audio",
    ),
    "silence": (
        {"ref_audio": data_url(recording(2.0, silent=True)), "ref_text": "b"},
        400,
        "invalid_audio",
        "ref_audio",
    ),
    "truncated": ({"ref_audio": data_url(recording(2.0)[:60]), "ref_text": "b"}, 400, "invalid_audio", "ref_audio"),
    "no audio": ({"ref_audio": data_url(b"hello" * 99), "ref_text": "b"}, 400, "invalid_audio", "ref_audio"),
    "no base64": ({"ref_audio": "data:audio/wav;base64,%%%", "ref_text": "b"}, 400, "invalid_audio", "ref_audio"),
    "a URL": ({"ref_audio": "http://127.0.0.1/a.wav", "ref_text": "b"}, 400, "invalid_value", "ref_audio"),
    "control characters": ({"input": "\x01\x02\u200b"}, 400, "invalid_value", "input"),
    "a language it lacks": ({"language": "Klingon"}, 400, "invalid_value", "language"),
    "a task it lacks": ({"model": CUSTOM, "task_type": "Base"}, 400, "task_mismatch", "task_type"),
    "a reference it cannot use": (
        {"model": CUSTOM, "ref_audio": data_url(recording(2.0)), "ref_text": "b"},
        400,
        "task_mismatch",
        "ref_audio",
    ),
    "a design without words": ({"model": DESIGN}, 400, "invalid_value", "instructions"),
    "no recording": ({"model": BASE}, 400, "invalid_value", "ref_audio"),
}


@pytest.mark.parametrize(("fields", "status", "code", "param"), REFUSED.values(), ids=REFUSED)
def test_invalid_requests_are_refused(
    service: Service, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    """An invalid request gets its status, code and field; a valid one right after it succeeds."""
    answer = speak(service, **fields)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert speak(service, max_new_tokens=1).status_code == httpx.codes.OK


def test_saved_voices(service: Service) -> None:
    """A voice saved through one web worker is usable through every one at once, until it is deleted."""
    upload = {"audio_sample": ("a.wav", recording(2.0), "audio/wav")}
    made = service.http.post("/v1/audio/voices", data={"name": "Anna", "ref_text": "Buzz."}, files=upload)
    assert made.status_code == httpx.codes.OK, made.text
    assert (made.json()["object"], made.json()["name"]) == ("audio.voice", "Anna")
    voice_id = made.json()["id"]
    inline = speak(service, ref_audio=data_url(recording(2.0)), ref_text="Buzz.").content
    for name in ("Anna", "anna", voice_id, {"id": voice_id}):
        # The kernel hands each new connection to either web worker.
        with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as http:
            body = {"input": "Good morning.", "voice": name, "response_format": "pcm", "seed": 7, "max_new_tokens": 12}
            assert http.post("/v1/audio/speech", json=body).content == inline
    listed = service.http.get("/v1/audio/voices").json()
    assert voice_id in {voice["id"] for voice in listed["uploaded_voices"]}
    assert speak(service, model=CUSTOM, voice="Anna").json()["error"]["code"] == "task_mismatch"
    gone = service.http.delete(f"/v1/audio/voices/{voice_id}")
    assert gone.json() == {"id": voice_id, "object": "audio.voice.deleted", "deleted": True}
    refused = speak(service, voice="Anna")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "voice_not_found")


def test_designed_voice(service: Service) -> None:
    """A voice designed from a prompt is saved, and gives the same audio with the same seed."""
    body = {"type": "prompt", "name": "Captain", "prompt": "An old sea captain."}
    # One time in ten random weights say too little for a voice, or do not end; the server then refuses to save it.
    for _ in range(9):
        made = service.http.post("/v1/audio/voices", files={name: (None, value) for name, value in body.items()})
        if made.is_success:
            break
    assert made.status_code == httpx.codes.OK, made.text
    spoken = [speak(service, voice="captain").content for _ in range(2)]
    assert spoken[0] == spoken[1]
    assert len(spoken[0]) % FRAME_BYTES == 0


def test_saved_voices_survive_a_restart(service: Service) -> None:
    """A voice that was saved before the service began speaks as its recording does."""
    recorded = {"ref_audio": data_url(BERTA, "audio/flac"), "x_vector_only_mode": True}
    inline = speak(service, model=BASE, **recorded).content
    assert inline
    assert speak(service, model=BASE, voice="Berta").content == inline
