"""A running application goes over to another state: new requests see it, and those that are being answered do not."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
import websockets
from litestar import Request
from litestar.datastructures import State

from server.app import create_app
from server.http.auth import caller_of, require_key
from server.http.keys import Caller, Keyring, digest_of, load_keyring
from server.http.middleware import HttpMiddleware
from server.reload.live_state import take_state
from server.reload.messages import WebState
from shared.protocol import Call, Reload, Reply, Speak
from shared.settings import Settings
from tests.fakes import FakeWorker
from tests.server.running import SPEECH, listening, plain_client, responds, until

PAGE = "http://page.example"


class Running:
    """An application on a port, with the key "old" at first."""

    def __init__(self, app: HttpMiddleware, base_url: str, url: str) -> None:
        self.app = app
        self.http = plain_client(base_url)
        self.socket_url = base_url.replace("http", "ws")
        self._url = url

    async def take(self, *, worker_variables: dict[str, str] | None = None, **settings: Any) -> None:
        """Go over to these settings, and their keys."""
        new = Settings(worker_url=self._url, **settings)
        keyring = load_keyring(new)
        await take_state(self.app, WebState(settings=new, keyring=keyring, worker_variables=worker_variables or {}))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A GPU worker that speaks canned tones, and answers each call with nothing."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        fake.on_call = lambda call, _payload: Reply(id=call.id)
        yield fake


@pytest_asyncio.fixture
async def running(worker: FakeWorker) -> AsyncIterator[Running]:
    """The application, ready."""
    app = create_app(Settings(worker_url=worker.url, api_keys=["old"]))
    async with listening(app) as base_url:
        running = Running(app, base_url, worker.url)
        async with running.http:
            await until(lambda: responds(running.http, "/ready"))
            yield running


def bearer(key: str) -> dict[str, str]:
    """The header of a key."""
    return {"authorization": f"Bearer {key}"}


async def say(socket: websockets.ClientConnection, kind: str, **fields: str) -> None:
    """Send a message of vLLM-Omni's dialect."""
    await socket.send(json.dumps({"type": kind, **fields}))


async def read(socket: websockets.ClientConnection, kind: str) -> None:
    """Read up to a message of this kind."""
    async for message in socket:
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return


async def test_keys(running: Running, worker: FakeWorker) -> None:
    """A key that is gone is refused. The speech that it has asked for before is heard."""
    worker.hold = True
    speaking = asyncio.create_task(running.http.post(SPEECH, json={"input": "x"}, headers=bearer("old")))
    await asyncio.to_thread(worker.wait_for, Speak, 1)
    await running.take(api_keys=["new"])
    worker.hold = False
    assert (await speaking).status_code == httpx.codes.OK
    assert (await running.http.get("/v1/models", headers=bearer("old"))).status_code == httpx.codes.UNAUTHORIZED
    assert (await running.http.get("/v1/models", headers=bearer("new"))).status_code == httpx.codes.OK


async def test_an_open_websocket(running: Running, worker: FakeWorker, tmp_path: Path) -> None:
    """Its next text is spoken by the new limits of its key, and not at all when the key is gone."""
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[old]\nhash = "{digest_of("old")}"\nrequests_per_minute = 7\n')
    async with websockets.connect(f"{running.socket_url}{SPEECH}/stream", additional_headers=bearer("old")) as socket:
        await say(socket, "session.config")
        await read(socket, "session.configured")
        await running.take(keys_file=keys)
        await say(socket, "input.text", text="One.")
        await say(socket, "input.commit")
        await read(socket, "input.committed")
        assert [speak.limits.requests_per_minute for speak in worker.of(Speak)] == [7]
        await running.take(api_keys=["new"])
        await say(socket, "input.text", text="Two.")
        with pytest.raises(websockets.ConnectionClosedError) as closed:
            await read(socket, "input.committed")
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "This server does not know this API key.")
    assert len(worker.of(Speak)) == 1


def test_a_request_stays_its_callers() -> None:
    """One whose key goes while its body is on its way: the GPU worker counts the key, and no address without limits."""
    caller = Caller(client="key:old")
    app = SimpleNamespace(state=State({"keyring": Keyring({digest_of("old"): caller}, guards_speech=True)}))
    scope: Any = {"type": "http", "litestar_app": app, "state": {}, "client": ("192.0.2.1", 1)}
    request = Request[Any, Any, Any]({**scope, "headers": [(b"authorization", b"Bearer old")]})
    require_key(request, SimpleNamespace())  # type: ignore[arg-type] # the route does not matter
    app.state.keyring = Keyring({}, guards_speech=True)
    assert caller_of(Settings(), request) == caller


async def test_origins(running: Running) -> None:
    """A page is let in, and shut out again: its preflight, its request and the header that its browser wants to see."""
    asks = {"origin": PAGE, "access-control-request-method": "POST"}

    async def seen() -> tuple[int, str | None]:
        preflight = await running.http.options(SPEECH, headers=asks)
        answer = await running.http.get("/v1/models", headers={"origin": PAGE, **bearer("old")})
        return preflight.status_code, answer.headers.get("access-control-allow-origin")

    before = await seen()
    assert before[1] is None
    await running.take(api_keys=["old"], cors_origins=[PAGE])
    assert await seen() == (httpx.codes.NO_CONTENT, PAGE)
    await running.take(api_keys=["old"], cors_origins=["http://other.example"])
    assert await seen() == (httpx.codes.FORBIDDEN, None)
    await running.take(api_keys=["old"])
    assert await seen() == before


async def test_other_settings(running: Running, worker: FakeWorker, tmp_path: Path) -> None:
    """Aliases, pronunciations, stored audio, limits of texts; and the GPU worker hears what is its own."""
    words = tmp_path / "words.toml"
    words.write_text('[all]\nnginx = "engine X"\n')
    await running.take(
        pronunciations=words,
        model_aliases={"kokoro": "espeak-ng"},
        audio_store_mb=0,
        max_input_chars=10,
        worker_variables={"TTS_MAX_INPUT_CHARS": "10"},
    )
    assert [call.action for call in worker.of(Call)] == [Reload(variables={"TTS_MAX_INPUT_CHARS": "10"})]
    assert (await running.http.post(SPEECH, json={"input": "nginx", "model": "kokoro"})).status_code == httpx.codes.OK
    assert worker.of(Speak)[-1].segments[0].text == "engine X"
    for wrong in ({"input": "x" * 11}, {"input": "x", "store": True}):
        answer = await running.http.post(SPEECH, json=wrong)
        assert answer.status_code == httpx.codes.BAD_REQUEST
    words.write_text("[all]\n")
    await running.take(pronunciations=words)
    await running.http.post(SPEECH, json={"input": "nginx"})
    assert worker.of(Speak)[-1].segments[0].text == "nginx"


async def test_the_api_document(running: Running) -> None:
    """It is kept, and has the limit that holds."""
    for limit in (4096, 200):
        await running.take(max_input_chars=limit)
        document = (await running.http.get("/openapi.json")).json()
        assert document["components"]["schemas"]["SpeechRequest"]["properties"]["input"]["maxLength"] == limit


async def test_without_a_main_process(running: Running) -> None:
    """An application that nothing else has started cannot read its settings again, and says so."""
    await running.take(admin_keys=["root"])
    assert (await running.http.post("/admin/reload")).status_code == httpx.codes.UNAUTHORIZED
    answer = await running.http.post("/admin/reload", headers=bearer("root"))
    assert answer.status_code == httpx.codes.NOT_FOUND
