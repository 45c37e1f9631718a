"""/admin: settings, figures, memory, eviction passes and the moving of models."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

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
from tests.server.running import SHARED_LOOP, Serve, serving

pytestmark = SHARED_LOOP

PASS = CleanupPass(
    timestamp=1000.5,
    vram_before_bytes=300 * 2**20,
    vram_after_bytes=100 * 2**20,
    models_checked=["a", "b"],
    models_unloaded=["a"],
)
CUSTOM = "qwen3-tts-1.7b-customvoice"
HUB = "Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice"


@pytest.fixture
def configured_worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A worker with settings of its own."""
    fake = FakeWorker(tmp_path / "w.ipc")
    fake.token = "sesame"  # noqa: S105 - a test's token
    fake.settings = {"idle_timeout": 7.5, "cleanup_enabled": False, "default_device": "cuda"}
    with fake:
        yield fake


async def test_config(configured_worker: FakeWorker) -> None:
    """The public settings by their public names and no secret; the worker's own settings replace ours."""
    async with serving(configured_worker.url, worker_token="sesame", default_model_size="small") as client:  # noqa: S106
        answer = await client.get("/admin/config")
    config = answer.json()
    assert {"api_title", "api_version", "host", "port", "idle_timeout", "cleanup_interval"} <= config.keys()
    assert config["default_model_size"] == "0.6B"
    assert config["attention_backend"] == "auto"
    assert (config["idle_timeout"], config["cleanup_enabled"], config["default_device"]) == (7.5, False, "cuda")
    assert "sesame" not in answer.text
    assert not {"api_keys", "admin_keys", "worker_token"} & config.keys()


@pytest.mark.slow
async def test_config_before_the_first_connection(tmp_path: Path) -> None:
    """Until the worker has reported its settings, ours are shown."""
    async with serving(f"ipc://{tmp_path}/none.ipc", ready=False, idle_timeout_s=9.0) as client:
        config = (await client.get("/admin/config")).json()
    assert (config["idle_timeout"], config["default_device"]) == (9.0, "auto")


async def test_stats(serve: Serve, worker: FakeWorker) -> None:
    """The worker's process, its requests and its streams."""
    stream = StreamState(
        id="r", model="espeak-ng", client="peer:::1", state="generating", age_s=1.5, audio_s=2.5, buffered_s=0.5
    )
    changes = {"running": 2, "queued": 1, "buffered": 4, "stalled": 3, "restarts": 4, "streams": [stream]}
    changes["waiting_for_text"] = 5
    worker.snapshot = msgspec.structs.replace(worker.snapshot, **changes)
    client = await serve()
    stats = (await client.get("/admin/stats")).json()
    assert stats["worker"] == {"pid": 4711, "boot_id": "boot-1", "uptime_s": 12.5, "restarts": 4}
    assert stats["streams"] == [msgspec.structs.asdict(stream)]
    assert (stats["running"], stats["queued"], stats["slots"]) == (2, 1, 8)
    assert (stats["buffered"], stats["stalled"], stats["waiting_for_text"]) == (4, 3, 5)
    assert stats["audio_buffer"] == {"used_bytes": 96_000, "budget_bytes": 480_000}
    assert stats["requests"] == {"started": 5, "finished": 3, "failed": 1, "cancelled": 1, "rejected": 0}


async def test_vram(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The memory of the device, of shared parts, of the host and of every model; as of now."""
    models = [msgspec.structs.replace(model, pinned=True) for model in worker.snapshot.models]
    worker.snapshot = msgspec.structs.replace(worker.snapshot, models=models)
    answer = (await client.get("/admin/vram")).json()
    assert answer["device"]["others_bytes"] == 5_000
    assert answer["shared"] == {"codec": 123}
    assert answer["host"]["offloaded_bytes"] == 500
    assert answer["models"] == [
        {
            "id": spec.id,
            "state": "resident" if spec.engine == "espeak" else "absent",
            "bytes": {},
            "host_bytes": 0,
            "last_used": 1.0,
            "idle_s": 2.0,
            "references": 0,
            "pinned": True,
            "keep_alive_s": None,
            "detail": "",
        }
        for spec in worker.catalog
    ]


async def test_cleanup_before_the_first_pass(serve: Serve) -> None:
    """The figures are null, and the status says that the eviction of idle models is off."""
    client = await serve(cleanup_enabled=False)
    answer = (await client.post("/admin/cleanup")).json()
    assert answer["status"] == "disabled"
    assert answer["vram_freed_mb"] is None
    assert answer["models_unloaded"] == []


async def test_cleanup_reports_the_last_pass(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Without `trigger` no pass starts; the figures are those of the last one."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, cleanup=PASS)
    answer = (await client.post("/admin/cleanup?trigger=false")).json()
    assert answer == {
        "cleanup_enabled": True,
        "cleanup_interval": 30.0,
        "idle_timeout": 300.0,
        "status": "running",
        "timestamp": 1000.5,
        "vram_before_mb": 300.0,
        "vram_after_mb": 100.0,
        "vram_freed_mb": 200.0,
        "models_unloaded": ["a"],
    }
    assert not worker.of(Call)


async def test_cleanup_figures_agree(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The freed memory is the difference of the other two figures, to the last digit."""
    done = msgspec.structs.replace(PASS, vram_before_bytes=15_728, vram_after_bytes=5_243)
    worker.on_call = lambda call, _payload: Reply(id=call.id, cleanup=done)
    answer = (await client.post("/admin/cleanup?trigger=true")).json()
    figures = answer["vram_before_mb"], answer["vram_after_mb"], answer["vram_freed_mb"]
    assert figures == (0.01, 0.01, 0.0)


async def test_cleanup_now(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """With `trigger` a pass runs, and the answer has its figures."""
    worker.on_call = lambda call, _payload: Reply(id=call.id, cleanup=PASS)
    answer = (await client.post("/admin/cleanup?trigger=true")).json()
    assert answer["status"] == "completed"
    assert answer["message"]
    assert answer["models_checked"] == ["a", "b"]
    assert isinstance(worker.of(Call)[-1].action, Cleanup)


@pytest.mark.parametrize("name", [CUSTOM, HUB])
@pytest.mark.parametrize(
    ("verb", "action"),
    [
        ("load", LoadModel(model=CUSTOM)),
        ("unload", UnloadModel(model=CUSTOM)),
        ("pin", PinModel(model=CUSTOM, pinned=True)),
        ("unpin", PinModel(model=CUSTOM, pinned=False)),
    ],
)
async def test_moving_a_model(
    client: httpx.AsyncClient, worker: FakeWorker, name: str, verb: str, action: object
) -> None:
    """Each action reaches the worker, by id and by Hugging Face id; the answer is the model's new status."""
    status = ModelStatus(id=CUSTOM, state="resident", pinned=True)
    worker.on_call = lambda call, _payload: Reply(id=call.id, model=status)
    answer = await client.post(f"/admin/models/{name}/{verb}")
    assert answer.json() == msgspec.to_builtins(status)
    assert worker.of(Call)[-1].action == action


@pytest.mark.parametrize(("given", "seconds"), [("5m", 300.0), ("-1", -1.0), ("0", 0.0), ("", None)])
async def test_loading_for_a_while(
    client: httpx.AsyncClient, worker: FakeWorker, given: str, seconds: float | None
) -> None:
    """An admin says how long a model stays, in the words of a speech request."""
    worker.on_call = lambda call, _payload: Reply(id=call.id, model=ModelStatus(id=CUSTOM, state="resident"))
    answer = await client.post(f"/admin/models/{CUSTOM}/load?keep_alive={given}")
    assert answer.status_code == 200
    assert worker.of(Call)[-1].action == LoadModel(model=CUSTOM, keep_alive_s=seconds)


@pytest.mark.parametrize(("action", "given"), [("load", "soon"), ("pin", "5m")])
async def test_a_wrong_keep_alive(client: httpx.AsyncClient, worker: FakeWorker, action: str, given: str) -> None:
    """A time that is none is refused, and so is one that would have no effect."""
    answer = await client.post(f"/admin/models/{CUSTOM}/{action}?keep_alive={given}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "keep_alive")
    assert not worker.of(Call)


async def test_a_busy_model_is_not_unloaded(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The worker's refusal is a 409."""
    worker.on_call = lambda call, _payload: Failed(id=call.id, code="model_busy", message="it speaks")
    answer = await client.post("/admin/models/espeak-ng/unload")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "model_busy"
