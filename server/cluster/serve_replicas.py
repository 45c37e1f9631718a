"""EngineReplicas over the handle of the engine deployment: each failure of Ray becomes a ReplicaLostError."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from server.cluster.router_base import RouterBase
from server.engine import ReplicaReport
from server.engine.ray import Frames, ReplicaLostError


class ServeReplicas:
    """The replicas behind `handle`, whose router is a RouterBase."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._introduction: asyncio.Task[None] | None = None

    def ids(self) -> Sequence[str]:
        router = RouterBase.current
        if router is None or not router.can_address():
            self._introduce()
            return []
        return router.replica_names()

    def wake(self) -> None:
        self._introduce()  # Serve starts a replica for a request that finds none

    def _introduce(self) -> None:
        """Send a first request: Serve makes the router for it."""
        if self._introduction is None or self._introduction.done():
            self._introduction = asyncio.create_task(self._ask_any())

    async def _ask_any(self) -> None:
        with suppress(ReplicaLostError), _lost():  # the next look asks again
            await self._handle.name.remote()

    def update(self, reports: dict[str, ReplicaReport]) -> None:
        if RouterBase.current is not None:
            RouterBase.current.placement.reports = reports

    def speak(
        self, request: bytes, reference: bytes | None, *, ingress: str, model: str, avoid: Sequence[str]
    ) -> "ServeStream":
        handle = self._handle.options(stream=True, multiplexed_model_id=model)
        with _lost():
            return ServeStream(handle.speak.remote(request, reference, ingress, avoid=list(avoid)))

    async def call(self, replica: str, call: bytes, payload: bytes | None, *, model: str) -> Frames:
        with _lost():
            if replica:
                return list(await _router().ask(replica, "call", call, payload))
            return list(await self._handle.options(multiplexed_model_id=model).call.remote(call, payload))

    async def post(self, replica: str, messages: list[bytes]) -> None:
        with _lost():
            await _router().ask(replica, "post", messages)

    async def report(self, replica: str, request: bytes) -> bytes:
        with _lost():
            return bytes(await _router().ask(replica, "report", request))


class ServeStream:
    """ReplicaStream over Serve's generator."""

    def __init__(self, answers: DeploymentResponseGenerator[Any]) -> None:
        self._answers = answers

    async def __aiter__(self) -> AsyncIterator[list[Frames]]:
        with _lost():
            async for batch in self._answers:
                yield batch

    def cancel(self) -> None:
        self._answers.cancel()


def _router() -> RouterBase:
    if RouterBase.current is None:
        raise ReplicaLostError("no replica is known yet")
    return RouterBase.current


@contextmanager
def _lost() -> Iterator[None]:
    """Translate what Ray raises when a replica, its node or the deployment is gone."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaLostError("the call was cancelled") from None  # by Ray, not by this process
    except (RayError, RayServeException) as error:
        # The first line: the rest is a traceback of the replica.
        raise ReplicaLostError(str(error).strip().partition("\n")[0] or type(error).__name__) from None
