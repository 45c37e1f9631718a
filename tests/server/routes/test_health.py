"""/ready: 200 only where the default model can be served."""

from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
import pytest_asyncio

from shared.protocol import PublicState
from tests.fakes import FakeWorker
from tests.server.running import serving, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> FakeWorker:
    """The worker that all tests of this module talk to."""
    return FakeWorker(tmp_path_factory.mktemp("health") / "w.ipc")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(worker: FakeWorker) -> AsyncIterator[httpx.AsyncClient]:
    """A server of that worker."""
    with worker:
        async with serving(worker.url) as client:
            yield client


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
    """A model that would come if it were asked for is as good as there; one that failed to come, or is far, is not."""
    before = worker.snapshot
    models = [
        msgspec.structs.replace(model, state=state, detail=detail) if model.id == before.default_model else model
        for model in before.models
    ]
    uptime_s = before.uptime_s + 1
    worker.snapshot = msgspec.structs.replace(before, models=models, uptime_s=uptime_s)

    async def seen() -> bool:
        stats: float = (await client.get("/admin/stats")).json()["worker"]["uptime_s"]
        return stats == uptime_s

    await until(seen)
    answer = await client.get("/ready")
    assert answer.status_code == status
    if status != 200:
        error = answer.json()["error"]
        assert error["code"] == "model_unavailable"
        assert detail.rstrip(".") in error["message"]
        assert ".." not in error["message"]
