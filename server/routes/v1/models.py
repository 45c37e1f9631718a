"""GET /v1/models and /v1/audio/models: the catalogue in OpenAI's shape, with the state of each model."""

from typing import Annotated, Any, Final

from litestar import Request, get
from litestar.params import PathParameter

from server.dependencies import EngineDependency, SettingsDependency
from server.engine import EngineClient, fresh_catalog, status_of
from server.http.elevenlabs_errors import is_elevenlabs
from server.http.errors import documented
from server.resolution import resolve_model, unaliased
from server.routes.elevenlabs_models import ElevenLabsModel, elevenlabs_models
from server.schemas import ModelId, ModelList, ModelObject
from shared.catalog import OPENAI_MODELS, ModelSpec
from shared.protocol import Snapshot

_LIST_ERRORS: Final = documented(401, 403, 500, 503)
_ONE_ERRORS: Final = documented(400, 401, 403, 404, 500, 503)

ModelName = Annotated[str, PathParameter(description="An id, an alias or a Hugging Face id; it may hold a slash.")]


@get("/models", operation_id="listModels", summary="List the models", tags=["Models"], responses=_LIST_ERRORS)
async def list_models(
    request: Request[Any, Any, Any], engine: EngineDependency, settings: SettingsDependency
) -> ModelList | list[ElevenLabsModel]:
    """Every model of the catalogue; `state` says where it is now.

    A client that sends its key as `xi-api-key` gets ElevenLabs' list, of the models that can speak.
    """
    if is_elevenlabs(request.scope):
        return await elevenlabs_models(engine, settings)
    return await _list(engine, settings.model_aliases)


@get(
    "/audio/models",
    operation_id="listAudioModels",
    summary="List the models (same as /v1/models)",
    tags=["Models"],
    responses=_LIST_ERRORS,
)
async def list_audio_models(engine: EngineDependency, settings: SettingsDependency) -> ModelList:
    """The same as /v1/models; some clients look for the list here."""
    return await _list(engine, settings.model_aliases)


@get("/models/{model_id:path}", operation_id="getModel", summary="Get a model", tags=["Models"], responses=_ONE_ERRORS)
async def get_model(engine: EngineDependency, settings: SettingsDependency, model_id: ModelName) -> ModelObject:
    """The model of that id, alias or Hugging Face id."""
    return await _one(engine, settings.model_aliases, model_id)


@get(
    "/audio/models/{model_id:path}",
    operation_id="getAudioModel",
    summary="Get a model (same as /v1/models/{id})",
    tags=["Models"],
    responses=_ONE_ERRORS,
)
async def get_audio_model(engine: EngineDependency, settings: SettingsDependency, model_id: ModelName) -> ModelObject:
    """The same as /v1/models/{id}."""
    return await _one(engine, settings.model_aliases, model_id)


async def _list(engine: EngineClient, aliases: dict[str, str]) -> ModelList:
    catalog, snapshot = await fresh_catalog(engine)
    return ModelList(
        data=[_model_object(spec, catalog, snapshot, aliases) for spec in catalog],
        models=[ModelId(id=spec.id) for spec in catalog],
    )


async def _one(engine: EngineClient, aliases: dict[str, str], name: str) -> ModelObject:
    catalog, snapshot = await fresh_catalog(engine)
    spec = resolve_model(unaliased(name.strip("/").strip(), aliases), catalog, snapshot.default_model)
    return _model_object(spec, catalog, snapshot, aliases)


def _model_object(
    spec: ModelSpec, catalog: list[ModelSpec], snapshot: Snapshot, aliases: dict[str, str]
) -> ModelObject:
    status = status_of(spec, snapshot)
    default = snapshot.default_model
    names = (*OPENAI_MODELS, *(name for name in aliases if name.casefold() not in OPENAI_MODELS))
    given_names = [name for name in names if resolve_model(unaliased(name, aliases), catalog, default) is spec]
    return ModelObject(
        id=spec.id,
        created=spec.created,
        owned_by=spec.owned_by,
        name=spec.name,
        aliases=[name for name in (spec.hf_id, *spec.aliases, *given_names) if name],
        task=spec.task,
        languages=[language.name for language in spec.languages],
        voices=[voice.id for voice in spec.voices],
        state=status.state,
        loaded_bytes=sum(status.bytes.values()),
        instructions=spec.instructions,
        sampling=spec.sampling,
        timestamps=spec.timestamps,
        detail=status.detail,
    )
