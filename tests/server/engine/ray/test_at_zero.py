"""RayEngineClient in a cluster that scales to zero."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from server.cluster.ingress_leases import IngressLeases
from server.cluster.worker_gateway import WorkerGateway
from server.engine.ray import Frames, RayEngineClient
from server.engine.zmq import ZmqEngineClient
from server.http.errors import ApiError
from shared.protocol import Cleanup, Segment, Speak
from tests.fakes import FakeWorker
from tests.server.engine.transports import LocalReplicas, LocalStream
from tests.server.running import becomes


def request(name: str = "r") -> Speak:
    """A request for speech."""
    return Speak(id=name, client="alice", model="m", task="CustomVoice", segments=[Segment(text="Hello.")], credit=10)


class SleepingReplicas(LocalReplicas):
    """As Serve has it: a request that finds no replica waits for one."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep: dict[str, WorkerGateway] = {}

    def stop(self) -> None:
        """Scale to zero."""
        self.asleep, self.gateways = self.gateways, {}

    def start(self) -> None:
        """The replica is there again."""
        self.asleep, self.gateways = {}, self.asleep

    def speak(
        self, request: bytes, reference: bytes | None, *, ingress: str, model: str, avoid: Sequence[str]
    ) -> LocalStream:
        async def answers() -> AsyncIterator[list[Frames]]:
            await becomes(lambda: bool(self.gateways))
            async for batch in super(SleepingReplicas, self).speak(
                request, reference, ingress=ingress, model=model, avoid=avoid
            ):
                yield batch

        return LocalStream(answers())


@asynccontextmanager
async def at_zero(
    tmp_path: Path, start_timeout_s: float = 60.0
) -> AsyncIterator[tuple[RayEngineClient, SleepingReplicas, FakeWorker]]:
    """A client of a cluster that had a replica and has none now. One request may wait for it."""
    leases = IngressLeases()
    with FakeWorker(tmp_path / "w.ipc") as worker:
        async with ZmqEngineClient(worker.url, "", timeout_s=20.0, web=leases.as_web_process()) as connection:
            replicas = SleepingReplicas()
            replicas.gateways["one"] = WorkerGateway("one", connection, leases)
            options = {"start_timeout_s": start_timeout_s, "max_waiting": 1}
            async with RayEngineClient(replicas, timeout_s=20.0, **options) as engine:
                await becomes(lambda: engine.unavailable() is None and bool(engine.reports()))
                loss = asyncio.create_task(engine.worker_loss())
                replicas.stop()
                await becomes(lambda: not engine.reports())
                assert not loss.done()  # WebSockets stay open
                yield engine, replicas, worker
                loss.cancel()


async def test_figures_are_those_of_no_worker(tmp_path: Path) -> None:
    """Models and voices are listed as before. A figure of all workers is refused with the reason, and starts none."""
    async with at_zero(tmp_path) as (engine, replicas, worker):
        assert engine.unavailable() is None
        assert engine.catalog == worker.catalog
        snapshot = await engine.fresh_snapshot(0)
        assert (snapshot.slots, snapshot.device.total_bytes, snapshot.accepting) == (0, 0, True)
        assert {model.state for model in snapshot.models} == {"absent"}
        assert [model.id for model in snapshot.models] == [model.id for model in worker.snapshot.models]
        with pytest.raises(ApiError, match="scales to zero") as refused:
            await engine.call(Cleanup(), client="", timeout_s=1.0)
        assert refused.value.code == "worker_unavailable"
        assert refused.value.retry_after_s
        assert not replicas.woken


@pytest.mark.slow
async def test_a_request_waits_for_the_first_replica(tmp_path: Path) -> None:
    """It is answered by it. More requests than may wait are refused at once, and counted."""
    async with at_zero(tmp_path) as (engine, replicas, worker):
        speech = engine.speak(request())
        with pytest.raises(ApiError) as refused:
            engine.speak(request("another"))
        assert refused.value.code == "queue_full"
        assert refused.value.retry_after_s
        replicas.start()
        assert await asyncio.wait_for(speech.chunk(), 20) is not None
        await becomes(lambda: bool(engine.reports()))
        assert engine.snapshot is not None
        assert engine.snapshot.slots == worker.snapshot.slots
        await becomes(lambda: worker.snapshot.limit_hits == {"queue": 1})


@pytest.mark.slow
async def test_no_replica_comes_in_time(tmp_path: Path) -> None:
    """The request ends with the reason, and the next one may wait."""
    async with at_zero(tmp_path, start_timeout_s=0.5) as (engine, _, _):
        for name in ("r", "s"):
            with pytest.raises(ApiError, match="No GPU worker has started within") as refused:
                await asyncio.wait_for(engine.speak(request(name)).chunk(), 20)
            assert refused.value.code == "worker_unavailable"
            assert refused.value.retry_after_s


@pytest.mark.slow
async def test_the_limit_is_one_of_the_wait(tmp_path: Path) -> None:
    """A speech that has begun may last longer."""
    async with at_zero(tmp_path, start_timeout_s=3.0) as (engine, replicas, _):
        replicas.start()
        speech = engine.speak(msgspec.structs.replace(request(), open=True, segments=[]))
        speech.append("a", flush=True)
        assert await asyncio.wait_for(speech.chunk(), 20) is not None
        await asyncio.sleep(3.1)
        speech.append("b", flush=True)
        speech.end_text()
        while await asyncio.wait_for(speech.chunk(), 20) is not None:
            pass


@pytest.mark.slow
async def test_without_a_catalogue_a_replica_is_started(tmp_path: Path) -> None:
    """No request could be understood, so none would ever start one."""
    async with at_zero(tmp_path) as (engine, replicas, _):
        engine._polling.catalog = []
        await becomes(lambda: replicas.woken > 0)
        assert engine.unavailable() is not None
