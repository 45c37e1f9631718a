"""/admin: the settings in force, what the worker does and holds, and residency by hand.

Everything that is only looked at comes with the answer to a ping: watching costs the GPU worker next to nothing.
"""

import os
from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, get, post
from litestar.params import FromPath, PathParameter, QueryParameter

from server.dependencies import EngineDependency, SettingsDependency
from server.engine import EngineClient
from server.http.auth import client_of
from server.http.errors import ApiError, documented
from server.http.streaming import cancel_on_disconnect
from server.resolution import model_named
from server.routes.models import known
from server.version import VERSION
from shared.protocol import (
    Action,
    Cleanup,
    CleanupPass,
    Counters,
    DeviceMemory,
    HostMemory,
    LoadModel,
    ModelStatus,
    PinModel,
    State,
    StreamState,
    UnloadModel,
)
from shared.settings import Settings

STATS_MAX_AGE_S: Final = 0.25
_VRAM_MAX_AGE_S: Final = 0.0
"""Whoever has just moved a model looks whether it is there; many who look share one question to the worker."""

_LOAD_TIMEOUT_S: Final = 600.0
"""Loading may have to download first; who waits longer asks again."""

_CLEANUP_TIMEOUT_S: Final = 60.0
_MIB: Final = 1024 * 1024

ModelAction = Literal["load", "unload", "pin", "unpin"]


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Which GPU worker it is; `restarts`: how many its supervisor has replaced, 0 where it runs by itself."""

    pid: int
    boot_id: str
    uptime_s: float
    restarts: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker does now, and what it has done since it started; `web_pid` is the web worker that answers.

    `streams` are the requests with a slot, then those that wait for one, the oldest first and fifty at most.
    """

    web_pid: int
    worker: WorkerStats
    accepting: bool
    default_model: str
    running: int
    queued: int
    slots: int
    requests: Counters
    streams: list[StreamState]


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The settings of the eviction of idle models, and what a pass did; figures are null before the first pass."""

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


class ModelMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model is and what it holds: `bytes` on the device by purpose, `host_bytes` in RAM."""

    id: str
    state: State
    bytes: dict[str, int]
    host_bytes: int
    last_used: float | None
    idle_s: float | None
    references: int
    pinned: bool
    keep_alive_s: float | None
    detail: str


class Vram(msgspec.Struct, frozen=True, kw_only=True):
    """Memory as the device's driver and the worker tell it, in bytes; `shared` is what several models use together."""

    device: DeviceMemory
    shared: dict[str, int]
    host: HostMemory
    models: list[ModelMemory]


@get(
    "/config",
    operation_id="getConfig",
    summary="The settings in force",
    tags=["Admin"],
    responses=documented(401, 403, 500),
)
async def config(engine: EngineDependency, settings: SettingsDependency) -> dict[str, Any]:
    """All settings but the secret ones; what the worker acts by is as the worker has it, once it has been met."""
    return {"api_version": VERSION, **_in_force(engine, settings)}


@get(
    "/stats",
    operation_id="getStats",
    summary="What the worker does",
    tags=["Admin"],
    responses=documented(401, 403, 500, 503),
)
async def stats(engine: EngineDependency) -> Stats:
    """Requests running, queued and done, at most 250 ms old."""
    snapshot = await engine.fresh_snapshot(STATS_MAX_AGE_S)
    return Stats(
        web_pid=os.getpid(),
        worker=WorkerStats(
            pid=snapshot.pid, boot_id=snapshot.boot_id, uptime_s=snapshot.uptime_s, restarts=snapshot.restarts
        ),
        accepting=snapshot.accepting,
        default_model=snapshot.default_model,
        running=snapshot.running,
        queued=snapshot.queued,
        slots=snapshot.slots,
        requests=snapshot.requests,
        streams=snapshot.streams,
    )


@get(
    "/vram",
    operation_id="getVram",
    summary="Memory by model and purpose",
    tags=["Admin"],
    responses=documented(401, 403, 500, 503),
)
async def vram(engine: EngineDependency) -> Vram:
    """The device's figures are its driver's."""
    snapshot = await engine.fresh_snapshot(_VRAM_MAX_AGE_S)
    return Vram(
        device=snapshot.device,
        shared=snapshot.shared_bytes,
        host=snapshot.host,
        models=[_memory_of(model) for model in snapshot.models],
    )


@post(
    "/cleanup",
    operation_id="cleanUp",
    summary="The last eviction pass, or a new one",
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
    """What the eviction of idle models did; with `trigger=true` after doing it now."""
    if not trigger:
        snapshot = await engine.fresh_snapshot(_VRAM_MAX_AGE_S)
        return _report(_in_force(engine, settings), snapshot.cleanup, completed=False)
    cleaning = engine.call(Cleanup(), client=client_of(settings, request), timeout_s=_CLEANUP_TIMEOUT_S)
    reply = await cancel_on_disconnect(request, cleaning)
    return _report(_in_force(engine, settings), reply.cleanup, completed=True)


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
) -> ModelMemory:
    """Residency by hand; the answer says where the model is then. A busy model is not unloaded (409)."""
    return await _move(request, model_id, action, engine, settings)


@post("/models/{owner:str}/{name:str}/{action:str}", include_in_schema=False, status_code=200)
async def move_model_of_hub(
    request: Request[Any, Any, Any],
    *,
    owner: FromPath[str],
    name: FromPath[str],
    action: FromPath[ModelAction],
    engine: EngineDependency,
    settings: SettingsDependency,
) -> ModelMemory:
    """The same by Hugging Face id, which holds a slash."""
    return await _move(request, f"{owner}/{name}", action, engine, settings)


async def _move(
    request: Request[Any, Any, Any], name: str, action: ModelAction, engine: EngineClient, settings: Settings
) -> ModelMemory:
    catalog, snapshot = known(engine)
    model = model_named(name, catalog, snapshot.default_model).id
    actions: dict[ModelAction, Action] = {
        "load": LoadModel(model=model),
        "unload": UnloadModel(model=model),
        "pin": PinModel(model=model, pinned=True),
        "unpin": PinModel(model=model, pinned=False),
    }
    moving = engine.call(actions[action], client=client_of(settings, request), timeout_s=_LOAD_TIMEOUT_S)
    reply = await cancel_on_disconnect(request, moving)
    if reply.model is None:
        raise ApiError("internal_error", "The GPU worker did not say where the model is.")
    return _memory_of(reply.model)


def _memory_of(model: ModelStatus) -> ModelMemory:
    return ModelMemory(**msgspec.structs.asdict(model))


def _in_force(engine: EngineClient, settings: Settings) -> dict[str, Any]:
    """The settings by public name: the worker's may come from another environment than this process's."""
    return {**settings.public(), **engine.worker_settings}


def _report(in_force: dict[str, Any], done: CleanupPass | None, *, completed: bool) -> CleanupReport:
    before, after = (_mb(done.vram_before_bytes), _mb(done.vram_after_bytes)) if done else (None, None)
    standing: Literal["running", "disabled"] = "running" if in_force["cleanup_enabled"] else "disabled"
    unloaded = done.models_unloaded if done else []
    return CleanupReport(
        cleanup_enabled=in_force["cleanup_enabled"],
        cleanup_interval=in_force["cleanup_interval"],
        idle_timeout=in_force["idle_timeout"],
        status="completed" if completed else standing,
        timestamp=done.timestamp if done else None,
        vram_before_mb=before,
        vram_after_mb=after,
        # Of the figures beside it, so that whoever subtracts them finds this one.
        vram_freed_mb=round(before - after, 2) if before is not None and after is not None else None,
        models_unloaded=unloaded,
        message=_message(done) if completed and done else "",
        models_checked=done.models_checked if completed and done else None,
    )


def _message(done: CleanupPass) -> str:
    offloaded = [model for model in done.models_unloaded if model not in done.models_dropped]
    return f"Idle models: {len(offloaded)} moved to host RAM, {len(done.models_dropped)} dropped from memory."


def _mb(count: int) -> float:
    return round(count / _MIB, 2)
