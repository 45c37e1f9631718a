"""The ingress deployment: the web application of server/app.py behind Serve's HTTP proxies."""

import asyncio
import time
from typing import Any, Final

from ray import serve
from ray.serve.handle import DeploymentHandle

from server.app import create_app
from server.cluster.node_settings import NodeSettings, settings_on_node
from server.cluster.relayed_application import RelayedApplication
from server.cluster.replica_port import hide_port
from server.cluster.replica_stop import on_stop
from server.cluster.serve_replicas import ServeReplicas
from server.engine import WebProcess
from server.engine.ray import RayEngineClient
from shared.log import set_up_logging

_STOP_MARGIN_S: Final = 2.0
"""The part of the drain timeout that is left when WebSockets must close."""

_START_TIMEOUT_S: Final = 120.0
"""On a first start, the engine replicas start at the same time, and load their models.

A request that starts the first replica of a cluster without any waits no longer either.
"""


@serve.ingress()
class Ingress:
    """The deployment's class: Serve asks it for the application once."""

    def __init__(self, node_settings: NodeSettings, engine: DeploymentHandle[Any]) -> None:
        hide_port()
        self._settings = settings_on_node(node_settings)
        self._engine = engine
        self._ending: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> RelayedApplication:
        """The web application of this replica."""
        set_up_logging(self._settings.log_level, self._settings.log_format, "web")

        def open_engine(web: WebProcess) -> RayEngineClient:
            replicas = ServeReplicas(self._engine)
            return RayEngineClient(
                replicas,
                timeout_s=self._settings.worker_timeout_s,
                start_timeout_s=_START_TIMEOUT_S,
                max_waiting=self._settings.max_queue if self._settings.min_replicas == 0 else None,
                web=web,
            )

        self._application = create_app(self._settings, open_engine)
        on_stop(self._end)
        return RelayedApplication(self._application)

    async def drain(self) -> None:
        """Take no more requests, because the service stops. Speech under way goes on to its end."""
        self._application.refuses_requests = True
        self._end()

    def _end(self) -> None:
        """Let end what has no end of its own: WebSockets, and the responses of /admin/events.

        Requests are taken all the same: a proxy may send one that does not know yet that Serve takes this replica away.
        """
        self._application.app.state.stopping.set()
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_in_time())

    async def _end_in_time(self) -> None:
        began_at = time.monotonic()
        await self._application.open_sockets.drain(max(0.0, self._settings.drain_timeout_s - _STOP_MARGIN_S))
        await asyncio.sleep(max(0.0, began_at + self._settings.drain_timeout_s - time.monotonic()))
        await self.cut_off()

    async def cut_off(self) -> None:
        """Break what is still being spoken."""
        engine: RayEngineClient = self._application.app.state.engine
        engine.abort_all()

    async def open_requests(self) -> int:
        """Requests and WebSockets that have not ended."""
        return self._application.open_requests.count
