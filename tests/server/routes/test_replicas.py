"""A cluster of two GPU workers in /admin/stats, /admin/vram, /admin/performance, /admin/events and /metrics."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.cluster.ingress_leases import IngressLeases
from server.cluster.worker_gateway import WorkerGateway
from server.engine import WebProcess, ZmqEngineClient
from server.engine.ray import RayEngineClient
from shared.performance import window_of
from shared.protocol import CacheStats, Counters, ModelStats, WindowCounts
from shared.settings import Settings
from tests.fakes import FakeWorker
from tests.server.engine.transports import LocalReplicas
from tests.server.running import SHARED_LOOP, listening, plain_client, until

pytestmark = SHARED_LOOP

PLACES = [("10.0.0.1", ["0"]), ("10.0.0.2", ["3"])]
BUCKETS = [{100: 9}, {60: 1}]
"""Times to first audio, by bucket: nine of about a second at one worker, a short one at the other."""


def windows(first_audio: dict[int, int]) -> list[WindowCounts]:
    """The windows of a model."""
    return [WindowCounts(minutes=minutes, first_audio=first_audio, underruns=[0] * 4) for minutes in (1, 15, 60)]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[FakeWorker]]:
    """Two GPU workers, each on a GPU of its own."""
    folder = tmp_path_factory.mktemp("workers")
    with FakeWorker(folder / "0.ipc", boot_id="boot-0") as one, FakeWorker(folder / "1.ipc", boot_id="boot-1") as other:
        for number, worker in enumerate((one, other)):
            device = msgspec.structs.replace(worker.snapshot.device, kind="cuda", name="NVIDIA H200")
            counts = {"espeak-ng": windows(BUCKETS[number])}
            worker.snapshot = msgspec.structs.replace(
                worker.snapshot,
                running=1 + number,
                requests=Counters(started=10 * (1 + number), failed=number),
                device=device,
                open_sockets=3,
                model_stats={"espeak-ng": ModelStats(audio_s=1.5)},
                performance_counts=counts,
                performance={model: [window_of(window) for window in found] for model, found in counts.items()},
                caches=[CacheStats(name="prompts", entries=1, bytes=5, hits=2, misses=1)],
            )
        yield [one, other]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(
    workers: list[FakeWorker], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx.AsyncClient]:
    """The application over two replicas."""
    replicas = LocalReplicas()

    @asynccontextmanager
    async def open_engine(web: WebProcess) -> AsyncIterator[RayEngineClient]:
        async with AsyncExitStack() as stack:
            for number, (worker, (node, gpus)) in enumerate(zip(workers, PLACES, strict=True)):
                leases = IngressLeases()
                client = ZmqEngineClient(worker.url, "", timeout_s=20.0, web=leases.as_web_process())
                await stack.enter_async_context(client)
                name = f"r{number}"
                replicas.gateways[name] = WorkerGateway(name, client, leases, node=node, gpus=gpus)
            yield await stack.enter_async_context(RayEngineClient(replicas, timeout_s=20.0, web=web))

    settings = Settings(audio_store_dir=Path(tmp_path_factory.mktemp("audio")))
    app = create_app(settings, open_engine)
    async with listening(app) as url, plain_client(url) as client:

        async def both() -> bool:
            replicas = (await client.get("/admin/stats")).json().get("replicas", [])
            return [replica["error"] for replica in replicas] == [None, None]

        await until(both)
        yield client


@pytest.mark.slow
async def test_stats(cluster: httpx.AsyncClient) -> None:
    """Sums, and each replica with its place."""
    stats = (await cluster.get("/admin/stats")).json()
    assert (stats["running"], stats["slots"], stats["requests"]["started"], stats["audio_s"]) == (3, 16, 30, 3.0)
    assert [(one["replica"], one["node"], one["gpus"], one["running"], one["error"]) for one in stats["replicas"]] == [
        ("r0", "10.0.0.1", ["0"], 1, None),
        ("r1", "10.0.0.2", ["3"], 2, None),
    ]
    assert [one["worker"]["boot_id"] for one in stats["replicas"]] == ["boot-0", "boot-1"]


async def test_vram(cluster: httpx.AsyncClient) -> None:
    """The sum of two GPUs, and each of them."""
    vram = (await cluster.get("/admin/vram")).json()
    assert vram["device"]["name"] == "2 x NVIDIA H200"
    assert vram["device"]["total_bytes"] == sum(one["device"]["total_bytes"] for one in vram["replicas"])
    assert [(one["node"], one["gpus"], one["device"]["name"]) for one in vram["replicas"]] == [
        (node, gpus, "NVIDIA H200") for node, gpus in PLACES
    ]


async def test_performance(cluster: httpx.AsyncClient) -> None:
    """The percentiles are those of all ten requests, and those of each replica stand beside them."""
    answer = (await cluster.get("/admin/performance")).json()
    together = answer["models"][0]["windows"][0]["first_audio_s"]
    one, other = (replica["models"][0]["windows"][0]["first_audio_s"] for replica in answer["replicas"])
    assert (together["count"], one["count"], other["count"]) == (10, 9, 1)
    assert together["p95"] == pytest.approx(one["p95"], rel=0.05)
    assert together["p50"] > 5 * other["p50"]


async def test_events(cluster: httpx.AsyncClient) -> None:
    """Dashboards get the same."""
    event = json.loads((await cluster.get("/admin/events", params={"once": "true"})).text.removeprefix("data: "))
    assert [one["replica"] for one in event["stats"]["replicas"]] == ["r0", "r1"]
    assert [one["replica"] for one in event["vram"]["replicas"]] == ["r0", "r1"]


async def test_metrics(cluster: httpx.AsyncClient) -> None:
    """Every GPU worker has its samples, with its place. What web processes count is there once."""
    text = (await cluster.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE tts_requests_running ") == 1

    def by_replica(name: str) -> dict[str, float]:
        return {sample.labels["replica"]: sample.value for sample in families[name].samples}

    assert by_replica("tts_worker_up") == {"r0": 1.0, "r1": 1.0}
    assert by_replica("tts_requests_running") == {"r0": 1.0, "r1": 2.0}
    place = {"replica": "r1", "node": "10.0.0.2", "gpu": "3"}
    started = next(one for one in families["tts_requests_started"].samples if one.labels == place)
    assert started.value == 20
    assert [(sample.labels, sample.value) for sample in families["tts_websockets"].samples] == [({}, 3.0)]
    hits = families["tts_cache_hits"].samples
    assert len([sample for sample in hits if sample.labels["cache"] == "prompts"]) == 2
    assert [sample.labels.get("replica") for sample in hits if sample.labels["cache"] == "catalog"] == [None]


async def test_a_worker_that_is_gone(cluster: httpx.AsyncClient, workers: list[FakeWorker]) -> None:
    """It stays in the list with the reason, and its figures leave the sums."""
    workers[1].stop()

    async def noticed() -> bool:
        return (await cluster.get("/admin/stats")).json()["replicas"][1]["error"] is not None

    await until(noticed)
    stats = (await cluster.get("/admin/stats")).json()
    assert (stats["running"], [one["replica"] for one in stats["replicas"]]) == (1, ["r0", "r1"])
    families = {family.name: family for family in text_string_to_metric_families((await cluster.get("/metrics")).text)}
    up = {sample.labels["replica"]: sample.value for sample in families["tts_worker_up"].samples}
    assert up == {"r0": 1.0, "r1": 0.0}
    assert [sample.labels["replica"] for sample in families["tts_slots"].samples] == ["r0"]
