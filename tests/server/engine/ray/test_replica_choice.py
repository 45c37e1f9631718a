"""RayEngineClient and the choice of replicas."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from server.cluster.ingress_leases import IngressLeases
from server.cluster.worker_gateway import WorkerGateway
from server.engine.client import Speech
from server.engine.ray import RayEngineClient, ReplicaLostError
from server.engine.zmq import ZmqEngineClient
from server.http.errors import ApiError
from shared.protocol import Append, Failed, Segment, Speak
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
                replicas.gateways[str(name)] = WorkerGateway(str(name), client, IngressLeases())
            engine = await stack.enter_async_context(RayEngineClient(replicas, timeout_s=20.0))
            await becomes(lambda: [report.error for report in engine.reports().values()] == [None, None])
            speech = engine.speak(REQUEST)
            with pytest.raises(ApiError) as refused:
                await asyncio.wait_for(speech.chunk(), 20)
            assert refused.value.code == "queue_full"
            assert replicas.tries == 2


class Unsendable(LocalReplicas):
    """No request can be sent, by `failure`."""

    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self._failure = failure

    def speak(self, *_request: object, **_options: object) -> LocalStream:
        raise self._failure


class Deaf(LocalReplicas):
    """From `deaf` on, no message arrives at a replica that has a request, and the request goes on."""

    deaf = False

    async def post(self, replica: str, messages: list[bytes]) -> None:
        if self.deaf:
            raise ReplicaLostError("it stands still")
        await super().post(replica, messages)


async def heard_to_the_end(speech: Speech) -> None:
    """Read all chunks."""
    while await speech.chunk() is not None:
        pass


async def test_text_that_a_replica_does_not_get(tmp_path: Path) -> None:
    """The speech breaks: it would have a hole, and its client could not know."""
    with FakeWorker(tmp_path / "w.ipc") as worker:
        async with ZmqEngineClient(worker.url, "", timeout_s=20.0) as client:
            replicas = Deaf()
            replicas.gateways["one"] = WorkerGateway("one", client, IngressLeases())
            async with RayEngineClient(replicas, timeout_s=20.0) as engine:
                await becomes(lambda: engine.unavailable() is None)
                speech = engine.speak(msgspec.structs.replace(REQUEST, open=True, segments=[]))
                speech.append("a", flush=True)
                await asyncio.wait_for(speech.chunk(), 20)
                replicas.deaf = True
                speech.append("b", flush=True)
                await engine._outboxes.flush()
                replicas.deaf = False
                speech.append("c", flush=True)
                speech.end_text()
                with pytest.raises(ApiError) as broken:
                    await asyncio.wait_for(heard_to_the_end(speech), 20)
                assert broken.value.code == "worker_unavailable"
                assert [message.text for message in worker.of(Append)][:1] == ["a"]


@pytest.mark.parametrize(
    ("failure", "code"), [(ReplicaLostError("it is gone"), "worker_unavailable"), (KeyError("x"), "internal_error")]
)
async def test_a_request_that_cannot_be_sent(tmp_path: Path, failure: Exception, code: str) -> None:
    """Its client hears so, and waits for nothing."""
    with FakeWorker(tmp_path / "w.ipc") as worker:
        async with ZmqEngineClient(worker.url, "", timeout_s=20.0) as client:
            replicas = Unsendable(failure)
            replicas.gateways["one"] = WorkerGateway("one", client, IngressLeases())
            async with RayEngineClient(replicas, timeout_s=20.0) as engine:
                await becomes(lambda: engine.unavailable() is None)
                with pytest.raises(ApiError) as failed:
                    await asyncio.wait_for(engine.speak(REQUEST).chunk(), 20)
                assert failed.value.code == code
