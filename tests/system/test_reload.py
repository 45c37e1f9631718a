"""A reload of the running service: in every process, all or nothing, and under load."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.keys import digest_of
from tests.system.service import NO_TLS, Service, eventually

SPEECH = "/v1/audio/speech"
ROOT = {"authorization": "Bearer root"}


def bearer(key: str) -> dict[str, str]:
    """The header of a key."""
    return {"authorization": f"Bearer {key}"}


class Configured:
    """A service of two web workers with a .env and a file of keys beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.write(keys=["alice"])
        self.service = Service(directory, WEB_WORKERS=2, AUDIO_BUFFER_MB=1000, STALL_TIMEOUT=3000)
        self._read = 0

    def begin(self) -> None:
        """Have the settings and the keys of the start in force, and forget what the log says."""
        self.service.wait_serving(2, headers=ROOT)
        self.write(keys=["alice"])
        assert self.reload().is_success
        self._read = len(self.service.log.read_text())

    def said(self) -> str:
        """The log from `begin` on."""
        return self.service.log.read_text()[self._read :]

    def write(self, *, keys: list[str], **variables: object) -> None:
        """Write .env and the keys; nothing is read yet."""
        tables = [f'[{key}]\nhash = "{digest_of(key)}"\n' for key in keys]
        (self.directory / "keys.toml").write_text("".join(tables))
        all_variables = {"ADMIN_KEYS": "root", "KEYS_FILE": "keys.toml", **variables}
        lines = [f"TTS_{name}={value}\n" for name, value in all_variables.items()]
        (self.directory / ".env").write_text("".join(lines))

    def reload(self, headers: dict[str, str] = ROOT) -> httpx.Response:
        """POST /admin/reload."""
        return self.service.http.post("/admin/reload", headers=headers)

    def everywhere(self, path: str, key: str = "root") -> list[httpx.Response]:
        """The answers of both web workers: the kernel hands new connections to either of them."""
        answers: dict[int, httpx.Response] = {}

        def both() -> bool:
            with (
                contextlib.suppress(httpx.TransportError),  # a web worker that starts anew
                httpx.Client(base_url=self.service.url, timeout=30, trust_env=False, verify=NO_TLS) as http,
            ):
                stats = http.get("/admin/stats", headers=ROOT)
                if stats.is_success:  # it has found the GPU worker
                    answers[stats.json()["web_pid"]] = http.get(path, headers=bearer(key))
            return len(answers) == 2

        eventually(both, 90, "both web workers have answered")
        return list(answers.values())

    def statuses(self, key: str) -> set[int]:
        """The statuses of the web workers' answers to a key."""
        return {answer.status_code for answer in self.everywhere("/v1/models", key)}

    def settings(self) -> list[dict[str, Any]]:
        """The settings in force, as the web workers show them."""
        return [answer.json() for answer in self.everywhere("/admin/config")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Configured]:
    """The service of this file."""
    running = Configured(tmp_path_factory.mktemp("reload"))
    try:
        running.service.wait_ready()
        yield running
    finally:
        running.service.kill()


@pytest.fixture
def configured(running: Configured) -> Configured:
    """The service as it was at its start; a test may kill its processes."""
    running.begin()
    return running


def test_every_process_has_the_new_settings(configured: Configured) -> None:
    """Keys, limits of the GPU worker and origins hold everywhere when the answer is there; a mistake changes nothing.

    Processes that die later come back with the same settings, whatever .env says by then.
    """
    service = configured.service
    assert configured.reload().json() == {"changed": [], "needs_restart": []}
    words = "[all]\nnginx = 'engine X'\n"
    (configured.directory / "words.toml").write_text(words)
    new = {"MAX_QUEUE": 7, "VRAM_BUDGET_MB": 1234, "PRONUNCIATIONS": "words.toml", "PORT": 1, "WEB_PAGE": "false"}
    configured.write(keys=["bob"], **new, MODEL_ALIASES="kokoro=espeak-ng")
    answer = configured.reload()
    # The environment of the service has a port, which goes before that of .env.
    assert answer.json()["needs_restart"] == ["TTS_WEB_PAGE"]
    changed = ["TTS_KEYS_FILE", "TTS_MAX_QUEUE", "TTS_MODEL_ALIASES", "TTS_PRONUNCIATIONS", "TTS_VRAM_BUDGET_MB"]
    assert answer.json()["changed"] == changed

    def budget() -> int:
        vram = service.http.get("/admin/vram", headers=ROOT).json()  # may be 250 ms old
        return int(vram["device"]["budget_bytes"])

    def check() -> None:
        assert (configured.statuses("alice"), configured.statuses("bob")) == ({401}, {200})
        for settings in configured.settings():
            assert (settings["max_queue"], settings["vram_budget_mb"], settings["web_page"]) == (7, 1234, True)
        eventually(lambda: budget() == 1234 * 2**20, 5, "figures that were read after the reload")
        body = {"input": "nginx", "model": "kokoro", "response_format": "pcm"}
        said = service.http.post(SPEECH, json=body, headers=bearer("bob"))
        assert said.status_code == httpx.codes.OK

    check()
    configured.write(keys=["carol"], MAX_QUEUE="many", CORS_ORIGINS="nope", PRONUNCIATIONS="absent.toml", QUEUE=1)
    answer = configured.reload()
    assert answer.status_code == httpx.codes.BAD_REQUEST
    message = answer.json()["error"]["message"]
    for name in ("TTS_MAX_QUEUE", "TTS_CORS_ORIGINS", "TTS_PRONUNCIATIONS", "TTS_QUEUE"):
        assert f"{name}: " in message
    check()
    stats = service.http.get("/admin/stats", headers=ROOT).json()
    for pid in (stats["web_pid"], stats["worker"]["pid"]):
        os.kill(pid, signal.SIGKILL)

    def back() -> bool:
        try:
            now = service.http.get("/admin/stats", headers=ROOT)
        except httpx.TransportError:
            return False
        return now.is_success and now.json()["worker"]["pid"] != stats["worker"]["pid"]

    eventually(back, 90, "the processes are back")
    check()
    configured.write(keys=["bob", "dave"])
    assert configured.reload(bearer("bob")).status_code == httpx.codes.FORBIDDEN
    os.kill(service.process.pid, signal.SIGHUP)
    eventually(lambda: configured.statuses("dave") == {200}, 90, "SIGHUP has the same effect")
    # A signal has no answer. The GPU worker takes its settings after the web workers have the keys.
    eventually(lambda: {each["max_queue"] for each in configured.settings()} == {64}, 90, "the queue's limit is back")


class _Load:
    """Streams that are read slowly, and short requests beside them."""

    def __init__(self, configured: Configured) -> None:
        self.configured = configured
        narrow = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)]
        transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None), socket_options=narrow)
        self.http = httpx.AsyncClient(base_url=configured.service.url, timeout=120, transport=transport)
        self.refused: list[httpx.Response] = []
        self.spoken = 0

    async def stream(self, began: asyncio.Semaphore, go_on: asyncio.Event, text: str) -> int:
        """Read a little, wait, and read the rest; the number of bytes."""
        body = {"input": text, "response_format": "pcm"}
        async with self.http.stream("POST", SPEECH, json=body, headers=bearer("alice")) as answer:
            answer.raise_for_status()
            pieces = answer.aiter_raw()
            n_bytes = len(await anext(pieces))
            began.release()
            await go_on.wait()
            async for piece in pieces:
                n_bytes += len(piece)
            return n_bytes

    async def speak(self, key: str) -> int:
        """A short request with a new connection, which either web worker may get; its status."""
        headers = {**bearer(key), "connection": "close"}
        answer = await self.http.post(SPEECH, json={"input": "Yes.", "response_format": "pcm"}, headers=headers)
        return answer.status_code

    async def keep_asking(self, over: asyncio.Event) -> None:
        """Short requests with a key that every reload keeps."""
        while not over.is_set():
            assert await self.speak("alice") == httpx.codes.OK
            self.spoken += 1


@pytest.mark.parametrize(
    ("streams", "reloads"), [(4, 4), pytest.param(100, 50, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
async def test_reload_under_load(configured: Configured, streams: int, reloads: int) -> None:
    """No stream is cut, no request with a key that stays is refused, and a key that goes is refused at once.

    Every third reload has a mistake: it is a 400, and what was before still holds.
    """
    configured.write(keys=["alice"], MAX_QUEUE=1000)
    assert configured.reload().json()["changed"] == ["TTS_MAX_QUEUE"]
    load = _Load(configured)
    text = "One sentence after the other. " * 60  # 6 MB are more than the kernel's buffers hold
    alone = configured.service.http.post(
        SPEECH, json={"input": text, "response_format": "pcm"}, headers=bearer("alice")
    )
    began, go_on, over = asyncio.Semaphore(0), asyncio.Event(), asyncio.Event()
    reading = [asyncio.create_task(load.stream(began, go_on, text)) for _ in range(streams)]
    all_began = asyncio.gather(*(began.acquire() for _ in range(streams)))
    await asyncio.wait([all_began, *reading], return_when=asyncio.FIRST_COMPLETED)
    assert all_began.done(), [task.exception() for task in reading if task.done()]
    asking = [asyncio.create_task(load.keep_asking(over)) for _ in range(2)]
    extra = ""
    for number in range(reloads):
        wrong = number % 3 == 2
        before, extra = extra, extra if wrong else f"guest{number}"
        broken = {"IDLE_TIMEOUT": "soon"} if wrong else {"IDLE_TIMEOUT": 100 + number}
        configured.write(keys=["alice", f"guest{number}"], MAX_QUEUE=1000 + number, **broken)
        answer = await load.http.post("/admin/reload", headers=ROOT)
        assert answer.status_code == (httpx.codes.BAD_REQUEST if wrong else httpx.codes.OK), answer.text
        assert await load.speak(extra) == httpx.codes.OK
        for refused in {before, f"guest{number}"} - {extra, ""}:
            assert await load.speak(refused) == httpx.codes.UNAUTHORIZED
    over.set()
    await asyncio.gather(*asking)
    assert load.spoken >= 2
    stats = (await load.http.get("/admin/stats", headers=ROOT)).json()
    assert min(len(stats["streams"]), streams) == min(50, streams)  # they are not over: the clients have not read them
    go_on.set()
    lengths = await asyncio.gather(*reading)  # a transfer that breaks raises here
    assert all(abs(n_bytes - len(alone.content)) < len(alone.content) / 100 for n_bytes in lengths), lengths
    await load.http.aclose()
    assert "web_worker_died" not in configured.said()
    assert "reload_not_taken" not in configured.said()
