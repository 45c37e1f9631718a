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
