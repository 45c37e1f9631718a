"""The ingress deployment: the web application of server/app.py behind Serve's HTTP proxies."""

import asyncio
from typing import Any, Final

from ray import serve
from ray.serve.handle import DeploymentHandle

from server.app import create_app
from server.cluster.node_settings import NodeSettings, settings_on_node
from server.cluster.relayed_application import RelayedApplication
from server.cluster.replica_port import hide_port
from server.cluster.serve_replicas import ServeReplicas
from server.engine import WebProcess
from server.engine.ray import RayEngineClient
from shared.log import set_up_logging

_STOP_MARGIN_S: Final = 2.0
"""The part of the drain timeout that is left when WebSockets must close."""

_START_TIMEOUT_S: Final = 120.0
"""On a first start, the engine replicas start at the same time, and load their models."""


@serve.ingress()
class Ingress:
    """The deployment's class: Serve asks it for the application once."""

    def __init__(self, node_settings: NodeSettings, engine: DeploymentHandle[Any]) -> None:
        hide_port()
        self._settings = settings_on_node(node_settings)
        self._engine = engine

    def __serve_build_asgi_app__(self) -> RelayedApplication:
        """The web application of this replica."""
        set_up_logging(self._settings.log_level, self._settings.log_format, "web")

        def open_engine(web: WebProcess) -> RayEngineClient:
            replicas = ServeReplicas(self._engine)
            return RayEngineClient(
                replicas, timeout_s=self._settings.worker_timeout_s, start_timeout_s=_START_TIMEOUT_S, web=web
            )

        self._application = create_app(self._settings, open_engine)
        return RelayedApplication(self._application)

    async def drain(self) -> None:
        """Take no more requests. What is being spoken ends, and so do responses that have no end of their own."""
        self._application.app.state.stopping.set()
        sockets = self._application.open_sockets
        sockets.draining = True
        self._drained = asyncio.create_task(sockets.drain(max(0.0, self._settings.drain_timeout_s - _STOP_MARGIN_S)))

    async def cut_off(self) -> None:
        """Break what is still being spoken."""
        engine: RayEngineClient = self._application.app.state.engine
        engine.abort_all()

    async def open_requests(self) -> int:
        """Requests and WebSockets that have not ended."""
        return self._application.open_requests.count
