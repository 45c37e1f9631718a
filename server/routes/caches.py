"""GET /admin/cache: what every cache holds, and how often it helped. DELETE /admin/cache/{name} empties one."""

from typing import Annotated, Any, Final

import msgspec
from litestar import Request, delete, get
from litestar.datastructures import State
from litestar.params import PathParameter

from server.caches import WebCaches
from server.dependencies import EngineDependency, SettingsDependency
from server.engine import EngineClient
from server.http.auth import client_of
from server.http.errors import ApiError, documented
from server.text import PronunciationsError
from shared.protocol import CacheName, CacheStats, EmptyCache

_EMPTY_TIMEOUT_S: Final = 15.0


class CacheReport(msgspec.Struct, frozen=True, kw_only=True):
    """Every cache. `model` is "" for one that belongs to no model, `bytes` null where they cannot be measured.

    `references`: encoded recordings of cloned voices. `prompts`: their constant parts, by voice and language.
    `prefixes`: what a CPU has computed of these and of instructions, so that the next such prompt begins sooner.
    `tokens`: of the last texts. `recordings`: of saved voices, in host RAM. `catalog`: the models, as each web worker
    knows them. `pronunciations`: those of the service. `stored_audio`: finished audio on disk.
    A model counts from its load on; the last three are sums over all web workers.
    """

    caches: list[CacheStats]


@get(
    "/cache",
    operation_id="getCache",
    summary="Get the figures of the caches",
    tags=["Admin"],
    responses=documented(401, 403, 500, 503),
)
async def get_caches(state: State, engine: EngineDependency) -> CacheReport:
    """Hits, misses, entries and bytes of every cache."""
    return CacheReport(caches=await _all_caches(state.caches, engine))


@delete(
    "/cache/{name:str}",
    operation_id="emptyCache",
    summary="Empty a cache",
    tags=["Admin"],
    status_code=200,
    responses=documented(400, 401, 403, 500, 503),
)
async def empty_cache(
    request: Request[Any, Any, Any],
    name: Annotated[CacheName, PathParameter(description="Which cache.")],
    state: State,
    engine: EngineDependency,
    settings: SettingsDependency,
) -> CacheReport:
    """Empty a cache, of all models and in all web workers; the answer says what was in it.

    What it held is made, or read, again when it is needed: so the file of pronunciations is read anew.
    """
    caches: WebCaches = state.caches
    before = [cache for cache in await _all_caches(caches, engine) if cache.name == name]
    if name == "stored_audio":
        await caches.clear_stored_audio()
        return CacheReport(caches=before)
    if name == "pronunciations":
        try:
            caches.check_pronunciations()
        except PronunciationsError as error:
            raise ApiError("invalid_value", f"{error}; the old words stay.") from error
    await engine.call(EmptyCache(name=name), client=client_of(settings, request), timeout_s=_EMPTY_TIMEOUT_S)
    await engine.fresh_snapshot(0)  # it empties those of this web worker
    return CacheReport(caches=before)


async def _all_caches(caches: WebCaches, engine: EngineClient) -> list[CacheStats]:
    snapshot = await engine.fresh_snapshot(0)
    return [*snapshot.caches, *await caches.list(engine, dict(snapshot.web_caches))]
