"""/admin: the settings in force, the GPU worker's figures and memory, and loading, unloading and pinning of models.

Read-only operations answer from a snapshot, which comes with each Pong: watching costs the GPU worker almost nothing.
"""

import os
from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, get, post
from litestar.params import FromPath, PathParameter, QueryParameter

from server.dependencies import EngineDependency, SettingsDependency
from server.engine import EngineClient, cached_catalog
from server.http.auth import client_of
from server.http.errors import ApiError, documented
from server.http.streaming import cancel_on_disconnect
from server.resolution import keep_alive_s, resolve_model, unaliased
from server.routes.replicas import (
    ReplicaStats,
    ReplicaVram,
    Reports,
    WorkerStats,
    audio_of,
    replica_stats,
    replica_vram,
    worker_of,
)
from server.version import VERSION
from shared.protocol import (
    Action,
    BufferMemory,
    Cleanup,
    CleanupPass,
    Counters,
    DeviceMemory,
    HostMemory,
    LoadModel,
    ModelStatus,
    PinModel,
    Snapshot,
    StreamState,
    UnloadModel,
)
from shared.settings import Settings

STATS_MAX_AGE_S: Final = 0.25
_VRAM_MAX_AGE_S: Final = 0.0
"""A client that has just moved a model wants to see it moved. Clients that ask at the same time share one Ping."""

_LOAD_TIMEOUT_S: Final = 600.0
"""Loading may include a download. A client that needs longer asks again."""

_CLEANUP_TIMEOUT_S: Final = 60.0
_MIB: Final = 1024 * 1024

ModelAction = Literal["load", "unload", "pin", "unpin"]
KeepAlive = Annotated[
    str | None,
    QueryParameter(
        description="With `load`: how long the model stays after its last use, as in a speech request: seconds, `5m`, "
        "`0`, or `-1` for ever. Without it, as configured."
    ),
]


class Stats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Requests now and since the GPU worker started; `web_pid` is the web worker that answers.

    `running` requests hold one of `slots`; `queued` ones wait for one.
    `buffered` ones hold none: their speech waits for the client in the audio buffer, or the client has enough of it.
    `stalled`, of either kind: the client has read nothing for 10 s.
    `waiting_for_text`, of either kind: more of its text has to come.
    `audio_s`: seconds of audio made since the GPU worker started.
    `streams`: requests with a slot, buffered ones, then those that wait; the oldest first, at most fifty.

    In a cluster all figures are sums over its GPU workers, `worker` is one of these, and `replicas` has each of them.
    """

    web_pid: int
    worker: WorkerStats
    accepting: bool
    default_model: str
    running: int
    queued: int
    slots: int
    buffered: int
    stalled: int
    waiting_for_text: int
    audio_buffer: BufferMemory
    requests: Counters
    audio_s: float
    streams: list[StreamState]
    replicas: list[ReplicaStats] = []


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The settings of the eviction of idle models, and the figures of a pass; null before the first pass."""

    cleanup_enabled: bool
    cleanup_interval: float
    idle_timeout: float
    status: Literal["running", "disabled", "completed"]
    timestamp: float | None
    vram_before_mb: float | None
    vram_after_mb: float | None
    vram_freed_mb: float | None
    models_unloaded: list[str]
    message: str = ""
    models_checked: list[str] | None = None


class Vram(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Memory in bytes: the device's as its driver reports it, the host's, and each model's.

    `shared` is memory on the device that several models use together.

    In a cluster `device` and `host` are sums over all devices and all machines, and `replicas` has each GPU worker's.
    """

    device: DeviceMemory
    shared: dict[str, int]
    host: HostMemory
    models: list[ModelStatus]
    replicas: list[ReplicaVram] = []


@get(
    "/config",
    operation_id="getConfig",
    summary="Get the settings in force",
    tags=["Admin"],
    responses=documented(401, 403, 500),
)
async def config(engine: EngineDependency, settings: SettingsDependency) -> dict[str, Any]:
    """All settings except keys and tokens. The GPU worker's settings are its own, from its last connection on."""
    return {"api_version": VERSION, **_settings_in_force(engine, settings)}


@get(
    "/stats",
    operation_id="getStats",
    summary="Get the request figures",
    tags=["Admin"],
    responses=documented(401, 403, 500, 503),
)
async def stats(engine: EngineDependency) -> Stats:
    """Requests that run, wait and have ended; at most 250 ms old."""
    return stats_of(await engine.fresh_snapshot(STATS_MAX_AGE_S), engine.reports())


def stats_of(snapshot: Snapshot, reports: Reports) -> Stats:
    """The request figures in a snapshot, and of each replica of a cluster."""
    return Stats(
        web_pid=os.getpid(),
        worker=worker_of(snapshot),
        accepting=snapshot.accepting,
        default_model=snapshot.default_model,
        running=snapshot.running,
        queued=snapshot.queued,
        slots=snapshot.slots,
        buffered=snapshot.buffered,
        stalled=snapshot.stalled,
        waiting_for_text=snapshot.waiting_for_text,
        audio_buffer=snapshot.audio_buffer,
        requests=snapshot.requests,
        audio_s=audio_of(snapshot),
        streams=snapshot.streams,
        replicas=replica_stats(reports),
    )


@get(
    "/vram",
    operation_id="getVram",
    summary="Get memory by model and purpose",
    tags=["Admin"],
    responses=documented(401, 403, 500, 503),
)
async def vram(engine: EngineDependency) -> Vram:
    """Memory of the device, of the host and of each model, as of now."""
    return vram_of(await engine.fresh_snapshot(_VRAM_MAX_AGE_S), engine.reports())


def vram_of(snapshot: Snapshot, reports: Reports) -> Vram:
    """The memory in a snapshot, and of each replica of a cluster."""
    return Vram(
        device=snapshot.device,
        shared=snapshot.shared_bytes,
        host=snapshot.host,
        models=snapshot.models,
        replicas=replica_vram(reports),
    )


@post(
    "/cleanup",
    operation_id="cleanUp",
    summary="Get the last eviction pass, or run one",
    tags=["Admin"],
    status_code=200,
    responses=documented(400, 401, 403, 500, 503),
)
async def cleanup(
    request: Request[Any, Any, Any],
    engine: EngineDependency,
    settings: SettingsDependency,
    *,
    trigger: Annotated[bool, QueryParameter(description="Run a pass now instead of reporting the last one.")] = False,
) -> CleanupReport:
    """The figures of the last eviction of idle models; with `trigger=true`, of one that runs now."""
    if not trigger:
        snapshot = await engine.fresh_snapshot(_VRAM_MAX_AGE_S)
        return cleanup_report_of(engine, settings, snapshot)
    cleaning = engine.call(Cleanup(), client=client_of(settings, request), timeout_s=_CLEANUP_TIMEOUT_S)
    reply = await cancel_on_disconnect(request, cleaning)
    return _report(_settings_in_force(engine, settings), reply.cleanup, completed=True)


def cleanup_report_of(engine: EngineClient, settings: Settings, snapshot: Snapshot) -> CleanupReport:
    """The last pass in a snapshot."""
    return _report(_settings_in_force(engine, settings), snapshot.cleanup, completed=False)


@post(
    "/models/{model_id:str}/{action:str}",
    operation_id="moveModel",
    summary="Load, unload, pin or unpin a model",
    tags=["Admin"],
    status_code=200,
    responses=documented(400, 401, 403, 404, 409, 500, 503),
)
async def move_model(
    request: Request[Any, Any, Any],
    model_id: FromPath[str],
    action: Annotated[ModelAction, PathParameter(description="What to do with the model.")],
    engine: EngineDependency,
    settings: SettingsDependency,
    *,
    keep_alive: KeepAlive = None,
) -> ModelStatus:
    """Load, unload, pin or unpin a model, and answer with its state afterwards. A busy model is not unloaded (409)."""
    return await _move(request, model_id, action, engine, settings, keep_alive=keep_alive)


@post("/models/{owner:str}/{name:str}/{action:str}", include_in_schema=False, status_code=200)
async def move_model_of_hub(
    request: Request[Any, Any, Any],
    *,
    owner: FromPath[str],
    name: FromPath[str],
    action: FromPath[ModelAction],
    engine: EngineDependency,
    settings: SettingsDependency,
    keep_alive: KeepAlive = None,
) -> ModelStatus:
    """The same by Hugging Face id, which contains a slash."""
    return await _move(request, f"{owner}/{name}", action, engine, settings, keep_alive=keep_alive)


async def _move(
    request: Request[Any, Any, Any],
    name: str,
    action: ModelAction,
    engine: EngineClient,
    settings: Settings,
    *,
    keep_alive: str | None,
) -> ModelStatus:
    if keep_alive and action != "load":
        raise ApiError("invalid_value", "keep_alive: only `load` takes it.", param="keep_alive")
    catalog, snapshot = cached_catalog(engine)
    model = resolve_model(unaliased(name, settings.model_aliases), catalog, snapshot.default_model).id
    actions: dict[ModelAction, Action] = {
        "load": LoadModel(model=model, keep_alive_s=keep_alive_s(keep_alive or None)),
        "unload": UnloadModel(model=model),
        "pin": PinModel(model=model, pinned=True),
        "unpin": PinModel(model=model, pinned=False),
    }
    moving = engine.call(actions[action], client=client_of(settings, request), timeout_s=_LOAD_TIMEOUT_S)
    reply = await cancel_on_disconnect(request, moving)
    if reply.model is None:
        raise ApiError("internal_error", "The GPU worker did not send the model's status.")
    return reply.model


def _settings_in_force(engine: EngineClient, settings: Settings) -> dict[str, Any]:
    """The settings by their public names. The worker's own replace ours: its environment may be another one."""
    return {**settings.public(), **engine.worker_settings}


def _report(in_force: dict[str, Any], done: CleanupPass | None, *, completed: bool) -> CleanupReport:
    before, after = (_mib(done.vram_before_bytes), _mib(done.vram_after_bytes)) if done else (None, None)
    standing: Literal["running", "disabled"] = "running" if in_force["cleanup_enabled"] else "disabled"
    return CleanupReport(
        cleanup_enabled=in_force["cleanup_enabled"],
        cleanup_interval=in_force["cleanup_interval"],
        idle_timeout=in_force["idle_timeout"],
        status="completed" if completed else standing,
        timestamp=done.timestamp if done else None,
        vram_before_mb=before,
        vram_after_mb=after,
        # The difference of the rounded figures, so that the three figures of the answer agree.
        vram_freed_mb=round(before - after, 2) if before is not None and after is not None else None,
        models_unloaded=done.models_unloaded if done else [],
        message=_message(done) if completed and done else "",
        models_checked=done.models_checked if completed and done else None,
    )


def _message(done: CleanupPass) -> str:
    offloaded = [model for model in done.models_unloaded if model not in done.models_dropped]
    return f"Idle models: {len(offloaded)} moved to host RAM, {len(done.models_dropped)} dropped from memory."


def _mib(count: int) -> float:
    return round(count / _MIB, 2)
