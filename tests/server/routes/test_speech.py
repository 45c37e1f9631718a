"""POST /v1/audio/speech: the fields of a request reach the GPU worker, and saved voices are found."""

import base64

import msgspec

from shared.protocol import SavedVoice, Speak
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
    assert (speak.text, speak.voice, speak.instructions, speak.language) == ("hi", "ryan", "softly", "english")
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
