"""API keys over a real socket: who may do what, and under which name requests queue."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.protocol import Speak
from tests.fakes import FakeWorker
from tests.server.running import SPEECH, serving

OPEN = ["/", "/health", "/ready", "/docs", "/redoc", "/openapi.json"]
KEYED = ["/v1/models", "/v1/audio/voices", "/metrics"]
ADMIN = ["/admin/config", "/admin/stats", "/admin/vram"]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A GPU worker that speaks canned tones."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        yield fake


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_keys(worker: FakeWorker) -> None:
    """Open paths stay open; the rest wants a key, administration an admin key; 401 and 403 are told apart."""
    async with serving(worker.url, api_keys=["user-1", "user-2"], admin_keys=["boss"]) as client:
        for path in OPEN:
            assert (await client.get(path)).status_code == 200, path
        for path in KEYED + ADMIN:
            for headers in (
                {},
                _bearer("wrong"),
                _bearer("user-"),
                {"authorization": "Bearer"},
                {"authorization": "user-1"},
            ):
                answer = await client.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
                assert answer.json()["error"]["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in KEYED:
            for key in ("user-1", "user-2", "boss"):
                assert (await client.get(path, headers=_bearer(key))).status_code == 200
        for path in ADMIN:
            assert (await client.get(path, headers=_bearer("boss"))).status_code == 200
            answer = await client.get(path, headers=_bearer("user-1"))
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
        assert (await client.post(SPEECH, json={"input": "x"})).status_code == 401
        assert not worker.of(Speak)


async def test_without_keys_everything_is_open(worker: FakeWorker) -> None:
    """A server for oneself needs none, and a made-up key does no harm and gives no place in the queue of its own."""
    async with serving(worker.url) as client:
        for path in OPEN + KEYED + ADMIN:
            assert (await client.get(path, headers=_bearer("sk-made-up"))).status_code == 200, path
        await client.post(SPEECH, json={"input": "x"}, headers=_bearer("sk-made-up"))
        assert worker.of(Speak)[0].client == "peer:127.0.0.1"


async def test_admin_keys_alone_leave_speech_open(worker: FakeWorker) -> None:
    """Only administration is closed then."""
    async with serving(worker.url, admin_keys=["boss"]) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/admin/config")).status_code == 401


async def test_requests_queue_by_key_and_the_key_stays_here(worker: FakeWorker) -> None:
    """Two keys are two clients; the worker never sees a key."""
    async with serving(worker.url, api_keys=["user-1", "user-2"]) as client:
        for key in ("user-1", "user-2", "user-1"):
            assert (await client.post(SPEECH, json={"input": "x"}, headers=_bearer(key))).status_code == 200
    first, second, third = [speak.client for speak in worker.of(Speak)]
    assert first == third != second
    assert "user" not in first + second


FOREIGN = "https://evil.example"


@pytest.mark.parametrize(
    ("headers", "origins", "fine"),
    [
        ({}, [], True),
        ({"origin": FOREIGN}, [], False),
        ({"origin": "null"}, [], False),
        ({"origin": FOREIGN}, ["https://good.example"], False),
        ({"origin": FOREIGN}, [FOREIGN], True),
        ({"origin": FOREIGN}, ["*"], True),
        ({"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}, [], True),
        ({"origin": "http://localhost:8000", "host": "localhost:8000"}, [], True),
        ({"origin": "http://[::1]:8000", "host": "[::1]:8000"}, [], True),
        ({"origin": "https://192.168.1.5", "host": "192.168.1.5"}, [], True),
        ({"origin": "http://127.0.0.1:3000", "host": "127.0.0.1:8000"}, [], False),
        ({"origin": "http://rebound.example:8000", "host": "rebound.example:8000"}, [], False),
        ({"origin": "http://localhost.example", "host": "localhost.example"}, [], False),
        ({"sec-fetch-site": "cross-site"}, [], False),
        ({"sec-fetch-site": "same-origin"}, [], True),
    ],
)
async def test_pages_of_other_sites_are_kept_out(
    worker: FakeWorker, headers: dict[str, str], origins: list[str], *, fine: bool
) -> None:
    """Where no key protects them, speech and administration answer no page but our own and those of listed origins."""
    async with serving(worker.url, cors_origins=origins) as client:
        spoken = await client.post(SPEECH, content=b'{"input": "x"}', headers=headers)
        cleaned = await client.post("/admin/cleanup", headers=headers)
        assert (await client.get("/health", headers=headers)).status_code == 200
    for answer in (spoken, cleaned):
        assert answer.status_code == (200 if fine else 403)
        if not fine:
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "foreign_origin")
            assert "TTS_CORS_ORIGINS" in error["message"]
    assert len(worker.of(Speak)) == fine


async def test_a_key_is_enough_for_any_page(worker: FakeWorker) -> None:
    """Who shows a key is no page that misuses somebody's browser; without one, open speech stays closed to pages."""
    async with serving(worker.url, admin_keys=["boss"]) as client:
        headers = {"origin": FOREIGN, **_bearer("boss")}
        assert (await client.post("/admin/cleanup", headers=headers)).status_code == 200
        assert (await client.post(SPEECH, json={"input": "x"}, headers=headers)).status_code == 200
        assert (await client.post(SPEECH, json={"input": "x"}, headers={"origin": FOREIGN})).status_code == 403


@pytest.mark.parametrize(
    ("origins", "allowed", "credentials"),
    [
        ([], None, None),
        (["*"], "*", None),
        (["https://good.example"], "https://good.example", "true"),
        (["https://other.example"], None, None),
    ],
)
async def test_cors(worker: FakeWorker, origins: list[str], allowed: str | None, credentials: str | None) -> None:
    """No other site may call by default; `*` never goes with credentials."""
    async with serving(worker.url, cors_origins=origins) as client:
        answer = await client.get("/v1/models", headers={"origin": "https://good.example"})
        asked = {"origin": "https://good.example", "access-control-request-method": "POST"}
        preflight = await client.options(SPEECH, headers=asked)
    assert answer.headers.get("access-control-allow-origin") == allowed
    if allowed is not None:
        assert answer.headers.get("access-control-allow-credentials") == credentials
    assert preflight.headers.get("access-control-allow-origin") == allowed
