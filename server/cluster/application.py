"""`build`: the Serve application of the service, an ingress deployment over an engine deployment."""

from typing import Any, Final

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from server.cluster.ingress import Ingress
from server.cluster.node_settings import settings_for_nodes
from server.cluster.replica import STOP_MARGIN_S, EngineReplica
from server.cluster.router import EngineRouter
from shared.catalog import load_catalog
from shared.settings import Settings, variable_of

APP_NAME: Final = "speech"
INGRESS_NAME: Final = "ingress"

_CPU_REPLICAS: Final = 2
_FEWEST_WEB_REPLICAS: Final = 2
"""On each node, so that one may die."""

_MOST_REQUESTS: Final = 100_000
"""Serve's own limit of requests a replica: the queue of the GPU worker has the real one."""

_LOOK_BACK_S: Final = 15.0
_UP_DELAY_S: Final = 5.0
"""Replicas note their load every fifth of the first and send it every 10 s, so Serve follows a queue within 21 s."""

_LONGEST_STREAM_S: Final = 86_400.0
"""No stream lasts longer. So much time a replica has that Serve stops because fewer are wanted.

Serve does not choose one without streams, and a stream may begin while it chooses. TTS_DRAIN_TIMEOUT holds all the same
where the application stops, by the web workers, and where another version replaces it, by EngineReplica itself.
"""

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
        ray_actor_options={"num_gpus": 1 if gpus else 0, "num_cpus": 0 if gpus else 1},
        request_router_config=RequestRouterConfig(
            request_router_class=EngineRouter, request_router_kwargs={"model_replicas": _bounds_by_model(settings)}
        ),
        **common | _size(replicas, settings),
    ).bind(node)
    return serve.deployment(
        Ingress, name=INGRESS_NAME, num_replicas=web_replicas, ray_actor_options={"num_cpus": 0}, **common
    ).bind(node, engine)


def _size(replicas: int, settings: Settings) -> dict[str, Any]:
    """The options of the engine deployment that say how many replicas it has; ValueError if that is impossible."""
    minimum = replicas if settings.min_replicas is None else settings.min_replicas
    if minimum > replicas:
        raise ValueError(f"{variable_of('min_replicas')} is {minimum}, but there are at most {replicas} replicas")
    if minimum == replicas:
        return {"num_replicas": replicas}
    # Without initial_replicas a new version of the application has as many replicas as the old one had.
    scaling = AutoscalingConfig(
        min_replicas=minimum,
        max_replicas=replicas,
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=_UP_DELAY_S,
        downscale_delay_s=settings.scale_down_delay_s,
        policy=AutoscalingPolicy(policy_function="server.cluster.autoscaling_policy:replicas_wanted"),
    )
    return {"autoscaling_config": scaling, "graceful_shutdown_timeout_s": _LONGEST_STREAM_S}


def _bounds_by_model(settings: Settings) -> dict[str, list[int]]:
    """The bounds of TTS_MODEL_REPLICAS by the models' ids, as JSON has them."""
    return {
        spec.id: list(bounds)
        for name, bounds in settings.model_replicas.items()
        for spec in load_catalog()
        if spec.answers_to(name)
    }
