"""`build`: the Serve application of the service, an ingress deployment over an engine deployment."""

from typing import Any, Final

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from server.cluster.ingress import Ingress
from server.cluster.node_settings import settings_for_nodes
from server.cluster.replica import STOP_MARGIN_S, EngineReplica
from server.cluster.router import EngineRouter
from shared.catalog import load_catalog
from shared.settings import Settings

APP_NAME: Final = "speech"
INGRESS_NAME: Final = "ingress"

_CPU_REPLICAS: Final = 2
_FEWEST_WEB_REPLICAS: Final = 2
"""On each node, so that one may die."""

_MOST_REQUESTS: Final = 100_000
"""Serve's own limit of requests a replica: the queue of the GPU worker has the real one."""

_HEALTH_PERIOD_S: Final = 5.0
_DRAIN_POLL_S: Final = 0.5


def build(settings: Settings, *, gpus: int, nodes: int = 1) -> serve.Application:
    """The application for a cluster with so many GPUs and nodes: a replica each, or CPU replicas if there is no GPU."""
    replicas = settings.replicas or gpus or _CPU_REPLICAS
    web_replicas = nodes * max(settings.web_workers, _FEWEST_WEB_REPLICAS)
    node = settings_for_nodes(settings)
    common: dict[str, Any] = {
        "max_ongoing_requests": _MOST_REQUESTS,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + STOP_MARGIN_S,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_S,
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
    }
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": 1 if gpus else 0, "num_cpus": 0 if gpus else 1},
        request_router_config=RequestRouterConfig(
            request_router_class=EngineRouter, request_router_kwargs={"model_replicas": _bounds_by_model(settings)}
        ),
        **common,
    ).bind(node)
    return serve.deployment(
        Ingress, name=INGRESS_NAME, num_replicas=web_replicas, ray_actor_options={"num_cpus": 0}, **common
    ).bind(node, engine)


def _bounds_by_model(settings: Settings) -> dict[str, list[int]]:
    """The bounds of TTS_MODEL_REPLICAS by the models' ids, as JSON has them."""
    return {
        spec.id: list(bounds)
        for name, bounds in settings.model_replicas.items()
        for spec in load_catalog()
        if spec.answers_to(name)
    }
