"""The engine deployment: a replica for each GPU, which keeps one GPU worker alive and passes its messages on.

A dead GPU worker costs its own requests and seconds: the supervisor starts another one. A replica whose GPU worker
stays dead fails its health check, and Serve replaces it.
"""

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Final

import msgspec
import ray
import structlog
from ray import serve

from server.cluster.autoscaling import load_of
from server.cluster.deployed_version import deployed_version, until_replaced
from server.cluster.ingress_leases import IngressLeases
from server.cluster.node_settings import NodeSettings, settings_on_node
from server.cluster.replica_port import hide_port
from server.cluster.replica_stop import on_stop
from server.cluster.worker_gateway import WorkerGateway
from server.engine import OutageFile, ZmqEngineClient
from server.engine.ray import Frames
from server.processes import HUGE_PAGES, Supervisor
from shared.log import set_up_logging
from shared.settings import PREFIX, Settings, variable_of, variables_of

STOP_MARGIN_S: Final = 5.0
"""The GPU worker may take so long beyond the drain timeout to free its models."""

_MOST_DEAD_S: Final = 60.0
"""A replica whose GPU worker is away for longer is unhealthy. A start of published weights takes up to 25 s."""

_LEASES_PERIOD_S: Final = 5.0
_START_PAUSE_S: Final = 0.05

log = structlog.get_logger(__name__)


class EngineReplica:
    """The deployment's class. Serve runs its methods on one event loop."""

    async def __init__(self, node_settings: NodeSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._closing = AsyncExitStack()
        hide_port()
        settings = settings_on_node(node_settings)
        set_up_logging(settings.log_level, settings.log_format, "replica")
        context = serve.get_replica_context()
        self._deployment = context.deployment, context.app_name
        self._version = await asyncio.to_thread(deployed_version, *self._deployment)
        self._drain_timeout_s = settings.drain_timeout_s
        self._supervisor: Supervisor | None = None
        url = settings.worker_url
        if url is None:
            folder = tempfile.mkdtemp(prefix="tts-")
            self._closing.callback(shutil.rmtree, folder, ignore_errors=True)
            url = f"ipc://{folder}/worker.ipc"
            self._supervisor = _supervisor(settings, url)
            self._closing.push_async_callback(asyncio.to_thread, self._supervisor.stop)
        self._leases = IngressLeases()
        self._engine = ZmqEngineClient(
            url,
            settings.worker_token,
            timeout_s=settings.worker_timeout_s,
            web=self._leases.as_web_process(),
        )
        runtime = ray.get_runtime_context()
        gpus = [str(number) for number in runtime.get_accelerator_ids().get("GPU", [])]
        self._gateway = WorkerGateway(
            context.replica_id.unique_id,
            self._engine,
            self._leases,
            node=ray.util.get_node_ip_address(),
            gpus=gpus,
        )
        await self._closing.enter_async_context(self._engine)
        self._closing.callback(asyncio.create_task(self._end_leases()).cancel)
        if self._supervisor is not None:
            self._supervisor.start()
        on_stop(self._end)
        self._seen_at = time.monotonic()
        while self._engine.unavailable() is not None:
            self._require_worker()
            await asyncio.sleep(_START_PAUSE_S)
        log.info("replica_ready", replica=self._gateway.name)

    async def __del__(self) -> None:
        """Serve calls it once the replica has drained."""
        await self._closing.aclose()

    def _end(self) -> None:
        self._closing.callback(asyncio.create_task(self._end_in_time()).cancel)

    async def _end_in_time(self) -> None:
        """Break what is spoken beyond TTS_DRAIN_TIMEOUT once another version is to have this replica's place.

        If only fewer replicas are wanted, nothing breaks: the replica ends with its last stream.
        """
        await until_replaced(*self._deployment, self._version)
        await asyncio.sleep(self._drain_timeout_s)
        self._gateway.abort_all()

    async def _end_leases(self) -> None:
        while True:
            await asyncio.sleep(_LEASES_PERIOD_S)
            self._gateway.end_leases()

    def _require_worker(self) -> None:
        if self._supervisor is not None and self._supervisor.exit_code is not None:
            raise RuntimeError(f"the GPU worker cannot run: exit code {self._supervisor.exit_code}")

    async def name(self) -> str:
        """The replica's name."""
        return self._gateway.name

    async def speak(
        self,
        request: bytes,
        reference: bytes | None,
        ingress: str,
        avoid: Sequence[str] = (),  # noqa: ARG002 -- the router has seen to it
    ) -> AsyncIterator[list[Frames]]:
        """Speak a request."""
        async for batch in self._gateway.speak(request, reference, ingress):
            yield batch

    async def call(self, call: bytes, payload: bytes | None) -> Frames:
        """Do an action that is not speech."""
        return await self._gateway.call(call, payload)

    async def post(self, messages: list[bytes]) -> None:
        """Take messages that have no answer."""
        self._gateway.post(messages)

    async def report(self, request: bytes) -> bytes:
        """The replica's encoded report, for an encoded request."""
        return await self._gateway.report(request)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The fields of its ReplicaLoad for Serve's autoscaling; without a GPU worker Serve keeps the last ones."""
        snapshot = self._engine.snapshot
        if snapshot is None or self._engine.unavailable() is not None:
            return {}
        return msgspec.structs.asdict(load_of(snapshot, self._gateway.streams))

    async def check_health(self) -> None:
        """Raise if the GPU worker cannot run, or has been away for too long."""
        self._require_worker()
        error = self._engine.unavailable()
        if error is None:
            self._seen_at = time.monotonic()
        elif time.monotonic() - self._seen_at > _MOST_DEAD_S:
            raise RuntimeError(error.message)


def _supervisor(settings: Settings, url: str) -> Supervisor:
    """The supervisor of a GPU worker at `url`, with the settings of this node and the GPU that Ray gave the replica."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    variables = HUGE_PAGES | inherited | variables_of(settings) | {variable_of("worker_url"): url}
    return Supervisor(
        [sys.executable, "-m", "gpu_worker", "--parent", str(os.getpid())],
        lambda: variables,
        timeout_s=settings.worker_timeout_s,
        stop_timeout_s=STOP_MARGIN_S,
        on_final=lambda: None,
        on_outage=OutageFile(url).write,
    )
