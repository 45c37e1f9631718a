"""The ingress deployment: the web application of server/app.py behind Serve's HTTP proxies."""

from typing import Any, Final

from ray import serve
from ray.serve.handle import DeploymentHandle

from server.app import create_app
from server.cluster.serve_replicas import ServeReplicas
from server.cluster.settings import NodeSettings, settings_of
from server.engine.ray import RayEngineClient
from server.http.middleware import HttpMiddleware
from shared.log import set_up_logging

_START_TIMEOUT_S: Final = 120.0
"""On a first start, the engine replicas start at the same time, and load their models."""


@serve.ingress()
class Ingress:
    """The deployment's class: Serve asks it for the application once."""

    def __init__(self, node_settings: NodeSettings, engine: DeploymentHandle[Any]) -> None:
        self._settings = settings_of(node_settings)
        self._engine = engine

    def __serve_build_asgi_app__(self) -> HttpMiddleware:
        """The web application of this replica."""
        set_up_logging(self._settings.log_level, self._settings.log_format, "web")

        def open_engine(**options: Any) -> RayEngineClient:
            replicas = ServeReplicas(self._engine)
            return RayEngineClient(
                replicas, timeout_s=self._settings.worker_timeout_s, start_timeout_s=_START_TIMEOUT_S, **options
            )

        return create_app(self._settings, open_engine)
