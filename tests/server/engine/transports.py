"""Clients of a fake GPU worker over each transport, for the tests that hold for all of them."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from server.cluster.ingress_leases import IngressLeases
from server.cluster.worker_gateway import WorkerGateway
from server.engine.client import INITIAL_CREDIT, EngineClient
from server.engine.ray import Frames, RayEngineClient, ReplicaLostError
from server.engine.reports import ReplicaReport
from server.engine.zmq import ZmqEngineClient
from shared.protocol import Segment, Speak

TIMEOUT_S: Final = 20.0
"""After so long without an answer a client gives its GPU worker up."""

Clock = Callable[[], float]


class LocalStream:
    """ReplicaStream within this process."""

    def __init__(self, answers: AsyncIterator[list[Frames]]) -> None:
        self._answers = answers

    async def __aiter__(self) -> AsyncIterator[list[Frames]]:
        async for batch in self._answers:
            yield batch

    def cancel(self) -> None:
        """Nothing: the gateway learns of an abort by a message."""


class LocalReplicas:
    """EngineReplicas within this process: a gateway for each, and the choice of the first that may be taken."""

    def __init__(self) -> None:
        self.gateways: dict[str, WorkerGateway] = {}
        self.reports: dict[str, ReplicaReport] = {}
        self.woken = 0

    def ids(self) -> Sequence[str]:
        return list(self.gateways)

    def wake(self) -> None:
        self.woken += 1

    def update(self, reports: dict[str, ReplicaReport]) -> None:
        self.reports = reports

    def speak(
        self, request: bytes, reference: bytes | None, *, ingress: str, model: str, avoid: Sequence[str]
    ) -> LocalStream:
        del model
        name = next((name for name in self.gateways if name not in avoid), next(iter(self.gateways)))
        return LocalStream(self.gateways[name].speak(request, reference, ingress))

    async def call(self, replica: str, call: bytes, payload: bytes | None, *, model: str) -> Frames:
        del model
        return await self._gateway(replica or next(iter(self.gateways), "")).call(call, payload)

    async def post(self, replica: str, messages: list[bytes]) -> None:
        self._gateway(replica).post(messages)

    async def report(self, replica: str, request: bytes) -> bytes:
        return await self._gateway(replica).report(request)

    def _gateway(self, name: str) -> WorkerGateway:
        if name not in self.gateways:
            raise ReplicaLostError("it is gone")
        return self.gateways[name]


@asynccontextmanager
async def over_zmq(url: str, token: str = "", *, clock: Clock = time.monotonic, **options: Any) -> AsyncIterator[Any]:
    """A client that is connected to the worker at `url` by its own socket."""
    async with ZmqEngineClient(url, token, clock=clock, **options) as engine:
        yield engine


@asynccontextmanager
async def over_replicas(
    url: str, token: str = "", *, clock: Clock = time.monotonic, timeout_s: float, **options: Any
) -> AsyncIterator[Any]:
    """A client of one replica, whose gateway is connected to the worker at `url`."""
    replicas, leases = LocalReplicas(), IngressLeases(clock)
    async with ZmqEngineClient(
        url,
        token,
        timeout_s=timeout_s,
        clock=clock,
        web=leases.as_web_process(),
    ) as worker:
        replicas.gateways["one"] = WorkerGateway("one", worker, leases)
        async with RayEngineClient(replicas, timeout_s=timeout_s, clock=clock, **options) as engine:
            yield engine


def reason(engine: EngineClient) -> str:
    """Why the worker is unavailable; "" if it is not."""
    error = engine.unavailable()
    return "" if error is None else error.message


def a_speak(number: int = 1) -> Speak:
    """A request for a short speech."""
    return Speak(
        id=f"r{number}",
        client="me",
        model="espeak-ng",
        task="CustomVoice",
        segments=[Segment(text="hello")],
        credit=INITIAL_CREDIT,
    )


TRANSPORTS: Final[dict[str, Callable[..., Any]]] = {"zmq": over_zmq, "replicas": over_replicas}
Open = Callable[..., Any]
"""The type of the fixture `connect`: opens an EngineClient to a worker's URL."""
