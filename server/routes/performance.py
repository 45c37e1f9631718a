"""GET /admin/performance: what listeners felt in the last minutes, from the snapshot."""

import msgspec
from litestar import get

from server.dependencies import EngineDependency
from server.http.errors import documented
from server.routes.admin import STATS_MAX_AGE_S
from server.routes.replicas import ModelPerformance, ReplicaPerformance, models_of, replica_performance


class Performance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The models that spoke within the last hour; times in seconds.

    `first_audio_s`: from a request's arrival at the GPU worker to its first audio.
    `queue_wait_s`: to its slot, the load of the model included.
    `real_time_factor`: seconds of synthesis for one second of audio.
    `batch_size`: requests that shared a frame, of each frame.
    `underruns`: of the complete `streams`, those in which a player had nothing to play, by its buffer:
    how many milliseconds it starts after the first audio.
    Percentiles are off by 7.5 % at most; a window may be longer by the time slot that is not over yet.
    In a cluster the percentiles are those of all its GPU workers together, and `replicas` has each of them.
    """

    models: list[ModelPerformance]
    replicas: list[ReplicaPerformance] = []


@get(
    "/performance",
    operation_id="getPerformance",
    summary="Get percentiles of the last minutes",
    tags=["Admin"],
    responses=documented(401, 403, 500, 503),
)
async def performance(engine: EngineDependency) -> Performance:
    """Time to first audio, real-time factor, queue wait, batch sizes and underruns of the last 1, 15 and 60 minutes."""
    snapshot = await engine.fresh_snapshot(STATS_MAX_AGE_S)
    return Performance(models=models_of(snapshot), replicas=replica_performance(engine.reports()))
