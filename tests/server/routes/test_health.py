"""The questions of probes: /, /health, /ready and the probes of other clients."""

import httpx
import msgspec
import pytest

from shared.protocol import PublicState
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, Serve, responds

pytestmark = SHARED_LOOP


async def test_root(serve: Serve) -> None:
    """The service's name, version and most important paths."""
    client = await serve(api_title="A title")
    answer = (await client.get("/")).json()
    assert answer.pop("version")
    assert answer == {
        "status": "healthy",
        "service": "A title",
        "docs": "/docs",
        "endpoints": {"speech": "/v1/audio/speech", "models": "/v1/audio/models", "voices": "/v1/audio/voices"},
        "limits": {
            "input_chars": 4096,
            "recording_bytes": 10 * 2**20,
            "recording_min_s": 1.0,
            "recording_max_s": 60.0,
        },
        "requires": {"key": False, "admin_key": False, "consent": False},
    }


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"api_keys": ["a"]}, {"key": True, "admin_key": True}),
        ({"admin_keys": ["b"]}, {"key": False, "admin_key": True}),
    ],
)
async def test_root_says_what_it_requires(
    serve: Serve, settings: dict[str, list[str]], needed: dict[str, bool]
) -> None:
    """A client learns without a key which keys it needs, and whether a clone needs a consent."""
    answer = (await (await serve(**settings, require_consent=True)).get("/")).json()
    assert answer["requires"] == needed | {"consent": True}


async def test_the_paths_of_root_begin_with_the_prefix(client: httpx.AsyncClient) -> None:
    """Below the path of a proxy, they are those of the client."""
    answer = (await client.get("/", headers={"x-forwarded-prefix": "/tts"})).json()
    assert (answer["docs"], answer["endpoints"]["models"]) == ("/tts/docs", "/tts/v1/audio/models")


async def test_health(client: httpx.AsyncClient) -> None:
    """A JSON object with a timestamp: some clients cannot read the bare text OK."""
    answer = (await client.get("/health")).json()
    assert answer["status"] == "healthy"
    assert answer["timestamp"] > 1_700_000_000


async def test_probe_of_wyoming_openai(client: httpx.AsyncClient) -> None:
    """Its test answers ok."""
    assert (await client.get("/v1/test")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"accepting": False}, "shutting_down", "shutting down"),
        ({"default_model": "none"}, "model_unavailable", "none"),
    ],
)
async def test_not_ready(
    client: httpx.AsyncClient, worker: FakeWorker, changes: dict[str, object], code: str, words: str
) -> None:
    """A worker that is connected but cannot serve the default model is a 503 with the reason."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, **changes)
    assert await responds(client, "/v1/audio/voices/none", 404)  # waits for a fresh snapshot
    answer = await client.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == code
    assert words in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]


@pytest.mark.parametrize(
    ("state", "detail", "status"),
    [
        ("resident", "", 200),
        ("absent", "", 200),
        ("offloaded", "", 200),
        ("loading", "", 200),
        ("unavailable", "there are no weights", 503),
        ("absent", "vocab.json is damaged.", 503),
        ("offloaded", "it needs 7 MiB", 503),
        ("loading", "fetching model.safetensors", 503),
    ],
)
async def test_ready(
    worker: FakeWorker, client: httpx.AsyncClient, state: PublicState, detail: str, status: int
) -> None:
    """Ready, if the next request would load the default model; not ready, if its last load failed or takes long."""
    models = [
        msgspec.structs.replace(model, state=state, detail=detail)
        if model.id == worker.snapshot.default_model
        else model
        for model in worker.snapshot.models
    ]
    worker.snapshot = msgspec.structs.replace(worker.snapshot, models=models)
    assert await responds(client, "/v1/models")
    answer = await client.get("/ready")
    assert answer.status_code == status
    if status != 200:
        error = answer.json()["error"]
        assert error["code"] == "model_unavailable"
        assert detail.rstrip(".") in error["message"]
        assert ".." not in error["message"]
