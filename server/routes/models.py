"""What can speak: the catalogue as OpenAI lists models, with what this server knows beyond that."""

from contextlib import suppress
from typing import Annotated, Final

from litestar import get
from litestar.params import PathParameter

from server.dependencies import EngineDependency
from server.engine import EngineClient
from server.http.errors import ApiError, documented
from server.resolution import OPENAI_MODELS, model_named
from server.schemas import ModelId, ModelList, ModelObject
from shared.catalog import ModelSpec
from shared.protocol import ModelStatus, Snapshot

Known = tuple[list[ModelSpec], Snapshot]

_LIST_ERRORS: Final = documented(401, 403, 500, 503)
_ONE_ERRORS: Final = documented(400, 401, 403, 404, 500, 503)
_UNKNOWN: Final = "The GPU worker has not told yet what it can speak with."


def known(engine: EngineClient) -> Known:
    """The catalogue and the last snapshot; ApiError (`worker_unavailable`) before the worker was first met."""
    if engine.snapshot is None or not engine.catalog:
        raise ApiError("worker_unavailable", engine.unavailable_reason() or _UNKNOWN)
    return engine.catalog, engine.snapshot


async def latest(engine: EngineClient) -> Known:
    """As `known`, with what the worker says now: what any web worker has just changed is in it.

    Where the worker does not answer, its last word is better than none.
    """
    with suppress(ApiError):
        await engine.fresh_snapshot(0)
    return known(engine)


def state_of(spec: ModelSpec, snapshot: Snapshot) -> ModelStatus:
    """Where a model is; one that the snapshot does not name is absent."""
    named = (state for state in snapshot.models if state.id == spec.id)
    return next(named, ModelStatus(id=spec.id, state="absent"))


def _model_object(spec: ModelSpec, catalog: list[ModelSpec], snapshot: Snapshot) -> ModelObject:
    state = state_of(spec, snapshot)
    openai = [name for name in OPENAI_MODELS if model_named(name, catalog, snapshot.default_model) is spec]
    return ModelObject(
        id=spec.id,
        created=spec.created,
        owned_by=spec.owned_by,
        name=spec.name,
        aliases=[name for name in (spec.hf_id, *spec.aliases, *openai) if name],
        task=spec.task,
        languages=[language.name for language in spec.languages],
        voices=[voice.id for voice in spec.voices],
        state=state.state,
        loaded_bytes=sum(state.bytes.values()),
        detail=state.detail,
    )


async def _list(engine: EngineClient) -> ModelList:
    catalog, snapshot = await latest(engine)
    return ModelList(
        data=[_model_object(spec, catalog, snapshot) for spec in catalog],
        models=[ModelId(id=spec.id) for spec in catalog],
    )


async def _one(engine: EngineClient, name: str) -> ModelObject:
    catalog, snapshot = await latest(engine)
    return _model_object(model_named(name.strip("/"), catalog, snapshot.default_model), catalog, snapshot)


@get("/models", operation_id="listModels", summary="All models", tags=["Models"], responses=_LIST_ERRORS)
async def list_models(engine: EngineDependency) -> ModelList:
    """Every model of the catalogue; `state` says where it is now."""
    return await _list(engine)


@get(
    "/audio/models",
    operation_id="listAudioModels",
    summary="All models (the same list)",
    tags=["Models"],
    responses=_LIST_ERRORS,
)
async def list_audio_models(engine: EngineDependency) -> ModelList:
    """The same as /v1/models, where some clients look for it."""
    return await _list(engine)


ModelName = Annotated[str, PathParameter(description="An id, an alias or a Hugging Face id; it may hold a slash.")]


@get("/models/{model_id:path}", operation_id="getModel", summary="One model", tags=["Models"], responses=_ONE_ERRORS)
async def get_model(engine: EngineDependency, model_id: ModelName) -> ModelObject:
    """The model of that id, alias or Hugging Face id."""
    return await _one(engine, model_id)


@get(
    "/audio/models/{model_id:path}",
    operation_id="getAudioModel",
    summary="One model (the same)",
    tags=["Models"],
    responses=_ONE_ERRORS,
)
async def get_audio_model(engine: EngineDependency, model_id: ModelName) -> ModelObject:
    """The same as /v1/models/{id}."""
    return await _one(engine, model_id)
