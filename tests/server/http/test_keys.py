"""The file of keys: what it may say, and what its keys may do."""

import asyncio
import os
import re
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from server.http import auth
from server.http.keys import Caller, Keyring, KeysError, digest_of, load_keyring
from server.routes.v1.voice_files import VoiceFile
from shared.protocol import Call, DesignVoice, Failed, KeyLimits, PortableVoice, RateLimit, Reply, SavedVoice, Speak
from shared.settings import Settings
from tests.fakes import FakeWorker
from tests.server.running import SPEECH, VOICES, Serve
from tests.server.sockets import talk

ALICE = "sk-tts-alice"
FILE = f"""
[alice]
hash = "{digest_of(ALICE)}"
requests_per_minute = 60
characters_per_day = 1000
concurrent_requests = 2

[boss]
hash = "{digest_of("sk-tts-boss")}"
role = "admin"

[narrow]
hash = "{digest_of("sk-tts-narrow")}"
models = ["ESPEAK-NG"]
voices = ["Alloy", "my voice"]

[robot]
hash = "{digest_of("sk-tts-robot")}"
priority = "batch"

[old]
hash = "{digest_of("sk-tts-old")}"
expires = 2026-01-01
"""


def bearer(key: str) -> dict[str, str]:
    """The headers of a request with that key."""
    return {"authorization": f"Bearer {key}"}


def found(keyring: Keyring, key: str) -> Caller:
    """Whose key it is."""
    caller = keyring.find(key)
    assert caller is not None
    return caller


@pytest.fixture(scope="session")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FILE."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(FILE)
    return path


class TestFile:
    """The fields of a key in the file, and mistakes in them."""

    def test_a_key_has_what_its_table_says(self, keys_file: Path) -> None:
        """The key itself is nowhere; an absent limit is none."""
        keyring = load_keyring(Settings(keys_file=keys_file))
        alice, boss, old = (found(keyring, f"sk-tts-{name}") for name in ("alice", "boss", "old"))
        limits = KeyLimits(requests_per_minute=60, characters_per_day=1000, concurrent_requests=2)
        assert (alice.client, alice.limits, alice.is_admin) == ("key:alice", limits, False)
        assert (boss.client, boss.limits, boss.is_admin) == ("key:boss", KeyLimits(), True)
        assert not old.is_expired(date(2025, 12, 31))
        assert old.is_expired(date(2026, 1, 1))
        assert keyring.find("sk-tts-nobody") is None
        assert keyring.find("\udcff") is None
        assert ALICE not in repr(alice)

    def test_the_settings_have_keys_too(self, keys_file: Path) -> None:
        """Keys of TTS_API_KEYS and TTS_ADMIN_KEYS have no limits."""
        keyring = load_keyring(Settings(keys_file=keys_file, api_keys=["one"], admin_keys=["two"]))
        one, two = found(keyring, "one"), found(keyring, "two")
        assert (one.is_admin, two.is_admin) == (False, True)
        assert one.client != two.client
        assert one.limits == KeyLimits()

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "has no key"),
            ("[a]\n", "[a]: needs the field hash"),
            ("[a]\nhash = 'sk-tts-alice'\n", '[a]: hash: must be "sha256:" and 64'),
            (f"[a]\nhash = '{digest_of('x')}'\nrole = 'king'\n", "[a]: role: must be one of user, admin, not 'king'"),
            (
                f"[a]\nhash = '{digest_of('x')}'\nrequests_per_minute = 0\n",
                "[a]: requests_per_minute: must be at",
            ),
            (f"[a]\nhash = '{digest_of('x')}'\nlimit = 1\n", "[a]: there is no field limit; there are hash, role, "),
            (
                f"[a]\nhash = '{digest_of('x')}'\nrequests_per_minut = 1\n",
                "[a]: there is no field requests_per_minut; did you mean requests_per_minute?",
            ),
            (f"['a b']\nhash = '{digest_of('x')}'\n", "[a b] is no name"),
            (f"[a]\nhash = '{digest_of('x')}'\n[b]\nhash = '{digest_of('x')}'\n", "[b] has the hash of another key"),
            ("[a\n", "keys.toml"),
            ("\ufffd", "keys.toml"),
        ],
    )
    def test_a_mistake_is_named(self, tmp_path: Path, text: str, problem: str) -> None:
        """The message names the file and the mistake, and no key."""
        path = tmp_path / "keys.toml"
        path.write_text(text)
        with pytest.raises(KeysError, match=re.escape(problem)) as raised:
            load_keyring(Settings(keys_file=path))
        assert "keys.toml" in str(raised.value)
        assert ALICE not in str(raised.value)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        """The path and the reason."""
        with pytest.raises(KeysError, match=r"cannot be read by .*: No such file"):
            load_keyring(Settings(keys_file=tmp_path / "keys.toml"))

    def test_a_pipe(self, tmp_path: Path) -> None:
        """A reload would wait for its writer, so it is refused."""
        os.mkfifo(tmp_path / "keys.toml")
        with pytest.raises(KeysError, match="it is a pipe or a device, and must be a file"):
            load_keyring(Settings(keys_file=tmp_path / "keys.toml"))


@pytest.mark.asyncio(loop_scope="session")
class TestService:
    """The rights of the keys of FILE. The service has an admin key of the settings as well."""

    async def test_who_may_what(self, serve: Serve, keys_file: Path) -> None:
        """Every key may speak, an admin may administer, an expired or unknown key may nothing."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])

        async def statuses(key: str) -> tuple[int, int]:
            answers = [await client.get(path, headers=bearer(key)) for path in ("/v1/models", "/admin/stats")]
            return answers[0].status_code, answers[1].status_code

        assert await statuses(ALICE) == (200, 403)
        assert await statuses("sk-tts-boss") == (200, 200)
        assert await statuses("root") == (200, 200)
        assert await statuses("sk-tts-nobody") == (401, 401)
        assert await statuses(digest_of(ALICE)) == (401, 401)
        expired = await client.get("/v1/models", headers=bearer("sk-tts-old"))
        assert expired.status_code == httpx.codes.UNAUTHORIZED
        assert expired.json()["error"]["message"] == "This API key has expired on 2026-01-01."

    async def test_a_client_learns_that_it_needs_a_key(self, serve: Serve, keys_file: Path) -> None:
        """Without one it may read that, and nothing else."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        assert (await client.get("/")).json()["requires"] == {"key": True, "admin_key": True, "consent": False}

    async def test_limits_go_to_the_gpu_worker(self, serve: Serve, worker: FakeWorker, keys_file: Path) -> None:
        """The GPU worker learns the name and the limits; what is left of the minute comes back in OpenAI's headers."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        worker.rate_limit = RateLimit(limit=60, remaining=58, reset_s=1.5)
        bodies = [{"input": "x", **more} for more in ({}, {"stream": False}, {"stream_format": "sse"})]
        for body in bodies:
            answer = await client.post(SPEECH, json=body, headers=bearer(ALICE))
            assert answer.status_code == httpx.codes.OK
            found = {name: text for name, text in answer.headers.items() if name.startswith("x-ratelimit")}
            assert found == {
                "x-ratelimit-limit-requests": "60",
                "x-ratelimit-remaining-requests": "58",
                "x-ratelimit-reset-requests": "1.500s",
            }
        limits = KeyLimits(requests_per_minute=60, characters_per_day=1000, concurrent_requests=2)
        assert {(speak.client, speak.limits) for speak in worker.of(Speak)} == {("key:alice", limits)}

    @pytest.mark.parametrize("code", ["rate_limit_exceeded", "queue_full"])
    @pytest.mark.parametrize("path", [SPEECH, "/v1/text-to-speech/alloy"])
    async def test_what_is_left_stands_in_a_refusal(
        self, serve: Serve, worker: FakeWorker, keys_file: Path, code: str, path: str
    ) -> None:
        """A 429 has the headers too: a client that is refused learns how long the minute still is."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        left = RateLimit(limit=60, remaining=0, reset_s=60.0)
        worker.fail_with = Failed(id="", code=code, message="later", retry_after_s=1.0, rate_limit=left)
        answer = await client.post(path, json={"input": "x", "text": "x"}, headers=bearer(ALICE))
        assert answer.status_code == httpx.codes.TOO_MANY_REQUESTS
        found = {name: text for name, text in answer.headers.items() if name.startswith("x-ratelimit")}
        assert found == {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "60.000s",
        }

    async def test_batch(self, serve: Serve, worker: FakeWorker, keys_file: Path) -> None:
        """The GPU worker learns whose speech nobody waits for."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        for key in ("sk-tts-robot", ALICE):
            await client.post(SPEECH, json={"input": "x"}, headers=bearer(key))
        assert [speak.priority for speak in worker.of(Speak)] == ["batch", "interactive"]

    async def test_a_batch_within_the_limit(self, serve: Serve, worker: FakeWorker, keys_file: Path) -> None:
        """No more items of it are with the GPU worker than the key may have requests at once."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        worker.hold = True
        items = [{"input": f"text {number}"} for number in range(5)]
        asking = asyncio.create_task(client.post(f"{SPEECH}/batch", json={"items": items}, headers=bearer(ALICE)))
        await asyncio.to_thread(worker.wait_for, Speak, 2)
        await client.get("/v1/models", headers=bearer(ALICE))  # a round trip to the GPU worker
        assert len(worker.of(Speak)) == worker.busy == 2
        worker.hold = False
        assert (await asking).json()["succeeded"] == 5

    async def test_no_headers_without_a_limit(self, serve: Serve, keys_file: Path) -> None:
        """A key without a limit has nothing left or used up."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        answer = await client.post(SPEECH, json={"input": "x"}, headers=bearer("sk-tts-boss"))
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, None),
            ({"voice": "alloy"}, None),
            ({"voice": "nova"}, "voice"),
            ({"model": "qwen3-tts-0.6b-customvoice"}, "model"),
        ],
    )
    async def test_models_and_voices(
        self, serve: Serve, keys_file: Path, body: dict[str, str], param: str | None
    ) -> None:
        """A key with lists gets what they name, in any case and by any name of a voice, and else a 403."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        answer = await client.post(SPEECH, json={"input": "x", **body}, headers=bearer("sk-tts-narrow"))
        if param is None:
            assert answer.status_code == httpx.codes.OK
            return
        assert answer.status_code == httpx.codes.FORBIDDEN
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("insufficient_permissions", param)

    @pytest.mark.parametrize("by_header", [True, False])
    async def test_a_socket_outlives_its_key(
        self, serve: Serve, keys_file: Path, monkeypatch: pytest.MonkeyPatch, *, by_header: bool
    ) -> None:
        """A WebSocket that is open when its key expires takes no more text."""
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        monkeypatch.setattr(auth, "today", lambda: date(2025, 12, 31))
        key: Any = {"additional_headers": bearer("sk-tts-old")} if by_header else {}
        async with talk(client, **key) as socket:
            await socket.say({"type": "session.config", "api_key": None if by_header else "sk-tts-old"})
            assert (await socket.hear())["type"] == "session.configured"
            await socket.say({"type": "input.text", "text": "Hello."}, {"type": "input.done"})
            await socket.until("session.done")
            monkeypatch.setattr(auth, "today", lambda: date(2026, 1, 1))
            await socket.say({"type": "input.text", "text": "Hello."})
            (error,), code, _ = await socket.end()
            assert (error["code"], code) == ("invalid_api_key", 1008)

    async def test_saved_voices(self, serve: Serve, worker: FakeWorker, keys_file: Path) -> None:
        """A key with a list of voices exports, renames, deletes and saves no others: any could get a listed name."""
        own, other = (
            SavedVoice(id=f"voice_{number}", name=name, kind="clone", created_at=7, seconds=3.0, in_context=True)
            for number, name in enumerate(("My Voice", "Boss"))
        )
        file = PortableVoice(name="Boss 2", kind="clone", pcm=b"ab" * 100)
        worker.snapshot = msgspec.structs.replace(worker.snapshot, voices=[own, other])
        worker.on_call = lambda call, _: Reply(id=call.id, voice=own, exported=file)
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        upload: Any = {"files": {"file": msgspec.msgpack.encode(VoiceFile(voice=file))}}
        for method, path, body in (
            ("GET", "/v1/audio/voice_files/boss", {}),
            ("DELETE", f"{VOICES}/voice_1", {}),
            ("POST", f"{VOICES}/Boss", {"json": {"name": "my voice"}}),
            ("POST", f"{VOICES}/voice_0", {"json": {"name": "Boss 2"}}),
            ("POST", VOICES, {"json": {"name": "Boss 2", "type": "prompt", "prompt": "calm"}}),
            ("POST", "/v1/audio/voice_files", upload),
        ):
            answer = await client.request(method, path, headers=bearer("sk-tts-narrow"), **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions"), path
        assert worker.of(Call) == []
        for method, path, body in (
            ("GET", "/v1/audio/voice_files/voice_0", {}),
            ("POST", f"{VOICES}/voice_0", {"json": {"name": "MY VOICE"}}),
            ("POST", "/v1/audio/voice_files", upload | {"data": {"name": "my voice"}}),
            ("DELETE", f"{VOICES}/my%20voice", {}),
        ):
            answer = await client.request(method, path, headers=bearer("sk-tts-narrow"), **body)
            assert answer.status_code == httpx.codes.OK, answer.text

    async def test_designs(self, serve: Serve, worker: FakeWorker, keys_file: Path) -> None:
        """To design a voice is to speak with that model: its list, its limits and its priority count."""
        voice = SavedVoice(id="voice_1", name="my voice", kind="design", created_at=7, seconds=3.0, in_context=True)
        worker.on_call = lambda call, _: Reply(id=call.id, voice=voice)
        client = await serve(keys_file=keys_file, admin_keys=["root"])
        body = {"name": "my voice", "type": "prompt", "prompt": "calm"}
        refused = await client.post(VOICES, json=body, headers=bearer("sk-tts-narrow"))
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "model")
        for key in (ALICE, "sk-tts-robot"):
            assert (await client.post(VOICES, json=body, headers=bearer(key))).status_code == httpx.codes.OK
        designs = [call.action for call in worker.of(Call)]
        limits = KeyLimits(requests_per_minute=60, characters_per_day=1000, concurrent_requests=2)
        assert designs == [
            DesignVoice(name="my voice", prompt="calm", limits=limits),
            DesignVoice(name="my voice", prompt="calm", priority="batch"),
        ]


def test_a_look_up_compares_digests_alone() -> None:
    """The time of a look-up depends on no character of the key: only its digest is compared, with digests."""

    class Key(str):
        """A key that may be encoded, and not compared."""

        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, _other: object) -> bool:
            raise AssertionError

    keyring = Keyring({digest_of(ALICE): Caller(client="key:alice")}, guards_speech=True)
    assert keyring.find(Key(ALICE)) == Caller(client="key:alice")
    assert keyring.find(Key(ALICE[:-1])) is None
