"""/v1/audio/voice_files, the renaming of voices, and voices of designs that were heard."""

from typing import Any

import httpx
import msgspec
import pytest

from server.routes.v1.voice_files import MAX_FILE_BYTES, VoiceFile
from shared.protocol import (
    Call,
    DesignVoice,
    ExportVoice,
    Failed,
    ImportVoice,
    PortableConsent,
    PortableVoice,
    Reply,
    SavedVoice,
    UpdateVoice,
)
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, VOICES, Serve

pytestmark = SHARED_LOOP

FILES = "/v1/audio/voice_files"
SAVED = SavedVoice(id="voice_1", name="Großmama/1", kind="clone", created_at=7, seconds=3.0, in_context=True)
CONSENT = PortableConsent(name="Ada", language="de", created_at=5, pcm=b"cd" * 100)
PORTABLE = PortableVoice(name=SAVED.name, kind="clone", text="Hallo.", pcm=b"ab" * 100, consent=CONSENT)


@pytest.fixture
def worker(worker: FakeWorker) -> FakeWorker:
    """A worker with a saved voice."""

    def answer(call: Call, _payload: bytes | None) -> Reply | Failed:
        match call.action:
            case ExportVoice():
                return Reply(id=call.id, exported=PORTABLE)
            case UpdateVoice(name="gone"):
                return Failed(id=call.id, code="voice_not_found", message="there is no saved voice")
            case UpdateVoice(name=name):
                return Reply(id=call.id, voice=msgspec.structs.replace(SAVED, name=name))
            case _:
                return Reply(id=call.id, voice=SAVED)

    worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[SAVED])
    worker.on_call = answer
    return worker


def upload(content: bytes) -> dict[str, Any]:
    """A form with that file."""
    return {"file": ("a.voice", content)}


def with_consent(**fields: Any) -> bytes:
    """A file with a consent that differs."""
    consent = msgspec.structs.replace(CONSENT, **fields)
    return msgspec.msgpack.encode(VoiceFile(voice=msgspec.structs.replace(PORTABLE, consent=consent)))


async def test_there_and_back(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A file holds all of the voice, has its name, and is taken again, under another name if one is given."""
    answer = await client.get(f"{FILES}/voice_1")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    disposition = answer.headers["content-disposition"]
    assert disposition == "attachment; filename=\"voice_1.voice\"; filename*=UTF-8''Gro%C3%9Fmama%2F1.voice"
    for form, name in (({}, PORTABLE.name), ({"name": " Eva "}, "Eva")):
        imported = await client.post(FILES, files=upload(answer.content), data=form)
        assert (imported.status_code, imported.json()["id"]) == (200, "voice_1")
        assert worker.of(Call)[-1].action == ImportVoice(voice=msgspec.structs.replace(PORTABLE, name=name))


async def test_head_exports_nothing(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """It has the headers of GET, and the GPU worker, which logs each export, learns of none."""
    get, head = await client.get(f"{FILES}/voice_1"), await client.head(f"{FILES}/voice_1")
    assert head.status_code == 200
    for name in ("content-type", "content-disposition"):
        assert head.headers[name] == get.headers[name]
    assert [call.action for call in worker.of(Call)] == [ExportVoice(id="voice_1")]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\xc1",
        b"\x91" * 2000,
        b"PK\x03\x04",
        msgspec.json.encode(VoiceFile(voice=PORTABLE)),
        msgspec.msgpack.encode(VoiceFile(voice=PORTABLE))[:-1],
        msgspec.msgpack.encode({"format": "other", "version": 1, "voice": msgspec.to_builtins(PORTABLE)}),
        msgspec.msgpack.encode({"format": "qwen3-tts-voice", "version": 2, "voice": msgspec.to_builtins(PORTABLE)}),
        msgspec.msgpack.encode(VoiceFile(voice=msgspec.structs.replace(PORTABLE, pcm=bytes(2_880_002)))),
        msgspec.msgpack.encode(VoiceFile(voice=msgspec.structs.replace(PORTABLE, text="x" * 5000))),
        with_consent(language="../../de"),
        with_consent(language="de\n"),
        with_consent(created_at=-1),
    ],
)
async def test_files_that_are_no_voices(client: httpx.AsyncClient, worker: FakeWorker, content: bytes) -> None:
    """Refused before the GPU worker sees anything of them."""
    answer = await client.post(FILES, files=upload(content))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    assert worker.of(Call) == []


@pytest.mark.parametrize(("text", "transcript"), [(" Hallo.\n", "Hallo."), ("  ", None), ("…", None), (None, None)])
async def test_transcript(client: httpx.AsyncClient, worker: FakeWorker, text: str, transcript: str | None) -> None:
    """A text with nothing to say is no transcript, as where a recording is saved."""
    voice = msgspec.structs.replace(PORTABLE, text=text)
    assert (await client.post(FILES, files=upload(msgspec.msgpack.encode(VoiceFile(voice=voice))))).status_code == 200
    assert worker.of(Call)[-1].action == ImportVoice(voice=msgspec.structs.replace(PORTABLE, text=transcript))


async def test_bounds(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The largest voice with its consent fits, and a larger file is a 413."""
    longest = bytes(2_880_000)
    consent = msgspec.structs.replace(CONSENT, pcm=longest)
    voice = msgspec.structs.replace(PORTABLE, pcm=longest, consent=consent, text="x" * 4096)
    answer = await client.post(FILES, files=upload(msgspec.msgpack.encode(VoiceFile(voice=voice))))
    assert answer.status_code == 200
    assert worker.of(Call)[-1].action == ImportVoice(voice=voice)
    assert (await client.post(FILES, files=upload(bytes(MAX_FILE_BYTES + 1)))).status_code == 413
    assert (await client.post(FILES, files={"name": (None, "Ada")})).json()["error"]["param"] == "file"


async def test_without_a_consent(serve: Serve, worker: FakeWorker) -> None:
    """Where consents are required, a file says so by bringing one, whatever it calls its voice."""
    client = await serve(require_consent=True)
    designed = msgspec.structs.replace(PORTABLE, kind="design", consent=None)
    answer = await client.post(FILES, files=upload(msgspec.msgpack.encode(VoiceFile(voice=designed))))
    assert (answer.status_code, worker.of(Call)) == (400, [])
    assert "consent" in answer.json()["error"]["message"]
    answer = await client.post(FILES, files=upload(msgspec.msgpack.encode(VoiceFile(voice=PORTABLE))))
    assert answer.status_code == 200


async def test_no_such_voice(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A 404, before and while another client deletes it."""
    worker.on_call = lambda call, _: Reply(id=call.id)
    for answer in (await client.get(f"{FILES}/none"), await client.post(f"{VOICES}/none", json={"name": "Eva"})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "voice_not_found")


async def test_renamed(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """By id, and by a name with a slash."""
    for path in ("voice_1", SAVED.name):
        answer = await client.post(f"{VOICES}/{path}", json={"name": " Eva "})
        assert (answer.status_code, answer.json()["name"]) == (200, "Eva")
        assert worker.of(Call)[-1].action == UpdateVoice(id="voice_1", name="Eva")
    assert (await client.post(f"{VOICES}/voice_1", json={"name": "gone"})).status_code == 404
    assert (await client.post(f"{VOICES}/voice_1", json={})).json()["error"]["param"] == "name"


DESIGNER = "qwen3-tts-1.7b-voicedesign"


@pytest.mark.usefixtures("no_decoding")
async def test_a_design_that_was_heard(serve: Serve, worker: FakeWorker, tmp_path_factory: Any) -> None:
    """Stored speech of a voice-design model becomes the voice; speech of other models does not."""
    client = await serve(audio_store_dir=tmp_path_factory.getbasetemp() / "heard")
    new = {"name": "Bob", "type": "prompt", "prompt": "calm", "script_hint": "Good morning to all of you."}

    async def stored(**fields: Any) -> tuple[str, bytes]:
        body = {"input": "hello", "store": True, "stream": False, "response_format": "wav", **fields}
        answer = await client.post(SPEECH, json=body)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-audio-url"].split("/")[-2], answer.content

    audio_id, heard = await stored(model=DESIGNER, instructions="calm")
    answer = await client.post(VOICES, json=new | {"audio_id": audio_id})
    assert answer.status_code == 200, answer.text
    assert worker.of(Call)[-1].action == DesignVoice(name="Bob", prompt="calm", script=new["script_hint"])
    assert worker.payloads[-1] == heard
    other, _ = await stored(model="espeak-ng")
    calls = len(worker.of(Call))
    for wrong in (other, "0" * 32, "../../etc/passwd"):
        answer = await client.post(VOICES, json=new | {"audio_id": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "audio_id")
    assert len(worker.of(Call)) == calls
