"""The application on a Ray cluster, from its start to its drained end; a Ray of its own if there is none.

A Ray of its own listens on the loopback alone: commands/cluster.py sets that.
"""

import os
import threading
import time
from typing import Any, Final

import ray
import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from server.cluster.application import APP_NAME, INGRESS_NAME, build
from server.cluster.deployed_version import deployed_version
from shared.settings import Settings

_GCS_PORT: Final = 6379
_POLL_S: Final = 0.2
_ASK_TIMEOUT_S: Final = 10.0

_TELL_S: Final = 30.0
"""How often a start that takes long says what it waits for. A start of published weights takes up to 25 s."""

log = structlog.get_logger(__name__)


class DeploymentError(Exception):
    """Ray or the application could not start; the message is for the user."""


class Deployment:
    """The application with `settings`: on the cluster at `address`, or without one on a Ray that lives as long.

    If the cluster has the application already, Serve replaces its replicas, a part after the other.
    """

    def __init__(self, settings: Settings, address: str | None = None) -> None:
        self._settings = settings
        self._address = address
        self._connected = self._ready = self._replaces = False
        self._version = ""
        self.hurry = threading.Event()
        """Set it if the end is not to wait for running requests."""

    def connect(self) -> None:
        """Start Ray, or find the one that runs."""
        if self._address is not None:
            log.info("connecting", address=self._address)  # Ray looks for a cluster that is not there for a minute
        try:
            if self._address is None:
                ray.init(address="local", include_dashboard=False, log_to_driver=True)
            else:
                named = self._address == "auto" or ":" in self._address
                ray.init(address=self._address if named else f"{self._address}:{_GCS_PORT}", log_to_driver=False)
        except Exception as error:  # Ray raises just that if its node does not start in time
            raise DeploymentError(f"the cluster cannot serve: {error}{self._token_hint()}") from error
        self._connected = True

    def _token_hint(self) -> str:
        """For the address of a host, Ray does not look for its own token; for `auto` it does."""
        if self._address in {None, "auto"} or "RAY_AUTH_MODE" in os.environ:
            return ""
        return "; a cluster that was started with a token needs RAY_AUTH_MODE=token here, too"

    def start(self, stopping: threading.Event) -> bool:
        """Deploy the application, and return when every replica is ready; False if `stopping` is set before."""
        try:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            application = build(self._settings, gpus=int(ray.cluster_resources().get("GPU", 0)), nodes=len(nodes))
            serve.start(proxy_location="EveryNode", http_options=self._http_options())
            self._replaces = APP_NAME in serve.status().applications
            target = serve.RunTarget(application, name=APP_NAME, route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)
            self._version = _deployed_version()
            self._ready = self._wait_ready(stopping)
        except (RayError, RayServeException, OSError, RuntimeError, ValueError) as error:
            raise DeploymentError(f"the cluster cannot serve: {error}") from error
        return self._ready

    def _wait_ready(self, stopping: threading.Event) -> bool:
        told_at = time.monotonic()
        while not stopping.wait(_POLL_S):
            application = serve.status().applications[APP_NAME]
            if application.status == ApplicationStatus.RUNNING:
                return True
            if application.status == ApplicationStatus.DEPLOY_FAILED:
                failed = [
                    one for one in application.deployments.values() if one.status == DeploymentStatus.DEPLOY_FAILED
                ]
                raise RuntimeError("\n".join([application.message, *(one.message for one in failed)]))
            if time.monotonic() - told_at >= _TELL_S:
                told_at = time.monotonic()
                replicas = {name: found.replica_states for name, found in application.deployments.items()}
                # A replica needs a GPU or a CPU of its own: those that there is none for wait until a node comes.
                there = {kind: ray.cluster_resources().get(kind, 0) for kind in ("GPU", "CPU")}
                log.warning("replicas_not_ready", replicas=replicas, resources=there)
        return False

    def _http_options(self) -> dict[str, Any]:
        settings = self._settings
        options: dict[str, Any] = {"host": settings.host, "port": settings.port}
        if settings.tls_cert:
            options |= {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
        return options

    def stop(self) -> None:
        """Take no more requests, let the running ones end, and take the application away, if it is this process's."""
        if not self._connected:
            return
        if self._is_owner():
            self._take_away()
        ray.shutdown()

    def remove(self) -> None:
        """Let the requests of the application end and take it away, whichever process has deployed it."""
        try:
            if APP_NAME not in serve.status().applications:
                raise DeploymentError("the cluster does not have the service")
            self._try_to_drain()
            serve.delete(APP_NAME)
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            raise DeploymentError(f"the service cannot be taken away: {error}") from error
        finally:
            self._connected = False
            ray.shutdown()

    def _is_owner(self) -> bool:
        """True if the application ends with this process.

        Not if another process has deployed the application since, nor if this process has not yet replaced it.
        """
        if self._replaces and not self._ready:
            log.warning("application_left", reason="its replicas are not all replaced")
            return False
        try:
            is_ours = self._version == _deployed_version()
        except (RayError, RayServeException) as error:
            log.warning("application_left", reason=str(error))
            return False
        if not is_ours:
            log.info("application_left", reason="it was deployed anew")
        return is_ours

    def _take_away(self) -> None:
        if self._ready:
            self._try_to_drain()
        try:
            serve.delete(APP_NAME)
            if self._address is None:
                serve.shutdown()
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            log.warning("application_not_deleted", reason=str(error))

    def _try_to_drain(self) -> None:
        try:
            self._drain()
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            log.warning("cluster_not_drained", reason=str(error))

    def _drain(self) -> None:
        """Let the web workers refuse requests, and wait until those that they have are answered.

        Deleting an application lets its requests end as well, but Serve answers new ones with a 404 meanwhile.
        """
        ingress = serve.get_app_handle(APP_NAME)
        ingress.broadcast("drain").results(timeout_s=_ASK_TIMEOUT_S)
        deadline = time.monotonic() + self._settings.drain_timeout_s
        while time.monotonic() < deadline and not self.hurry.is_set():
            if not sum(ingress.broadcast("open_requests").results(timeout_s=_ASK_TIMEOUT_S)):
                return
            time.sleep(_POLL_S)
        if not self.hurry.is_set():
            log.warning("drain_timeout", seconds=self._settings.drain_timeout_s)
        ingress.broadcast("cut_off").results(timeout_s=_ASK_TIMEOUT_S)


def _deployed_version() -> str:
    """The version of the application."""
    return deployed_version(INGRESS_NAME, APP_NAME)
