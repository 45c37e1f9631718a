"""/v1/audio/voices: list, rename and delete voices. new_voices.py makes them, voice_files.py moves them.

The GPU worker owns the saved voices.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, delete, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from server.dependencies import EngineDependency, SettingsDependency
from server.engine import EngineClient, cached_catalog, find_saved_voice, fresh_catalog, status_of
from server.http.auth import caller_of
from server.http.errors import ApiError, documented
from server.http.json_bodies import JsonBodyDto, JsonDecoder
from server.http.keys import Caller
from server.resolution import models_with_voices, unaliased
from server.schemas import (
    Name,
    SavedVoiceObject,
    VoiceDeleted,
    VoiceList,
    VoiceNames,
    VoiceObject,
)
from shared.catalog import OPENAI_VOICES, ModelSpec, Voice
from shared.protocol import (
    MAX_NAME,
    DeleteVoice,
    ExportVoice,
    Reply,
    SavedVoice,
    Snapshot,
    UpdateVoice,
    VoiceAccess,
)
from shared.settings import Settings
from shared.voice_access import visible_voices

_CHANGE_TIMEOUT_S: Final = 10.0

VoiceName = Annotated[str, PathParameter(description="A voice's id or name; a name may contain a slash.")]


class VoiceUpdate(msgspec.Struct, kw_only=True):
    """Another name for a saved voice, or whether every key may speak with it."""

    name: Name | None = None
    shared: bool | None = None


class VoiceUpdateJson(JsonBodyDto[VoiceUpdate]):
    """The DTO of what changes of a voice."""

    decoder = JsonDecoder(VoiceUpdate, {})


@get(
    "/voices",
    operation_id="listVoices",
    summary="List the voices",
    tags=["Voices"],
    responses=documented(400, 401, 403, 404, 500, 503),
)
async def list_voices(
    request: Request[Any, Any, Any],
    engine: EngineDependency,
    settings: SettingsDependency,
    *,
    model: Annotated[
        str | None, QueryParameter(description="List the voices of this model.", max_length=MAX_NAME)
    ] = None,
    legacy: Annotated[bool, QueryParameter(description="Plain strings instead of objects.")] = False,
) -> VoiceList | VoiceNames:
    """The voices that a request can name: preset voices, OpenAI's names for them, and saved voices.

    With `model`, a request for that model; else one that names no model, or one of OpenAI's.
    A saved voice of another key is there only if it is shared.
    """
    listed = await voices_for(model, engine, settings, caller_of(settings, request).access)
    if legacy:
        names = [voice.id for voice in listed.uploaded_voices]
        return VoiceNames(voices=[voice.id for voice in listed.voices], uploaded_voices=names)
    return listed


async def voices_for(model: str | None, engine: EngineClient, settings: Settings, access: VoiceAccess) -> VoiceList:
    """The voices of a request for `model`, or of one that names no model."""
    catalog, snapshot = await fresh_catalog(engine)
    own = visible_voices(snapshot.voices, access)
    named = unaliased(model.strip(), settings.model_aliases) if model else None
    spec, base = models_with_voices(named or None, catalog, snapshot.default_model)
    served = [other.id for other in _served(catalog, snapshot)]
    voices = _voices_of(spec) if named or spec.id in served else []
    if base is not None and (named or base.id in served):
        voices += [_saved_in_list(voice, base) for voice in own]
    speaker = base.id if base and base.id in served else _speaker_of_saved(catalog, snapshot)
    saved = [_saved_voice_object(voice, speaker, access) for voice in own if base or not named]
    return VoiceList(voices=voices, uploaded_voices=saved, data=voices)


@get(
    "/voices/{voice_id:path}",
    operation_id="getVoice",
    summary="Get a voice",
    tags=["Voices"],
    responses=documented(400, 401, 403, 404, 500, 503),
)
async def get_voice(
    request: Request[Any, Any, Any], voice_id: VoiceName, engine: EngineDependency, settings: SettingsDependency
) -> VoiceObject | SavedVoiceObject:
    """The voice with that id or name; if several models have one, that of the first model in the list."""
    name = voice_id.removeprefix("/").strip()
    # No saved voice can have the name of one of these.
    for voice in (voice for spec in _served(*cached_catalog(engine)) for voice in _voices_of(spec)):
        if name.casefold() in (voice.id.casefold(), voice.name.casefold()):
            return voice
    caller = caller_of(settings, request)
    return saved_voice_object(await existing_voice(name, engine, caller), engine, caller)


@post(
    "/voices/{voice_id:path}",
    operation_id="updateVoice",
    summary="Rename or share a saved voice",
    tags=["Voices"],
    status_code=200,
    dto=VoiceUpdateJson,
    return_dto=None,
    responses=documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
)
async def update_voice(
    request: Request[Any, Any, Any],
    voice_id: VoiceName,
    data: JSONBody[VoiceUpdate],
    engine: EngineDependency,
    settings: SettingsDependency,
) -> SavedVoiceObject:
    """Give the saved voice with that id or name another name, share it with all keys, or end that. Its id stays.

    Only the key that made the voice may, and admins; where no key owns it, every key may rename it.
    """
    caller = caller_of(settings, request)
    if data.name is None and data.shared is None:
        raise ApiError("invalid_value", "name: send a new name, or shared, or both.", param="name")
    voice = await usable_voice(voice_id, engine, caller)
    caller.require_voice(voice.id, data.name or voice.name, param="name")
    reply = await change_voice(UpdateVoice(id=voice.id, name=data.name, shared=data.shared), engine, caller)
    if reply.voice is None:
        raise ApiError("internal_error", "The GPU worker did not send the changed voice.")
    return saved_voice_object(reply.voice, engine, caller)


@delete(
    "/voices/{voice_id:path}",
    operation_id="deleteVoice",
    summary="Delete a saved voice",
    tags=["Voices"],
    status_code=200,
    responses=documented(400, 401, 403, 404, 500, 503),
)
async def delete_voice(
    request: Request[Any, Any, Any], voice_id: VoiceName, engine: EngineDependency, settings: SettingsDependency
) -> VoiceDeleted:
    """Delete the saved voice with that id or name."""
    caller = caller_of(settings, request)
    voice = await usable_voice(voice_id, engine, caller)
    await change_voice(DeleteVoice(id=voice.id), engine, caller)
    return VoiceDeleted(id=voice.id)


async def existing_voice(name: str, engine: EngineClient, caller: Caller) -> SavedVoice:
    """The saved voice that a path names by id or name; ApiError (`voice_not_found`, 404)."""
    await fresh_catalog(engine)
    voice = await find_saved_voice(name.removeprefix("/").strip(), engine, caller.client, caller.access)
    if voice is None:
        raise _no_such_voice()
    return voice


async def usable_voice(name: str, engine: EngineClient, caller: Caller) -> SavedVoice:
    """As `existing_voice`; ApiError (`insufficient_permissions`) if the key may not speak with the voice either."""
    voice = await existing_voice(name, engine, caller)
    caller.require_voice(voice.id, voice.name, param="voice_id")
    return voice


async def change_voice(action: UpdateVoice | DeleteVoice | ExportVoice, engine: EngineClient, caller: Caller) -> Reply:
    """Carry out `action` on a voice that was there a moment ago."""
    try:
        return await engine.call(action, client=caller.client, access=caller.access, timeout_s=_CHANGE_TIMEOUT_S)
    except ApiError as error:
        # Another client has deleted the voice meanwhile.
        raise _no_such_voice() if error.code == "voice_not_found" else error from None


def _served(catalog: list[ModelSpec], snapshot: Snapshot) -> list[ModelSpec]:
    """The models that can speak, the default one first."""
    served = [spec for spec in catalog if status_of(spec, snapshot).state != "unavailable"]
    return sorted(served, key=lambda spec: spec.id != snapshot.default_model)


def _speaker_of_saved(catalog: list[ModelSpec], snapshot: Snapshot) -> str:
    """The model that speaks with saved voices: the default model's Base model, else any; "" if none can speak."""
    _, base = models_with_voices(None, catalog, snapshot.default_model)
    bases = [spec for spec in _served(catalog, snapshot) if spec.task == "Base"]
    return min((spec.id for spec in bases), key=lambda name: base is None or name != base.id, default="")


def _no_such_voice() -> ApiError:
    return ApiError("voice_not_found", "There is no saved voice with that id or name.", param="voice_id", status=404)


def _voices_of(spec: ModelSpec) -> list[VoiceObject]:
    by_id = {voice.id: voice for voice in spec.voices}
    own = [_voice_object(spec, voice, voice.id, voice.name, "preset") for voice in spec.voices]
    mapped = [(name, by_id[spec.openai_voices[name]]) for name in OPENAI_VOICES if spec.voices]
    return own + [_voice_object(spec, voice, name, name, "openai") for name, voice in mapped]


def _voice_object(
    spec: ModelSpec, voice: Voice, voice_id: str, name: str, kind: Literal["preset", "openai"]
) -> VoiceObject:
    return VoiceObject(
        id=voice_id,
        voice_id=voice_id,
        name=name,
        model=spec.id,
        language=voice.language,
        description=voice.description,
        kind=kind,
    )


def _saved_in_list(voice: SavedVoice, base: ModelSpec) -> VoiceObject:
    return VoiceObject(
        id=voice.id,
        voice_id=voice.id,
        name=voice.name,
        model=base.id,
        language="auto",
        description=voice.description,
        kind=voice.kind,
    )


def may_share(access: VoiceAccess, *, shared: bool | None) -> bool:
    """True if a new voice is to be shared, by its field `shared`; ApiError if the client can own no private voice."""
    if shared is False and not access.owner:
        message = "shared: only a key of the file TTS_KEYS_FILE can have voices of its own; leave it out."
        raise ApiError("invalid_value", message, param="shared")
    return bool(shared)


def saved_voice_object(voice: SavedVoice, engine: EngineClient, caller: Caller) -> SavedVoiceObject:
    """The voice for this client, with the model that speaks with it now."""
    return _saved_voice_object(voice, _speaker_of_saved(*cached_catalog(engine)), caller.access)


def _saved_voice_object(voice: SavedVoice, model: str, access: VoiceAccess) -> SavedVoiceObject:
    knows_owner = access.all or voice.owner == access.owner
    return SavedVoiceObject(
        id=voice.id,
        voice_id=voice.id,
        name=voice.name,
        created_at=voice.created_at,
        type="audio_sample" if voice.kind == "clone" else "prompt",
        prompt=voice.prompt or msgspec.UNSET,
        model=model,
        description=voice.description,
        seconds=voice.seconds,
        in_context=voice.in_context,
        shared=voice.shared,
        owner=voice.owner if voice.owner and knows_owner else msgspec.UNSET,
    )
