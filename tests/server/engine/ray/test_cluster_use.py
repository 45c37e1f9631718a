"""Limits and usage over two replicas: what crosses from worker to worker, and how usage is added up."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import date
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from server.cluster.ingress_leases import IngressLeases
from server.cluster.worker_gateway import WorkerGateway
from server.engine.ray import RayEngineClient
from server.engine.ray.key_use import MAX_ROWS
from server.engine.zmq import ZmqEngineClient
from server.http.errors import ApiError
from shared.protocol import Call, Failed, FindUsage, KeyUse, Reply, UsageRow, UsedElsewhere, WorkerUse
from tests.fakes import FakeWorker
from tests.server.engine.transports import LocalReplicas
from tests.server.running import becomes

FIND = FindUsage(since=date(2026, 1, 1), until=date(2026, 1, 2))


def a_row(day: int, key: str, requests: int) -> UsageRow:
    """The use of a key on a day of January 2026."""
    return UsageRow(date(2026, 1, day), key, "m", requests, 10 * requests, 0.5 * requests, 1, 2, 3)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[FakeWorker]]:
    """Two GPU workers, each with a key that has used something."""
    with (
        FakeWorker(tmp_path / "0.ipc", boot_id="boot-0") as one,
        FakeWorker(tmp_path / "1.ipc", boot_id="boot-1") as other,
    ):
        for number, worker in enumerate((one, other)):
            use = WorkerUse(usage_source=f"file {number}", clients={f"key:{number}": KeyUse(3.0, 9, 70, 1)})
            worker.snapshot = msgspec.structs.replace(worker.snapshot, key_use=use)
        yield [one, other]


@pytest.fixture
def replicas() -> LocalReplicas:
    """The replicas of the workers, once there is the engine."""
    return LocalReplicas()


@pytest_asyncio.fixture
async def engine(workers: list[FakeWorker], replicas: LocalReplicas) -> AsyncIterator[RayEngineClient]:
    """A client of both, each behind a replica."""
    async with AsyncExitStack() as stack:
        for number, worker in enumerate(workers):
            leases = IngressLeases()
            client = await stack.enter_async_context(ZmqEngineClient(worker.url, "", timeout_s=20.0))
            replicas.gateways[str(number)] = WorkerGateway(str(number), client, leases)
        engine = await stack.enter_async_context(RayEngineClient(replicas, timeout_s=20.0))
        await becomes(lambda: [report.error for report in engine.reports().values()] == [None, None])
        yield engine


def told(worker: FakeWorker, client: str) -> KeyUse | None:
    """The last use of the client elsewhere that was sent to the worker."""
    news = worker.of(UsedElsewhere)
    return news[-1].clients.get(client) if news else None


@pytest.mark.usefixtures("engine")
async def test_each_worker_learns_of_the_others(workers: list[FakeWorker]) -> None:
    """The use of a key at one worker reaches the other one, and its own use does not come back."""
    await becomes(lambda: told(workers[0], "key:1") == KeyUse(3.0, 9, 70, 1))
    await becomes(lambda: told(workers[1], "key:0") == KeyUse(3.0, 9, 70, 1))
    assert told(workers[0], "key:0") == KeyUse(0.0, 9, 0, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
async def test_a_replica_that_leaves(replicas: LocalReplicas, workers: list[FakeWorker]) -> None:
    """Its requests do not run any more; what it has counted stays."""
    await becomes(lambda: told(workers[0], "key:1") == KeyUse(3.0, 9, 70, 1))
    del replicas.gateways["1"]
    await becomes(lambda: told(workers[0], "key:1") == KeyUse(3.0, 9, 70, 0))


@pytest.mark.usefixtures("engine")
@pytest.mark.slow
async def test_the_last_report_of_a_replica_that_leaves(replicas: LocalReplicas, workers: list[FakeWorker]) -> None:
    """It was asked for before, and comes behind the replica's end: the requests in it are over all the same."""
    leaving, asked, answered = replicas.gateways["1"], asyncio.Event(), asyncio.Event()
    report = leaving.report

    async def late(request: bytes) -> bytes:
        asked.set()
        await answered.wait()
        return await report(request)

    leaving.report = late  # type: ignore[method-assign]
    await asyncio.wait_for(asked.wait(), 20)
    del replicas.gateways["1"]
    await becomes(lambda: told(workers[0], "key:1") == KeyUse(3.0, 9, 70, 0))
    answered.set()
    heard = len(workers[0].of(UsedElsewhere))
    await becomes(lambda: len(workers[0].of(UsedElsewhere)) > heard + 1)
    assert told(workers[0], "key:1") == KeyUse(3.0, 9, 70, 0)


class TestUsage:
    """GET /admin/usage asks all replicas."""

    @pytest.mark.parametrize("sources", [("one", "other"), ("one", "one")])
    async def test_files_are_added_up(
        self, engine: RayEngineClient, workers: list[FakeWorker], sources: tuple[str, str]
    ) -> None:
        """Rows of different files with one day, key and model become one; a file that two workers have counts once."""
        for worker, source in zip(workers, sources, strict=True):
            rows = [a_row(2, "b", 1), a_row(1, "a", 2)]
            worker.on_call = lambda call, _pcm, rows=rows, source=source: Reply(  # type: ignore[misc] # its defaults
                id=call.id, usage=rows, usage_source=source
            )
        reply = await engine.call(FIND, client="boss", timeout_s=20)
        times = len(set(sources))
        assert [(row.date.day, row.key, row.requests, row.audio_s) for row in reply.usage] == [
            (2, "b", times, 0.5 * times),
            (1, "a", 2 * times, 1.0 * times),
        ]
        assert not reply.has_more

    async def test_a_missing_part_is_an_error(self, engine: RayEngineClient, workers: list[FakeWorker]) -> None:
        """A sum without the file of one replica would be wrong: the answer is that replica's error."""

        def fails(call: Call, _pcm: bytes | None) -> Failed:
            return Failed(id=call.id, code="internal_error", message="the usage cannot be read")

        workers[0].on_call = lambda call, _pcm: Reply(id=call.id, usage=[a_row(1, "a", 1)], usage_source="one")
        workers[1].on_call = fails
        with pytest.raises(ApiError, match="cannot be read"):
            await engine.call(FIND, client="boss", timeout_s=20)

    async def test_bounded(self, engine: RayEngineClient, workers: list[FakeWorker]) -> None:
        """The sum has no more rows than one answer may have, and says so."""
        for number, worker in enumerate(workers):
            rows = [a_row(1, f"{number}-{key}", 1) for key in range(MAX_ROWS - 1)]
            worker.on_call = lambda call, _pcm, rows=rows, number=number: Reply(  # type: ignore[misc] # its defaults
                id=call.id, usage=rows, usage_source=str(number)
            )
        reply = await engine.call(FIND, client="boss", timeout_s=20)
        assert (len(reply.usage), reply.has_more) == (MAX_ROWS, True)
