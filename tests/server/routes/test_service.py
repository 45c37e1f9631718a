"""Health, models, administration and documentation over a real socket, against a canned worker."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
import pytest_asyncio

from shared.protocol import (
    Call,
    Cleanup,
    CleanupPass,
    Failed,
    LoadModel,
    ModelStatus,
    PinModel,
    Reply,
    StreamState,
    UnloadModel,
)
from tests.fakes import FakeWorker
from tests.server.running import serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

PASS = CleanupPass(
    timestamp=1000.5,
    vram_before_bytes=300 * 2**20,
    vram_after_bytes=100 * 2**20,
    models_checked=["a", "b"],
    models_unloaded=["a"],
)
HUB = "Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> FakeWorker:
    """The worker that all tests of this module talk to."""
    path: Path = tmp_path_factory.mktemp("service")
    return FakeWorker(path / "w.ipc")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(worker: FakeWorker) -> AsyncIterator[httpx.AsyncClient]:
    """A server without keys, some secrets set."""
    settings = {"worker_token": "sesame", "api_title": "A title", "default_model_size": "small"}
    worker.token = "sesame"  # noqa: S105 - a test's token
    worker.settings = {"idle_timeout": 7.5, "cleanup_interval": 2.5, "cleanup_enabled": False, "default_device": "cuda"}
    with worker:
        async with serving(worker.url, **settings) as client:
            yield client


async def test_root(client: httpx.AsyncClient) -> None:
    """What it is and where to go."""
    answer = (await client.get("/")).json()
    assert answer.pop("version")
    assert answer == {
        "status": "ok",
        "service": "A title",
        "docs": "/docs",
        "endpoints": {"speech": "/v1/audio/speech", "models": "/v1/models", "voices": "/v1/audio/voices"},
    }


async def test_health(client: httpx.AsyncClient) -> None:
    """A JSON object with a time, never the bare text OK."""
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
        ({"default_model": "qwen3-tts-1.7b-base"}, "model_unavailable", "weights are missing"),
        ({"default_model": "none"}, "model_unavailable", "none"),
    ],
)
async def test_not_ready(
    worker: FakeWorker, client: httpx.AsyncClient, changes: dict[str, object], code: str, words: str
) -> None:
    """A worker that is there but cannot serve the default model is a 503 with the reason."""
    before = worker.snapshot
    states = [
        ModelStatus(id=state.id, state="unavailable", detail="the weights are missing") if "base" in state.id else state
        for state in before.models
    ]
    worker.snapshot = msgspec.structs.replace(before, models=states, uptime_s=99.0, **changes)
    try:
        await _seen(client, uptime_s=99.0)
        answer = await client.get("/ready")
    finally:
        worker.snapshot = before
        await _seen(client, uptime_s=before.uptime_s)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == code
    assert words in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]
    assert (await client.get("/ready")).json()["status"] == "ready"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/audio/models"])
async def test_models(client: httpx.AsyncClient, worker: FakeWorker, path: str) -> None:
    """OpenAI's list, Open WebUI's list, and where each model is."""
    answer = (await client.get(path)).json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["models"]] == [spec.id for spec in worker.catalog]
    espeak = answer["data"][0]
    assert espeak["object"] == "model"
    assert espeak["state"] == "resident"
    assert espeak["task"] == "CustomVoice"
    assert {"tts-1", "tts-1-hd", "gpt-4o-mini-tts", "espeak"} == set(espeak["aliases"])
    assert "english" in espeak["languages"]
    assert len(espeak["voices"]) >= 20


@pytest.mark.parametrize("name", ["qwen3-tts-1.7b-customvoice", HUB, HUB.lower(), HUB.replace("/", "%2F")])
@pytest.mark.parametrize("prefix", ["/v1/models/", "/v1/audio/models/"])
async def test_one_model(client: httpx.AsyncClient, prefix: str, name: str) -> None:
    """By id or by Hugging Face id, whose slash may be written either way."""
    answer = (await client.get(prefix + name)).json()
    assert answer["id"] == "qwen3-tts-1.7b-customvoice"
    assert (await client.get(prefix + "tts-1")).json()["id"] == "espeak-ng"


async def test_config(client: httpx.AsyncClient) -> None:
    """The settings in force under the contract's names, and no secret among them."""
    answer = await client.get("/admin/config")
    config = answer.json()
    names = "api_title api_version host port idle_timeout cleanup_interval cleanup_enabled default_device"
    assert set(names.split()) <= config.keys()
    assert config["default_model_size"] == "0.6B"
    assert config["attention_backend"] == "sdpa"
    # What the worker acts by is told as the worker has it, wherever that came from.
    assert (config["idle_timeout"], config["cleanup_interval"], config["cleanup_enabled"]) == (7.5, 2.5, False)
    assert config["default_device"] == "cuda"
    assert "sesame" not in answer.text
    assert not {"api_keys", "admin_keys", "worker_token"} & config.keys()


async def test_config_before_the_worker_was_met(tmp_path: Path) -> None:
    """As long as only this side's settings are known, they are told."""
    async with serving(f"ipc://{tmp_path}/none.ipc", ready=False, idle_timeout_s=9.0) as client:
        config = (await client.get("/admin/config")).json()
    assert (config["idle_timeout"], config["default_device"]) == (9.0, "auto")


async def test_stats(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """What the worker does, with what it says this very moment."""
    stream = StreamState(id="r", model="espeak-ng", client="peer:::1", state="speaking", age_s=1.5, audio_s=2.5)
    worker.snapshot = msgspec.structs.replace(worker.snapshot, running=2, queued=1, restarts=4, streams=[stream])
    await _seen(client, running=2)
    stats = (await client.get("/admin/stats")).json()
    assert stats["worker"] == {"pid": 4711, "boot_id": "boot-1", "uptime_s": 12.5, "restarts": 4}
    assert stats["streams"] == [msgspec.structs.asdict(stream)]
    assert (stats["running"], stats["queued"], stats["slots"]) == (2, 1, 8)
    assert stats["requests"] == {"started": 5, "finished": 3, "failed": 1, "cancelled": 1, "rejected": 0}


async def test_vram(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The device's figures, what is shared, the host's, and every model."""
    answer = (await client.get("/admin/vram")).json()
    assert answer["device"]["others_bytes"] == 5_000
    assert answer["shared"] == {"codec": 123}
    assert answer["host"]["offloaded_bytes"] == 500
    assert [model["id"] for model in answer["models"]] == [spec.id for spec in worker.catalog]
    fields = {"id", "state", "bytes", "last_used", "idle_s", "references", "pinned", "keep_alive_s"}
    assert fields <= answer["models"][0].keys()


async def test_where_a_model_is_now(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Whoever has just moved a model sees it moved, whichever web worker is asked."""
    for state in ("loading", "resident"):
        models = [msgspec.structs.replace(model, state=state) for model in worker.snapshot.models]
        worker.snapshot = msgspec.structs.replace(worker.snapshot, models=models)
        assert {model["state"] for model in (await client.get("/v1/models")).json()["data"]} == {state}
        models = [msgspec.structs.replace(model, pinned=state == "resident") for model in models]
        worker.snapshot = msgspec.structs.replace(worker.snapshot, models=models)
        pinned = {model["pinned"] for model in (await client.get("/admin/vram")).json()["models"]}
        assert pinned == {state == "resident"}


async def test_cleanup_before_the_first_pass(client: httpx.AsyncClient) -> None:
    """Nothing was freed yet, and nothing is invented."""
    answer = (await client.post("/admin/cleanup")).json()
    assert answer["status"] == "disabled"
    assert answer["vram_freed_mb"] is None
    assert answer["models_unloaded"] == []


async def test_cleanup_reports_the_last_pass(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The figures of the last pass, without starting one."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, cleanup=PASS, running=7)
    await _seen(client, running=7)
    answer = (await client.post("/admin/cleanup?trigger=false")).json()
    assert answer == {
        "cleanup_enabled": False,
        "cleanup_interval": 2.5,
        "idle_timeout": 7.5,
        "status": "disabled",
        "timestamp": 1000.5,
        "vram_before_mb": 300.0,
        "vram_after_mb": 100.0,
        "vram_freed_mb": 200.0,
        "models_unloaded": ["a"],
    }
    assert not [call for call in worker.of(Call) if isinstance(call.action, Cleanup)]


async def test_cleanup_figures_add_up(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """What was freed is what was there before less what is there after, to the last digit that is shown."""
    done = msgspec.structs.replace(PASS, vram_before_bytes=15_728, vram_after_bytes=5_243)
    worker.on_call = lambda call, _payload: Reply(id=call.id, cleanup=done)
    answer = (await client.post("/admin/cleanup?trigger=true")).json()
    figures = answer["vram_before_mb"], answer["vram_after_mb"], answer["vram_freed_mb"]
    assert figures == (0.01, 0.01, 0.0)


async def test_cleanup_now(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A pass is run, and its own figures come back."""
    worker.on_call = lambda call, _payload: Reply(id=call.id, cleanup=PASS)
    answer = (await client.post("/admin/cleanup?trigger=true")).json()
    assert answer["status"] == "completed"
    assert answer["message"]
    assert answer["models_checked"] == ["a", "b"]
    assert isinstance(worker.of(Call)[-1].action, Cleanup)


@pytest.mark.parametrize("name", ["qwen3-tts-1.7b-customvoice", HUB])
@pytest.mark.parametrize(
    ("verb", "action"),
    [
        ("load", LoadModel(model="qwen3-tts-1.7b-customvoice")),
        ("unload", UnloadModel(model="qwen3-tts-1.7b-customvoice")),
        ("pin", PinModel(model="qwen3-tts-1.7b-customvoice", pinned=True)),
        ("unpin", PinModel(model="qwen3-tts-1.7b-customvoice", pinned=False)),
    ],
)
async def test_moving_a_model(
    client: httpx.AsyncClient, worker: FakeWorker, name: str, verb: str, action: object
) -> None:
    """Each verb reaches the worker, by id and by Hugging Face id, and the answer says where the model is then."""
    state = ModelStatus(id="qwen3-tts-1.7b-customvoice", state="resident", pinned=True)
    worker.on_call = lambda call, _payload: Reply(id=call.id, model=state)
    answer = await client.post(f"/admin/models/{name}/{verb}")
    assert answer.json()["state"] == "resident"
    assert worker.of(Call)[-1].action == action


async def test_a_busy_model_is_not_unloaded(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The worker's refusal is a 409."""
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="model_busy", message="it speaks")
    answer = await client.post("/admin/models/espeak-ng/unload")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "model_busy"


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_pages_load_nothing_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    """Every script and style sheet that a page names is served here, and its policy allows nothing else."""
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("<!doctype html>", "")
    named = [part.split('"')[0] for part in answer.text.split('"/docs/static/')[1:]]
    assert named
    for name in named:
        script = await client.get("/docs/static/" + name.split('"')[0])
        assert script.status_code == 200
        assert script.headers["content-type"].split(";")[0] in {"text/javascript", "text/css"}


async def test_openapi(client: httpx.AsyncClient) -> None:
    """Every operation has an id, a summary, and errors of OpenAI's shape; limits of fields are in it."""
    document = (await client.get("/openapi.json")).json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) >= 19
    for operation in operations:
        assert operation["summary"]
        for status, answer in operation["responses"].items():
            if status != "200":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    fields = document["components"]["schemas"]["SpeechRequest"]["properties"]
    assert {"type": "number", "minimum": 0.25, "maximum": 4.0} in fields["speed"]["anyOf"]
    assert (fields["input"]["maxLength"], fields["response_format"]["default"]) == (4096, "mp3")
    either = document["components"]["schemas"]["SpeechRequest"]["anyOf"]
    assert either == [{"required": ["input"]}, {"required": ["text"]}]
    assert fields["text"]["maxLength"] == 4096
    spoken = document["paths"]["/v1/audio/speech"]["post"]["responses"]["200"]["content"]
    assert {"audio/mpeg", "audio/ogg", "audio/aac", "audio/flac", "audio/wav", "audio/pcm"} < spoken.keys()


async def test_request_ids(client: httpx.AsyncClient) -> None:
    """A sane id of the client's comes back, another one is replaced; errors carry one, too."""
    assert (await client.get("/", headers={"x-request-id": "abc-1.2"})).headers["x-request-id"] == "abc-1.2"
    replaced = (await client.get("/none", headers={"x-request-id": "a b"})).headers["x-request-id"]
    assert len(replaced) == 32


async def _seen(client: httpx.AsyncClient, **wanted: object) -> None:
    """Wait until the server has heard a snapshot with these figures."""
    async with httpx.AsyncClient(base_url=client.base_url) as other:
        for _ in range(200):
            stats = (await other.get("/admin/stats")).json()
            if all(stats.get(name, stats["worker"].get(name)) == value for name, value in wanted.items()):
                return
    raise AssertionError(f"{wanted} was not seen")
