"""RayEngineClient and the reports of replicas: how they are taken, and what their absence means."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from server.cluster.ingress_leases import IngressLeases
from server.cluster.worker_gateway import WorkerGateway
from server.engine.client import INITIAL_CREDIT
from server.engine.ray import RayEngineClient, ReplicaLostError
from server.engine.reports import ReplicaReport
from server.engine.web_process import WebProcess
from server.engine.zmq import ZmqEngineClient
from server.http.errors import ApiError
from shared.protocol import Segment, Speak
from tests.fakes import FakeWorker
from tests.server.engine.transports import LocalReplicas
from tests.server.running import becomes

REQUEST = Speak(
    id="r",
    client="alice",
    model="m",
    task="CustomVoice",
    segments=[Segment(text="Hello.")],
    credit=INITIAL_CREDIT,
)


class ManyReplicas(LocalReplicas):
    """Their reports come while `open` is set. Serve sends new requests to none that is in `taken_away`."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.open.set()
        self.taken_away: set[str] = set()
        self.updates = 0

    def ids(self) -> Sequence[str]:
        return [name for name in self.gateways if name not in self.taken_away]

    def update(self, reports: dict[str, ReplicaReport]) -> None:
        super().update(reports)
        self.updates += 1

    async def report(self, replica: str, request: bytes) -> bytes:
        await self.open.wait()
        return await super().report(replica, request)


@pytest.fixture
def replicas() -> ManyReplicas:
    """The replicas of the engine."""
    return ManyReplicas()


@pytest_asyncio.fixture
async def engine(tmp_path: Path, replicas: ManyReplicas) -> AsyncIterator[RayEngineClient]:
    """The client of 100 replicas, which share a GPU worker that goes on as it gets credit."""
    with FakeWorker(tmp_path / "w.ipc", chunks=100) as worker:
        async with ZmqEngineClient(worker.url, "", timeout_s=20.0) as client:
            for number in range(100):
                replicas.gateways[str(number)] = WorkerGateway(str(number), client, IngressLeases())
            async with RayEngineClient(replicas, timeout_s=20.0) as engine:
                await becomes(lambda: len(engine.reports()) == 100 and engine.unavailable() is None)
                yield engine


async def test_reports_are_taken_together(engine: RayEngineClient, replicas: ManyReplicas) -> None:
    """100 reports that come at once do not have all 100 replicas looked at 100 times."""
    replicas.open.clear()
    await becomes(lambda: engine._polling._awaited == 100)
    before = replicas.updates
    replicas.open.set()
    await becomes(lambda: engine._polling._awaited == 0)
    assert 1 <= replicas.updates - before <= 20


@pytest.mark.slow
async def test_a_replica_that_is_taken_away_is_no_loss(engine: RayEngineClient, replicas: ManyReplicas) -> None:
    """Its stream goes on to the end, and no WebSocket hears of a lost GPU worker; new requests are refused."""
    loss = asyncio.create_task(engine.worker_loss())
    speech = engine.speak(REQUEST)
    assert await asyncio.wait_for(speech.chunk(), 20)
    replicas.taken_away = set(replicas.gateways)
    await becomes(lambda: engine.unavailable() is not None)
    with pytest.raises(ApiError, match="No GPU worker is there"):
        engine.speak(REQUEST)
    chunks = 1
    while await asyncio.wait_for(speech.chunk(), 20) is not None:
        chunks += 1
    assert chunks == 100
    replicas.taken_away = set()
    await becomes(lambda: engine.unavailable() is None)
    assert not loss.done()
    loss.cancel()


class FailingReplicas(LocalReplicas):
    """The first reports do not come."""

    failures = 2

    async def report(self, replica: str, request: bytes) -> bytes:
        if self.failures:
            self.failures -= 1
            raise ReplicaLostError("the replica is gone")
        return await super().report(replica, request)


@pytest.mark.slow
async def test_refusals_outlive_a_report_that_fails(tmp_path: Path) -> None:
    """The next report takes them to the GPU worker."""
    leases, replicas = IngressLeases(), FailingReplicas()
    web = WebProcess(limit_hits=Counter(recordings=2))
    with FakeWorker(tmp_path / "w.ipc") as worker:
        async with ZmqEngineClient(worker.url, "", timeout_s=20.0, web=leases.as_web_process()) as connection:
            replicas.gateways["one"] = WorkerGateway("one", connection, leases)
            async with RayEngineClient(replicas, timeout_s=20.0, web=web):
                await becomes(lambda: not replicas.failures and worker.snapshot.limit_hits == {"recordings": 2})


async def test_a_start_that_is_cancelled_leaves_nothing_running() -> None:
    """While it waits for the first replica."""
    starting = asyncio.create_task(RayEngineClient(LocalReplicas(), timeout_s=20.0, start_timeout_s=60.0).__aenter__())
    await becomes(lambda: len(asyncio.all_tasks()) > len({starting, asyncio.current_task()}))
    starting.cancel()
    await asyncio.wait({starting})
    assert asyncio.all_tasks() == {asyncio.current_task()}
