"""A key appears nowhere: a service is driven with keys, right and wrong ones, in right and in wrong places."""

import contextlib
import io
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import websockets
from websockets.sync.client import connect

from server.http.keys import digest_of, new_key
from tests.system.collector import Collector, running_collector
from tests.system.service import Service, children_of, eventually, running_service

SHORT: Final = "a-key-of-the-short-form-1"
ADMIN: Final = "an-admin-key-of-the-short-form-2"
OF_FILE: Final = new_key()
WRONG: Final = new_key()
WRONG_WORD: Final = "a-key-that-nobody-has-3"
TOKEN: Final = "a-token-of-the-worker-4"  # noqa: S105 -- of this test
KNOWN: Final = (SHORT, ADMIN, OF_FILE)
ALL: Final = (*KNOWN, WRONG, WRONG_WORD, TOKEN)

SPEECH: Final = "/v1/audio/speech"
BODY: Final = {"input": "Hello.", "response_format": "pcm"}
READING: Final = (
    *(
        "/",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/asyncapi.json",
        "/docs",
        "/v1/models",
        "/v1/audio/voices",
    ),
    *("/admin/config", "/admin/stats", "/admin/vram", "/admin/performance", "/admin/cache", "/admin/usage"),
    *("/v1/audio/voices", "/admin/cleanup", "/admin/events?once=true", "/v2/nothing"),
)

HEADERS: Final = (
    *("x-request-id", "x-api-version", "x-deadline-ms", "traceparent", "tracestate", "content-encoding", "origin"),
    *("x-forwarded-for", "x-forwarded-host", "host", "range", "accept", "user-agent", "cookie"),
)
FIELDS: Final = ("model", "voice", "response_format", "language", "speed", "seed", "input_format", "ref_audio")


class Driver:
    """Sends requests, and keeps all that comes back. `asked` counts them."""

    def __init__(self, service: Service) -> None:
        self._http = service.http
        self._port = service.port
        self.heard = io.StringIO()
        self.statuses: set[int] = set()

    def ask(self, method: str, path: str, **options: Any) -> None:
        """Send a request."""
        answer = self._http.request(method, path, **options)
        self.statuses.add(answer.status_code)
        self.heard.write(f"{dict(answer.headers)}\n{answer.content.decode('latin-1')}\n")

    def talk(self, path: str, *messages: Any, **options: Any) -> None:
        """Open a WebSocket, say something, and listen until the service closes it."""
        url = f"ws://127.0.0.1:{self._port}{path}"
        with contextlib.suppress(websockets.InvalidStatus), connect(url, proxy=None, **options) as socket:
            # A socket whose first message has a wrong key is closed while the others are still being sent.
            with contextlib.suppress(websockets.ConnectionClosed):
                for message in messages:
                    socket.send(message if isinstance(message, str) else json.dumps(message))
                while True:
                    self.heard.write(f"{socket.recv(60)!r}\n")
            socket.close()
            self.heard.write(f"{socket.close_reason}\n")

    def where_keys_belong(self, key: str) -> None:
        """Send the key in every way there is."""
        for headers in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"xi-api-key": key}):
            self.ask("POST", SPEECH, json=BODY, headers=headers)
            self.ask("POST", "/v1/text-to-speech/alloy", json={"text": "Hello."}, headers=headers)
        for path in READING:
            self.ask("GET", path, headers={"authorization": f"Bearer {key}"})
        first = {"type": "session.config", "api_key": key, "response_format": "pcm"}
        rest = ({"type": "input.text", "text": "Hello."}, {"type": "input.done"}, {"type": "session.close"})
        self.talk(f"{SPEECH}/stream", first, *rest)
        self.talk(f"{SPEECH}/stream", {"type": "nonsense"}, additional_headers={"authorization": f"Bearer {key}"})
        self.talk(f"{SPEECH}/stream", "{", subprotocols=["realtime", f"openai-insecure-api-key.{key}"])
        self.talk("/v1/text-to-speech/alloy/stream-input", {"text": " ", "xi_api_key": key}, {"text": ""})

    def where_none_belongs(self, key: str) -> None:
        """Put the key where clients, proxies and people put it by mistake."""
        right = {"authorization": f"Bearer {SHORT}"}
        quoted = urllib.parse.quote(key)
        for path in (f"/{key}", f"/v1/models/{key}", f"/v1/audio/voices/{key}", f"{SPEECH}/{key}", f"/admin/{key}"):
            self.ask("GET", path, headers=right)
            self.ask("DELETE", path, headers={"authorization": f"Bearer {ADMIN}"})
        self.ask("GET", f"/v1/models?key={quoted}", headers=right)
        self.ask("GET", f"{SPEECH}/{key}/audio")
        self.ask(key.upper(), SPEECH, headers=right)
        for name in HEADERS:
            self.ask("POST", SPEECH, json=BODY, headers={**right, name: key})
        self.ask("POST", SPEECH, json=BODY, headers={"authorization": f"Basic {key}"})
        self.ask("POST", SPEECH, json=BODY, headers={"authorization": key})
        for field in (*FIELDS, key):
            self.ask("POST", SPEECH, json={**BODY, field: key}, headers=right)
        self.ask("POST", SPEECH, content=f'{{"input": {key}', headers={**right, "content-type": "application/json"})
        self.ask("POST", SPEECH, content=key, headers={**right, "content-type": f"text/{key}"})
        self.ask("POST", f"{SPEECH}/batch", json={"items": [{"input": "Hello.", "voice": key}]}, headers=right)
        self.ask("POST", "/v1/audio/voices", data={"name": "n", "type": key, key: key}, headers=right)
        self.ask("POST", f"/v1/text-to-speech/{key}", json={"text": "Hello."}, headers={"xi-api-key": SHORT})
        self.talk(f"/v1/{key}", additional_headers=right)
        self.talk(f"{SPEECH}/stream", {"type": key}, {"type": "session.config", "voice": key}, additional_headers=right)


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector for the traces."""
    with running_collector() as collector:
        yield collector


def _command_lines(service: Service) -> str:
    pids = [service.process.pid, *children_of(service.process.pid)]
    return "".join(Path(f"/proc/{pid}/cmdline").read_text(errors="replace") for pid in pids)


@pytest.mark.timeout(300)
def test_a_key_appears_nowhere(tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, the log, files, metrics, traces and lists of processes have no key."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    keys_file = tmp_path / "keys.toml"
    keys_file.write_text(f'[alice]\nhash = "{digest_of(OF_FILE)}"\nrole = "admin"\n')
    settings = {
        "API_KEYS": SHORT,
        "ADMIN_KEYS": ADMIN,
        "KEYS_FILE": keys_file,
        "WORKER_TOKEN": TOKEN,
        "LOG_LEVEL": "debug",
        "OTLP_ENDPOINT": collector.url,
        "AUDIO_STORE_DIR": tmp_path / "audio",
    }
    with running_service(tmp_path, **settings) as service:
        driver = Driver(service)
        for key in (*KNOWN, WRONG, WRONG_WORD):
            driver.where_keys_belong(key)
        for key in (*KNOWN, WRONG):
            driver.where_none_belongs(key)
        eventually(lambda: collector.spans, 60, "traces came")
        listed = _command_lines(service)
    assert {200, 400, 401, 403, 404} <= driver.statuses
    assert 500 not in driver.statuses
    found = {"answers": driver.heard.getvalue(), "processes": listed, "traces": str(collector.bodies)}
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        found[str(file.relative_to(tmp_path))] = file.read_bytes().decode("latin-1")
    assert service.log.name in found
    for place, text in found.items():
        for key in ALL:
            at = text.lower().find(key.lower())
            assert at < 0, f"{place} has a key: {text[max(0, at - 300) : at + 100]}"
