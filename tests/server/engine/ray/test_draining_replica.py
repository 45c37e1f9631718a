"""A replica that takes no new requests any more, and the streams that it still has."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from server.cluster.ingress_leases import LEASE_S, IngressLeases
from server.cluster.worker_gateway import WorkerGateway
from server.engine.ray import REPORT_INTERVAL_S, RayEngineClient, ReportRequest
from server.engine.zmq import ZmqEngineClient
from shared.protocol import Cancel, Failed, Segment, Speak, decode_from_worker, encode
from tests.fakes import FakeWorker
from tests.server.engine.transports import LocalReplicas
from tests.server.running import becomes

REQUEST = Speak(id="r", client="alice", model="m", task="CustomVoice", segments=[Segment(text="Hello.")], credit=10)


class DrainingReplicas(LocalReplicas):
    """Replicas of which none takes new requests from `draining` on. `asked` counts the reports since."""

    draining = False
    asked = 0

    def ids(self) -> Sequence[str]:
        return [] if self.draining else super().ids()

    async def report(self, replica: str, request: bytes) -> bytes:
        self.asked += self.draining
        return await super().report(replica, request)


@pytest.mark.slow
async def test_its_leases_are_renewed_while_it_has_streams(tmp_path: Path) -> None:
    """The web process asks it for reports until the last one ends, and no longer."""
    with FakeWorker(tmp_path / "w.ipc") as worker:
        worker.hold = True
        async with ZmqEngineClient(worker.url, "", timeout_s=20.0) as connection:
            replicas = DrainingReplicas()
            replicas.gateways["one"] = WorkerGateway("one", connection, IngressLeases())
            async with RayEngineClient(replicas, timeout_s=20.0) as engine:
                await becomes(lambda: engine.unavailable() is None)
                speech = engine.speak(REQUEST)
                await becomes(lambda: worker.of(Speak))
                replicas.draining = True
                await becomes(lambda: replicas.asked > 2)
                speech.abort()
                await becomes(lambda: not engine._streams)
                asked = replicas.asked
                await asyncio.sleep(3 * REPORT_INTERVAL_S)
                assert replicas.asked <= asked + 1


async def test_streams_of_a_web_process_that_is_gone_end(tmp_path: Path) -> None:
    """When its lease ends; those of a web process that goes on asking go on, and the replica needs no asker for it."""
    now = 0.0
    with FakeWorker(tmp_path / "w.ipc") as worker:
        worker.hold = True
        async with ZmqEngineClient(worker.url, "", timeout_s=20.0) as connection:
            await becomes(lambda: connection.unavailable() is None)
            gateway = WorkerGateway("one", connection, IngressLeases(lambda: now))

            async def listen(name: str) -> None:
                header = encode(msgspec.structs.replace(REQUEST, id=name))[0]
                async for _ in gateway.speak(header, None, name):
                    pass

            listening = [asyncio.create_task(listen(name)) for name in ("gone", "there")]
            await becomes(lambda: gateway.streams == 2)
            for name, at in (("gone", 0.0), ("there", LEASE_S)):
                now = at
                await gateway.report(msgspec.msgpack.encode(ReportRequest(ingress=name)))
            gateway.end_leases()
            assert gateway.streams == 2
            now = LEASE_S + 1
            gateway.end_leases()
            await becomes(lambda: gateway.streams == 1)
            await becomes(lambda: [message.id for message in worker.of(Cancel)] == ["gone"])
            for task in listening:
                task.cancel()


async def test_a_replaced_replica_says_why_it_breaks_its_streams(tmp_path: Path) -> None:
    """Then a web process may try another replica."""
    with FakeWorker(tmp_path / "w.ipc") as worker:
        worker.hold = True
        async with ZmqEngineClient(worker.url, "", timeout_s=20.0) as connection:
            await becomes(lambda: connection.unavailable() is None)
            gateway = WorkerGateway("one", connection, IngressLeases())
            batches = gateway.speak(encode(REQUEST)[0], None, "web")
            assert await anext(batches) == [[b"one"]]
            gateway.abort_all()
            ((frames,),) = [batch async for batch in batches]
            message, _ = decode_from_worker(frames)
            assert isinstance(message, Failed)
            assert message.code == "shutting_down"
