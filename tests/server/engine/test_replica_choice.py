"""RayEngineClient and the choice of replicas."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from server.cluster.worker_gateway import Askers, WorkerGateway
from server.engine.ray import RayEngineClient
from server.engine.zmq import ZmqEngineClient
from server.http.errors import ApiError
from shared.protocol import Failed, Segment, Speak
from tests.fakes import FakeWorker
from tests.server.engine.transports import LocalReplicas, LocalStream
from tests.server.running import becomes

REQUEST = Speak(id="r", client="alice", model="m", task="CustomVoice", segments=[Segment(text="Hello.")], credit=10)


class OneHome(LocalReplicas):
    """The model is to be on the replica "0" alone, whatever that one says."""

    tries = 0

    def speak(
        self, request: bytes, reference: bytes | None, *, ingress: str, model: str, avoid: Sequence[str]
    ) -> LocalStream:
        self.tries += 1
        del avoid
        return super().speak(request, reference, ingress=ingress, model=model, avoid=[])


async def test_a_refusal_of_the_only_home_is_final(tmp_path: Path) -> None:
    """A second try gets the same replica, and there is no third one."""
    with FakeWorker(tmp_path / "0.ipc", boot_id="0") as full, FakeWorker(tmp_path / "1.ipc", boot_id="1") as other:
        full.fail_with = Failed(id="", code="queue_full", message="full")
        async with AsyncExitStack() as stack:
            replicas = OneHome()
            for name, worker in enumerate((full, other)):
                client = await stack.enter_async_context(ZmqEngineClient(worker.url, "", timeout_s=20.0))
                replicas.gateways[str(name)] = WorkerGateway(str(name), client, Askers())
            engine = await stack.enter_async_context(RayEngineClient(replicas, timeout_s=20.0))
            await becomes(lambda: [report.error for report in engine.reports().values()] == [None, None])
            speech = engine.speak(REQUEST)
            with pytest.raises(ApiError) as refused:
                await asyncio.wait_for(speech.chunk(), 20)
            assert refused.value.code == "queue_full"
            assert replicas.tries == 2
