"""/v1/audio/voices: the lists, and the making and deleting of saved voices."""

import asyncio
from pathlib import Path

import httpx
import msgspec
import pytest

from server.resolution import resolve
from server.schemas import SpeechRequest
from shared.protocol import Call, Cancel, CloneVoice, DeleteVoice, DesignVoice, Failed, Reply, SavedVoice
from tests.audio import tone, wav
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, VOICES, responds, serving, until

pytestmark = SHARED_LOOP

SAVED = SavedVoice(
    id="v1", name="Grandma", kind="clone", created_at=7, seconds=3.0, in_context=True, description="warm"
)
LARGE = "qwen3-tts-1.7b-customvoice"


@pytest.fixture
def worker(worker: FakeWorker) -> FakeWorker:
    """A worker whose default model has a Base model in its family."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE)
    return worker


def a_recording(seconds: float = 2.0) -> bytes:
    """A WAV file of a tone."""
    return wav(tone(seconds, fade_s=0))


def _with(worker: FakeWorker, default: str, *, unavailable: str = "-") -> None:
    """Save a voice, set the default model, and let the models whose id ends with `unavailable` be so."""
    models = [
        msgspec.structs.replace(model, state="unavailable") if model.id.endswith(unavailable) else model
        for model in worker.snapshot.models
    ]
    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[SAVED], default_model=default, models=models)


async def test_lists(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The default model's voices first, then OpenAI's names and saved voices; of one model, and as plain strings.

    A saved voice names the Base model that speaks with it by default.
    """
    _with(worker, LARGE)
    answer = (await client.get(VOICES)).json()
    first = answer["voices"][0]
    assert (first["id"], first["name"], first["model"], first["kind"]) == ("ryan", "Ryan", LARGE, "preset")
    kinds = {(voice["id"], voice["kind"], voice["model"]) for voice in answer["voices"]}
    assert {("alloy", "openai", LARGE), ("v1", "clone", "qwen3-tts-1.7b-base")} <= kinds
    uploaded = answer["uploaded_voices"][0]
    assert (uploaded["name"], uploaded["model"]) == ("Grandma", "qwen3-tts-1.7b-base")
    narrowed = (await client.get(VOICES, params={"model": "espeak"})).json()
    assert {voice["model"] for voice in narrowed["voices"]} == {"espeak-ng"}
    assert narrowed["uploaded_voices"] == []
    of_base = (await client.get(VOICES, params={"model": "qwen3-tts-0.6b-base"})).json()
    assert [(voice["id"], voice["model"]) for voice in of_base["voices"]] == [("v1", "qwen3-tts-0.6b-base")]
    assert [voice["model"] for voice in of_base["uploaded_voices"]] == ["qwen3-tts-0.6b-base"]
    legacy = (await client.get(VOICES, params={"legacy": "true"})).json()
    assert "ryan" in legacy["voices"]
    assert legacy["uploaded_voices"] == ["v1"]
    by_name = (await client.get(f"{VOICES}/grandma")).json()
    assert by_name == {
        "id": "v1",
        "voice_id": "v1",
        "name": "Grandma",
        "created_at": 7,
        "type": "audio_sample",
        "model": "qwen3-tts-1.7b-base",
        "description": "warm",
        "seconds": 3.0,
        "in_context": True,
        "shared": True,
        "object": "audio.voice",
    }


@pytest.mark.parametrize("default", [LARGE, "qwen3-tts-0.6b-customvoice", "qwen3-tts-1.7b-base", "espeak-ng"])
async def test_every_listed_voice_speaks(client: httpx.AsyncClient, worker: FakeWorker, default: str) -> None:
    """Each id is listed once, and a request without a model, for its model or for tts-1 can name it."""
    _with(worker, default)
    listed = (await client.get(VOICES)).json()["voices"]
    ids = [voice["id"] for voice in listed]
    assert len(set(ids)) == len(ids) > 0
    for voice in listed:
        saved = SAVED if voice["id"] == "v1" else None
        for model in (None, "tts-1", voice["model"]):
            request = SpeechRequest(input="hi", voice=voice["id"], model=model)
            resolve(request, worker.catalog, default, saved)


async def test_one_list_for_every_reader(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Clients find the list as `voices` or as `data`, and a voice by `id`, `name` or `voice_id`."""
    _with(worker, LARGE)
    answer = (await client.get(VOICES)).json()
    assert answer["object"] == "list"
    assert answer["data"] == answer["voices"]
    assert next(iter(answer)) == "voices"
    for voice in answer["voices"] + answer["uploaded_voices"]:
        assert voice["voice_id"] == voice["id"]
        assert voice["name"]


async def test_saved_voices_without_their_model(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A saved voice that the listed model cannot speak with is an uploaded voice alone, which names another model."""
    _with(worker, "espeak-ng")
    answer = (await client.get(VOICES)).json()
    assert "v1" not in [voice["id"] for voice in answer["voices"]]
    assert [voice["model"] for voice in answer["uploaded_voices"]] == ["qwen3-tts-0.6b-base"]
    _with(worker, LARGE, unavailable="base")
    answer = (await client.get(VOICES)).json()
    assert "v1" not in [voice["id"] for voice in answer["voices"]]
    assert [voice["model"] for voice in answer["uploaded_voices"]] == [""]


async def test_voices_of_a_model_that_cannot_speak(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """While the default model is unavailable, the list is empty, but its voices are known by its name."""
    _with(worker, LARGE, unavailable="customvoice")
    assert [voice["id"] for voice in (await client.get(VOICES)).json()["voices"]] == ["v1"]
    assert len((await client.get(VOICES, params={"model": LARGE})).json()["voices"]) > 20


async def test_lists_without_the_worker(tmp_path: Path) -> None:
    """If the worker does not answer, the lists come from the latest snapshot."""
    with FakeWorker(tmp_path / "w.ipc") as own_worker:
        async with serving(own_worker.url) as client:
            before = (await client.get(VOICES)).json()
            own_worker.stop()
            await until(lambda: responds(client, "/ready", 503))
            assert (await client.get(VOICES)).json() == before
            assert (await client.get("/v1/models")).status_code == 200


async def test_one_voice(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Each voice of the list has a resource of its own; preset voices and OpenAI's names need no Call."""
    listed = (await client.get(VOICES)).json()["voices"]
    for voice in {voice["id"]: voice for voice in reversed(listed)}.values():
        assert (await client.get(f"{VOICES}/{voice['id'].replace('+', '%2B')}")).json() == voice
    assert (await client.get(f"{VOICES}/RYAN")).json()["model"] == LARGE
    assert not worker.of(Call)
    assert (await client.get(f"{VOICES}/nobody")).status_code == 404


async def test_disconnecting_cancels_the_call(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """If the client disconnects while a voice is made or a model is loaded, the worker gets a Cancel."""
    worker.on_call = lambda call, _payload: Failed(id="someone else", code="x", message=call.id)
    form = {"name": (None, "Ada"), "type": (None, "prompt"), "prompt": (None, "an old sailor")}
    for number, asked in enumerate((client.post(VOICES, files=form), client.post(f"/admin/models/{LARGE}/load")), 1):
        asking = asyncio.create_task(asked)
        await asyncio.to_thread(worker.wait_for, Call, number)
        asking.cancel()
        cancels = await asyncio.to_thread(worker.wait_for, Cancel, number)
        assert cancels[-1].id == worker.of(Call)[-1].id


async def test_a_clone_is_made_of_pcm(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The worker gets 24 kHz PCM and the transcript; the client gets OpenAI's object."""
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
    """With type=prompt no recording is needed."""
    worker.on_call = lambda call, _payload: Reply(id=call.id, voice=SAVED)
    form = {"type": (None, "prompt"), "name": (None, "Pirate"), "prompt": (None, "a gruff old pirate")}
    answer = await client.post(VOICES, files=form)
    assert answer.status_code == 200, answer.text
    assert worker.of(Call)[0].action == DesignVoice(name="Pirate", prompt="a gruff old pirate")


async def test_a_refusal_by_the_worker(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The client gets the worker's message."""
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="invalid_value", message="taken", param="name")
    answer = await client.post(VOICES, data={"name": "x"}, files={"audio_sample": a_recording()})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "taken"


async def test_limits_of_a_recording(client: httpx.AsyncClient) -> None:
    """A short recording is a 400, a large one a 413."""
    short = await client.post(VOICES, data={"name": "x"}, files={"audio_sample": a_recording(0.2)})
    assert (short.status_code, short.json()["error"]["code"]) == (400, "invalid_audio")
    large = await client.post(VOICES, data={"name": "x"}, files={"audio_sample": b"x" * (10 * 2**20 + 1)})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_form_of_the_other_kind(client: httpx.AsyncClient) -> None:
    """It cannot carry a recording; the message names what can."""
    answer = await client.post(VOICES, data={"name": "Anna"})
    assert answer.status_code == httpx.codes.UNSUPPORTED_MEDIA_TYPE
    assert "multipart/form-data, or send JSON" in answer.json()["error"]["message"]


async def test_delete(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The voice is found by its name, and deleted by its id."""
    worker.saved.append(SAVED)
    find = worker.on_call
    worker.on_call = lambda call, payload: (
        Reply(id=call.id) if isinstance(call.action, DeleteVoice) else find(call, payload)
    )
    answer = await client.delete(f"{VOICES}/Grandma")
    assert answer.json() == {"id": "v1", "object": "audio.voice.deleted", "deleted": True}
    assert worker.of(Call)[-1].action == DeleteVoice(id="v1")


async def test_a_deleted_voice_is_a_404(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A voice deleted a moment ago, by this or another web worker, is a 404 for GET and DELETE."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[SAVED])
    assert (await client.get(f"{VOICES}/v1")).status_code == 200
    # Another client deletes the voice between the lookup and the deletion.
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="voice_not_found", message="gone", param="voice")
    answer = await client.delete(f"{VOICES}/v1")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "voice_id")
    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[])
    assert (await client.get(f"{VOICES}/v1")).status_code == 404
    assert (await client.delete(f"{VOICES}/v1")).status_code == 404


async def test_a_name_may_hold_a_slash(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A name with a slash finds and deletes its voice, with the slash escaped or not."""
    named = msgspec.structs.replace(SAVED, name="AC/DC")
    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[named])
    worker.on_call = lambda call, _payload: Reply(id=call.id)
    for path in ("AC/DC", "ac%2Fdc"):
        assert (await client.get(f"{VOICES}/{path}")).json()["name"] == "AC/DC"
        assert (await client.delete(f"{VOICES}/{path}")).json()["id"] == "v1"
