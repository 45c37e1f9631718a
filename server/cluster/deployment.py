"""The application on a Ray cluster, from its start to its drained end; a Ray of its own if there is none.

A Ray of its own listens on the loopback alone: commands/cluster.py sets that.
"""

import time
from typing import Any, Final

import ray
import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from server.cluster.application import APP_NAME, build
from shared.settings import Settings

_GCS_PORT: Final = 6379
_POLL_S: Final = 0.2
_ASK_TIMEOUT_S: Final = 10.0

log = structlog.get_logger(__name__)


class DeploymentError(Exception):
    """Ray or the application could not start; the message is for the user."""


class Deployment:
    """The application with `settings`: on the cluster at `address`, or without one on a Ray that lives as long."""

    def __init__(self, settings: Settings, address: str | None = None) -> None:
        self._settings = settings
        self._address = address
        self._running = False

    def start(self) -> None:
        """Connect to Ray, and return when every replica is ready."""
        try:
            self._connect()
            self._running = True
            nodes = [node for node in ray.nodes() if node["Alive"]]
            application = build(self._settings, gpus=int(ray.cluster_resources().get("GPU", 0)), nodes=len(nodes))
            serve.start(proxy_location="EveryNode", http_options=self._http_options())
            serve.run(application, name=APP_NAME, route_prefix="/")
        except (RayError, RayServeException, ConnectionError, RuntimeError, ValueError) as error:
            raise DeploymentError(f"the cluster cannot serve: {error}") from error

    def _connect(self) -> None:
        if self._address is None:
            ray.init(address="local", include_dashboard=False, log_to_driver=True)
        else:
            named = self._address == "auto" or ":" in self._address
            ray.init(address=self._address if named else f"{self._address}:{_GCS_PORT}", log_to_driver=False)

    def _http_options(self) -> dict[str, Any]:
        settings = self._settings
        options: dict[str, Any] = {"host": settings.host, "port": settings.port}
        if settings.tls_cert:
            options |= {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
        return options

    def stop(self) -> None:
        """Take no more requests, let the running ones end, and leave the cluster as it was found."""
        if not self._running:
            return
        try:
            self._drain()
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            log.warning("cluster_not_drained", reason=str(error))
        try:
            serve.delete(APP_NAME)
            if self._address is None:
                serve.shutdown()
        except (RayError, RayServeException, RuntimeError) as error:
            log.warning("application_not_deleted", reason=str(error))
        ray.shutdown()

    def _drain(self) -> None:
        """Let the web workers refuse requests, and wait until those that they have are answered.

        Deleting an application lets its requests end as well, but Serve answers new ones with a 404 meanwhile.
        """
        ingress = serve.get_app_handle(APP_NAME)
        ingress.broadcast("drain").results(timeout_s=_ASK_TIMEOUT_S)
        deadline = time.monotonic() + self._settings.drain_timeout_s
        while time.monotonic() < deadline:
            if not sum(ingress.broadcast("open_requests").results(timeout_s=_ASK_TIMEOUT_S)):
                return
            time.sleep(_POLL_S)
        log.warning("drain_timeout", seconds=self._settings.drain_timeout_s)
        ingress.broadcast("cut_off").results(timeout_s=_ASK_TIMEOUT_S)
