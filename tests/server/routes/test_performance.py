"""GET /admin/performance: the percentiles in the snapshot."""

import httpx
import msgspec

from shared.protocol import Distribution, WindowPerformance
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP

pytestmark = SHARED_LOOP

WINDOW = WindowPerformance(
    minutes=1,
    first_audio_s=Distribution(count=4, p50=0.12, p95=0.3, p99=0.31),
    real_time_factor=Distribution(count=3, p50=0.2, p95=0.4, p99=0.41),
    queue_wait_s=Distribution(),
    batch_size=Distribution(count=40, p50=1.0, p95=3.0, p99=4.0),
    streams=3,
    underruns={"0": 2, "100": 1, "300": 0, "1000": 0},
)


async def test_performance(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The windows of each model, as the worker reports them; null where there is no value."""
    assert (await client.get("/admin/performance")).json() == {"models": []}
    worker.snapshot = msgspec.structs.replace(worker.snapshot, performance={"espeak-ng": [WINDOW]})
    await client.get("/admin/vram")  # a snapshot of now
    answer = (await client.get("/admin/performance")).json()
    assert answer == {"models": [{"id": "espeak-ng", "windows": [msgspec.to_builtins(WINDOW)]}]}
    nothing = {"count": 0, "p50": None, "p95": None, "p99": None}
    assert answer["models"][0]["windows"][0]["queue_wait_s"] == nothing
