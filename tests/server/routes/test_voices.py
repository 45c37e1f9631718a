"""Voices over a real socket: the lists that clients read, and saved voices made, used and deleted."""

import asyncio
import base64
import io
import wave
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import pytest_asyncio

from shared.protocol import Call, Cancel, CloneVoice, DeleteVoice, DesignVoice, Failed, Reply, SavedVoice, Speak
from tests.fakes import FakeWorker
from tests.server.running import SPEECH, answers, serving, until

VOICES = "/v1/audio/voices"
SAVED = SavedVoice(
    id="v1", name="Grandma", kind="clone", created_at=7, seconds=3.0, in_context=True, description="warm"
)
LARGE = "qwen3-tts-1.7b-customvoice"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A worker whose default is a model that has a Base model beside it."""
    with FakeWorker(tmp_path / "w.ipc", default_model=LARGE) as fake:
        yield fake


@pytest_asyncio.fixture
async def client(worker: FakeWorker) -> AsyncIterator[httpx.AsyncClient]:
    """A server of that worker."""
    async with serving(worker.url) as client:
        yield client


def a_recording(seconds: float = 2.0) -> bytes:
    """A WAV of a hum."""
    times = np.arange(int(24_000 * seconds)) / 24_000
    samples = (8_000 * np.sin(2 * np.pi * 220 * times)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(24_000)
        out.writeframes(samples.tobytes())
    return file.getvalue()


async def test_lists(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The default model's voices first, OpenAI's names, saved voices; narrowed, and as plain strings.

    A voice that was saved a moment ago is among them, with the Base model that it is spoken with by default.
    """
    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[SAVED])
    answer = (await client.get(VOICES)).json()
    first = answer["voices"][0]
    assert (first["id"], first["name"], first["model"], first["kind"]) == ("ryan", "Ryan", LARGE, "preset")
    kinds = {(voice["id"], voice["kind"], voice["model"]) for voice in answer["voices"]}
    assert {("alloy", "openai", LARGE), ("v1", "clone", "qwen3-tts-1.7b-base")} <= kinds
    assert answer["uploaded_voices"][0]["name"] == "Grandma"
    narrowed = (await client.get(VOICES, params={"model": "espeak"})).json()
    assert {voice["model"] for voice in narrowed["voices"]} == {"espeak-ng"}
    assert narrowed["uploaded_voices"] == []
    legacy = (await client.get(VOICES, params={"legacy": "true"})).json()
    assert "ryan" in legacy["voices"]
    assert len(set(legacy["voices"])) == len(legacy["voices"])
    assert legacy["uploaded_voices"] == ["v1"]
    by_name = (await client.get(f"{VOICES}/grandma")).json()
    assert by_name == {
        "id": "v1",
        "name": "Grandma",
        "created_at": 7,
        "type": "clone",
        "description": "warm",
        "seconds": 3.0,
        "in_context": True,
        "object": "audio.voice",
    }


async def test_lists_while_the_worker_is_away(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Its last word is better than none."""
    before = (await client.get(VOICES)).json()
    worker.stop()
    await until(lambda: answers(client, "/ready", 503))
    assert (await client.get(VOICES)).json() == before
    assert (await client.get("/v1/models")).status_code == 200


async def test_one_voice(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Every voice of the list can be looked at by its id; OpenAI's and preset ones without a question to the worker."""
    listed = (await client.get(VOICES)).json()["voices"]
    for voice in {voice["id"]: voice for voice in reversed(listed)}.values():
        assert (await client.get(f"{VOICES}/{voice['id'].replace('+', '%2B')}")).json() == voice
    assert (await client.get(f"{VOICES}/RYAN")).json()["model"] == LARGE
    assert not worker.of(Call)
    assert (await client.get(f"{VOICES}/nobody")).status_code == 404


async def test_a_client_that_leaves_is_not_worked_for(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Who leaves while a voice is made, or a model is loaded, has the worker told so."""
    worker.on_call = lambda call, _payload: Failed(id="someone else", code="x", message=call.id)
    form = {"name": (None, "Ada"), "type": (None, "prompt"), "prompt": (None, "an old sailor")}
    for number, asked in enumerate((client.post(VOICES, files=form), client.post(f"/admin/models/{LARGE}/load")), 1):
        asking = asyncio.create_task(asked)
        await asyncio.to_thread(worker.wait_for, Call, number)
        asking.cancel()
        cancels = await asyncio.to_thread(worker.wait_for, Cancel, number)
        assert cancels[-1].id == worker.of(Call)[-1].id


async def test_a_clone_is_made_of_pcm(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The worker gets 24 kHz PCM and the transcript; the client gets OpenAI's answer."""
    worker.on_call = lambda call, _payload: Reply(id=call.id, voice=SAVED)
    form = {"name": " Grandma ", "ref_text": "hello there", "consent": "she agreed", "description": "warm"}
    answer = await client.post(VOICES, data=form, files={"audio_sample": ("g.wav", a_recording(), "audio/wav")})
    assert answer.status_code == 200, answer.text
    voice = answer.json()
    assert (voice["object"], voice["id"], voice["name"], voice["created_at"]) == ("audio.voice", "v1", "Grandma", 7)
    [call] = worker.of(Call)
    wanted = CloneVoice(name="Grandma", text="hello there", description="warm", consent="she agreed")
    assert call.action == wanted
    [payload] = [payload for payload in worker.payloads if payload is not None]
    assert abs(len(payload) - 2 * 48_000) <= 480


async def test_a_voice_is_designed(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """type=prompt needs no recording."""
    worker.on_call = lambda call, _payload: Reply(id=call.id, voice=SAVED)
    form = {"type": (None, "prompt"), "name": (None, "Pirate"), "prompt": (None, "a gruff old pirate")}
    answer = await client.post(VOICES, files=form)
    assert answer.status_code == 200, answer.text
    assert worker.of(Call)[0].action == DesignVoice(name="Pirate", prompt="a gruff old pirate")


async def test_the_workers_refusal_is_told(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """What the worker does not want is the client's to know."""
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="invalid_value", message="taken", param="name")
    answer = await client.post(VOICES, data={"name": "x"}, files={"audio_sample": a_recording()})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "taken"


async def test_limits_of_a_recording(client: httpx.AsyncClient) -> None:
    """Too short and too large are told apart."""
    short = await client.post(VOICES, data={"name": "x"}, files={"audio_sample": a_recording(0.2)})
    assert (short.status_code, short.json()["error"]["code"]) == (400, "invalid_audio")
    large = await client.post(VOICES, data={"name": "x"}, files={"audio_sample": b"x" * (10 * 2**20 + 1)})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_voice_made_a_moment_ago_is_spoken_with(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A voice that the snapshot does not hold yet is asked for, and goes to the Base model as saved."""
    worker.saved.append(SAVED)
    answer = await client.post(SPEECH, json={"input": "hi", "voice": "Grandma"})
    assert answer.status_code == 200, answer.text
    [speak] = worker.of(Speak)
    assert (speak.model, speak.task, speak.voice, speak.saved_voice) == ("qwen3-tts-1.7b-base", "Base", "v1", True)


async def test_a_recording_in_the_request(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """ref_audio reaches the worker as PCM, its transcript beside it, and chooses the Base model."""
    encoded = "data:audio/wav;base64," + base64.b64encode(a_recording()).decode()
    answer = await client.post(SPEECH, json={"input": "hi", "ref_audio": encoded, "ref_text": "la"})
    assert answer.status_code == 200, answer.text
    [speak] = worker.of(Speak)
    assert (speak.model, speak.task, speak.reference_text) == ("qwen3-tts-1.7b-base", "Base", "la")
    assert [len(payload) for payload in worker.payloads if payload is not None] == [96_000]


async def test_delete(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The voice is found by name, too, and deleted by its id."""
    worker.saved.append(SAVED)
    find = worker.on_call
    worker.on_call = lambda call, payload: (
        Reply(id=call.id) if isinstance(call.action, DeleteVoice) else find(call, payload)
    )
    answer = await client.delete(f"{VOICES}/Grandma")
    assert answer.json() == {"id": "v1", "object": "audio.voice.deleted", "deleted": True}
    assert worker.of(Call)[-1].action == DeleteVoice(id="v1")


async def test_a_voice_that_is_gone_is_gone_at_once(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """What was deleted a moment ago, here or elsewhere, is a 404 for whoever looks at it or deletes it again."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[SAVED])
    assert (await client.get(f"{VOICES}/v1")).status_code == 200
    # Deleted by somebody else between the look for it and the deletion.
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="voice_not_found", message="gone", param="voice")
    answer = await client.delete(f"{VOICES}/v1")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "voice_id")
    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[])
    assert (await client.get(f"{VOICES}/v1")).status_code == 404
    assert (await client.delete(f"{VOICES}/v1")).status_code == 404


async def test_a_name_may_hold_a_slash(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A voice that can be saved under a name is found and deleted by it, however the slash is written."""
    named = msgspec.structs.replace(SAVED, name="AC/DC")
    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[named])
    worker.on_call = lambda call, _payload: Reply(id=call.id)
    for path in ("AC/DC", "ac%2Fdc"):
        assert (await client.get(f"{VOICES}/{path}")).json()["name"] == "AC/DC"
        assert (await client.delete(f"{VOICES}/{path}")).json()["id"] == "v1"
