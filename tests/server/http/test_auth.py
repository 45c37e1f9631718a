"""API keys: which routes need which key, and under which fairness key requests queue."""

from shared.protocol import Speak
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, Serve

pytestmark = SHARED_LOOP

OPEN = ["/", "/health", "/ready", "/docs", "/redoc", "/openapi.json"]
KEYED = ["/v1/models", "/v1/audio/voices", "/metrics"]
ADMIN = ["/admin/config", "/admin/stats", "/admin/vram", "/admin/performance"]


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_keys(serve: Serve, worker: FakeWorker) -> None:
    """Open paths need no key, the others an API key, /admin an admin key; 401 and 403 are distinct."""
    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
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


async def test_without_configured_keys_everything_is_open(serve: Serve, worker: FakeWorker) -> None:
    """Any key is accepted then, and the client's address remains its fairness key."""
    client = await serve()
    for path in OPEN + KEYED + ADMIN:
        assert (await client.get(path, headers=_bearer("sk-made-up"))).status_code == 200, path
    await client.post(SPEECH, json={"input": "x"}, headers=_bearer("sk-made-up"))
    assert worker.of(Speak)[0].client == "peer:127.0.0.1"


async def test_admin_keys_alone_leave_speech_open(serve: Serve) -> None:
    """With admin keys and no API keys, only /admin needs a key."""
    client = await serve(admin_keys=["boss"])
    assert (await client.get("/v1/models")).status_code == 200
    assert (await client.get("/admin/config")).status_code == 401


async def test_the_fairness_key_is_a_digest_of_the_api_key(serve: Serve, worker: FakeWorker) -> None:
    """Two keys are two clients, and the GPU worker never sees a key."""
    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
    for key in ("user-1", "user-2", "user-1"):
        assert (await client.post(SPEECH, json={"input": "x"}, headers=_bearer(key))).status_code == 200
    first, second, third = [speak.client for speak in worker.of(Speak)]
    assert first == third != second
    assert "user" not in first + second
