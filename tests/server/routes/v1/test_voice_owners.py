"""Saved voices of several keys: over every route, a voice of another key is as if it did not exist."""

from typing import Any, Final

import httpx
import msgspec
import pytest

from server.http.keys import digest_of
from server.routes.v1.voice_files import VoiceFile
from shared.protocol import (
    ALL_VOICES,
    Call,
    CloneVoice,
    DesignVoice,
    FindVoice,
    ImportVoice,
    PortableVoice,
    Reply,
    SavedVoice,
    Speak,
    UpdateVoice,
    VoiceAccess,
    VoiceConsent,
)
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, VOICES, Serve
from tests.server.sockets import talk

pytestmark = SHARED_LOOP

HIDDEN: Final = "voice_of_alice"
MISSING: Final = "voice_of_nobody"


def saved(voice_id: str, name: str, **fields: Any) -> SavedVoice:
    """A saved voice."""
    return SavedVoice(id=voice_id, name=name, kind="clone", created_at=7, seconds=3.0, in_context=True, **fields)


OF_ALICE: Final = saved(HIDDEN, "Ada", owner="alice", shared=False)
SHARED: Final = saved("voice_shared", "Sue", owner="alice")
NO_ONES: Final = saved("voice_old", "Old")


@pytest.fixture
def worker(worker: FakeWorker) -> FakeWorker:
    """A worker with voices, whose default model has a Base model in its family."""
    voices = [NO_ONES, OF_ALICE, SHARED]
    worker.snapshot = msgspec.structs.replace(
        worker.snapshot, default_model="qwen3-tts-1.7b-customvoice", voices=voices
    )
    return worker


@pytest.fixture(scope="session")
def several_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings with the named keys alice, bob and boss (an admin), and the nameless keys `plain` and `root`."""
    path = tmp_path_factory.mktemp("owners") / "keys.toml"
    tables = {name: {"hash": digest_of(name)} for name in ("alice", "bob", "boss")}
    tables["boss"]["role"] = "admin"
    path.write_bytes(msgspec.toml.encode(tables))
    return {"keys_file": path, "api_keys": ["plain"], "admin_keys": ["root"]}


def as_key(key: str) -> dict[str, Any]:
    """The headers of a request with that key."""
    return {"headers": {"authorization": f"Bearer {key}"}}


async def listed(client: httpx.AsyncClient, key: str) -> set[str]:
    """The ids of the saved voices in every list; the lists agree."""
    whole, legacy, eleven, eleven2 = [
        (await client.get(path, **as_key(key))).json()
        for path in (VOICES, f"{VOICES}?legacy=true", "/v1/voices", "/v2/voices")
    ]
    found = [
        {voice["id"] for voice in whole["uploaded_voices"]},
        {voice["id"] for voice in whole["voices"] if voice["kind"] == "clone"},
        set(legacy["uploaded_voices"]),
        {voice["voice_id"] for voice in eleven["voices"] if voice["category"] == "cloned"},
        {voice["voice_id"] for voice in eleven2["voices"] if voice["category"] == "cloned"},
    ]
    assert all(each == found[0] for each in found), found
    return found[0]


async def test_lists(serve: Serve, several_keys: dict[str, Any]) -> None:
    """A key sees its own voices and the shared ones; an admin sees all; a key without a name owns none."""
    client = await serve(**several_keys)
    everyones = {SHARED.id, NO_ONES.id}
    for key in ("bob", "plain"):
        assert await listed(client, key) == everyones, key
    for key in ("alice", "boss", "root"):
        assert await listed(client, key) == {*everyones, HIDDEN}, key
    open_to_all = await serve()
    assert await listed(open_to_all, "none") == {*everyones, HIDDEN}, "without keys, as always"


async def outcome(client: httpx.AsyncClient, key: str, method: str, path: str, name: str, **body: Any) -> Any:
    """Status, body and headers, without the name of the voice and what is new with each request."""
    answer = await client.request(method, path.replace("NAME", name), **as_key(key), **body)
    text = answer.text.replace(name, "NAME").replace(answer.headers["x-request-id"], "ID")
    headers = {field: value for field, value in answer.headers.items() if field not in _OF_ONE_REQUEST}
    return answer.status_code, text, headers


_OF_ONE_REQUEST: Final = {"x-request-id", "request-id", "date", "x-speech-id", "content-length", "server-timing"}

REQUESTS: Final[list[tuple[str, str, dict[str, Any]]]] = [
    ("GET", f"{VOICES}/NAME", {}),
    ("POST", f"{VOICES}/NAME", {"json": {"name": "Mine"}}),
    ("POST", f"{VOICES}/NAME", {"json": {"shared": True}}),
    ("DELETE", f"{VOICES}/NAME", {}),
    ("GET", "/v1/audio/voice_files/NAME", {}),
    ("GET", "/v1/voices/NAME", {}),
    ("POST", "/v1/text-to-speech/NAME", {"json": {"text": "hi"}}),
    ("POST", "/v1/text-to-speech/NAME/stream", {"json": {"text": "hi"}}),
]


@pytest.mark.parametrize("asked", REQUESTS)
async def test_hidden_is_missing(
    serve: Serve, worker: FakeWorker, several_keys: dict[str, Any], asked: tuple[str, str, dict[str, Any]]
) -> None:
    """Status, body, headers and the work behind them are those of a voice that is not there."""
    client = await serve(**several_keys)
    method, path, body = asked
    for key in ("bob", "plain"):
        worker.seen.clear()
        hidden = await outcome(client, key, method, path, HIDDEN, **body)
        of_hidden = [call.action for call in worker.of(Call)]
        worker.seen.clear()
        missing = await outcome(client, key, method, path, MISSING, **body)
        assert hidden == missing
        assert hidden[0] in {400, 404}, hidden
        assert [msgspec.structs.replace(find, name=MISSING) for find in of_hidden] == [
            call.action for call in worker.of(Call)
        ]
        assert worker.of(Speak) == []


@pytest.mark.parametrize("voice", [HIDDEN, "Ada"])
async def test_speech(serve: Serve, worker: FakeWorker, several_keys: dict[str, Any], voice: str) -> None:
    """Speech, a batch and a WebSocket speak with the voice for its key and for an admin, and know it not for others."""
    client = await serve(**several_keys)
    for key, known in (("alice", True), ("boss", True), ("bob", False), ("plain", False)):
        worker.seen.clear()
        whole = await client.post(SPEECH, json={"input": "hi", "voice": voice}, **as_key(key))
        items = {"items": [{"input": "hi", "voice": voice}]}
        batch = (await client.post(f"{SPEECH}/batch", json=items, **as_key(key))).json()["results"][0]
        async with talk(client, additional_headers=as_key(key)["headers"]) as socket:
            await socket.say({"type": "session.config", "voice": voice})
            heard = await socket.hear()
        assert whole.status_code == (200 if known else 400)
        assert (heard["type"] == "session.configured", "error" not in batch or not batch["error"]) == (known, known)
        speaks = [(speak.voice, speak.access) for speak in worker.of(Speak)]
        access = VoiceAccess(owner=key, all=key == "boss")
        assert speaks == ([(HIDDEN, access)] * 2 if known else [])
        if not known:
            assert {find.action for find in worker.of(Call)} == {FindVoice(name=voice)}
            assert whole.json()["error"]["code"] == heard["code"] == batch["error"]["code"] == "voice_not_found"


@pytest.mark.usefixtures("no_decoding")
async def test_made_by_a_key(serve: Serve, worker: FakeWorker, several_keys: dict[str, Any]) -> None:
    """Clones, designs and imports belong to their key, with the mark that it gave."""
    client = await serve(**several_keys)
    worker.on_call = lambda call, _: Reply(id=call.id, voice=OF_ALICE)
    portable = PortableVoice(name="Ada", kind="clone", pcm=b"ab" * 100)
    file = {"file": msgspec.msgpack.encode(VoiceFile(voice=portable))}
    for shared in (None, False, True):
        mark = {} if shared is None else {"shared": str(shared).lower()}
        worker.seen.clear()
        form: Any = {"data": {"name": "Ada", **mark}, "files": {"audio_sample": b"abc"}}
        clone = await client.post(VOICES, **form, **as_key("alice"))
        body = {"name": "Ada", "type": "prompt", "prompt": "calm", "shared": shared}
        design = await client.post(VOICES, json=body, **as_key("alice"))
        loaded = await client.post("/v1/audio/voice_files", data=mark, files=file, **as_key("alice"))
        for answer in (clone, design, loaded):
            assert answer.status_code == httpx.codes.OK, answer.text
            assert (answer.json()["shared"], answer.json()["owner"]) == (False, "alice")
        calls = worker.of(Call)
        assert {call.access for call in calls} == {VoiceAccess(owner="alice")}
        actions = [call.action for call in calls]
        assert [type(action) for action in actions] == [CloneVoice, DesignVoice, ImportVoice]
        assert {action.shared for action in actions} == {bool(shared)}  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_decoding")
async def test_a_key_without_a_name_owns_nothing(serve: Serve, several_keys: dict[str, Any]) -> None:
    """It cannot have a private voice, and is told so."""
    client = await serve(**several_keys)
    form = {"name": "Ada", "shared": "false"}
    answer = await client.post(VOICES, data=form, files={"audio_sample": b"abc"}, **as_key("plain"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "shared")


async def test_the_mark_is_changed(serve: Serve, worker: FakeWorker, several_keys: dict[str, Any]) -> None:
    """The route of a new name takes it, alone or beside a name; a body with neither is refused."""
    client = await serve(**several_keys)
    worker.on_call = lambda call, _: Reply(id=call.id, voice=msgspec.structs.replace(OF_ALICE, shared=True))
    for body, wanted in (
        ({"shared": True}, UpdateVoice(id=HIDDEN, shared=True)),
        ({"shared": False, "name": "Eva"}, UpdateVoice(id=HIDDEN, name="Eva", shared=False)),
    ):
        answer = await client.post(f"{VOICES}/{HIDDEN}", json=body, **as_key("alice"))
        assert (answer.status_code, answer.json()["shared"]) == (200, True)
        assert worker.of(Call)[-1].action == wanted
    nothing = await client.post(f"{VOICES}/{HIDDEN}", json={}, **as_key("alice"))
    assert (nothing.status_code, nothing.json()["error"]["param"]) == (400, "name")


async def test_who_learns_the_owner(serve: Serve, several_keys: dict[str, Any]) -> None:
    """The owner and admins do; for others a shared voice is shared, whoever made it."""
    client = await serve(**several_keys)
    for key, owner in (("alice", "alice"), ("root", "alice"), ("bob", None)):
        voice = (await client.get(f"{VOICES}/{SHARED.id}", **as_key(key))).json()
        assert (voice["shared"], voice.get("owner")) == (True, owner)


@pytest.mark.usefixtures("no_decoding")
async def test_consents_know_their_client(serve: Serve, worker: FakeWorker, several_keys: dict[str, Any]) -> None:
    """Each route of consents, and a clone that needs one, tells the GPU worker whose consents there are for it."""
    client = await serve(**several_keys, require_consent=True)
    consent = VoiceConsent(id="cons_1", name="C", language="en", created_at=1)
    worker.on_call = lambda call, _: Reply(id=call.id, consent=consent, voice=OF_ALICE)
    path = "/v1/audio/voice_consents"
    form = {"name": "Ada", "consent": "cons_1"}
    for key in ("alice", "bob", "root"):
        worker.seen.clear()
        answers = [
            await client.post(path, data={"name": "C", "language": "en"}, files={"recording": b"x"}, **as_key(key)),
            await client.get(path, **as_key(key)),
            await client.get(f"{path}/cons_1", **as_key(key)),
            await client.post(f"{path}/cons_1", json={"name": "D"}, **as_key(key)),
            await client.delete(f"{path}/cons_1", **as_key(key)),
            await client.post(VOICES, data=form, files={"audio_sample": b"x"}, **as_key(key)),
        ]
        assert [answer.status_code for answer in answers] == [200] * 6
        wanted = ALL_VOICES if key == "root" else VoiceAccess(owner=key)
        assert [call.access for call in worker.of(Call)] == [wanted] * 7
