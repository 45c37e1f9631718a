"""/v1/audio/voices: list, make and delete voices.

The GPU worker owns the saved voices. This module checks names and turns recordings into PCM.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, delete, get, post
from litestar.datastructures import UploadFile
from litestar.enums import RequestEncodingType
from litestar.params import Body, PathParameter, QueryParameter
from msgspec import Meta

from server.audio import MAX_REFERENCE_BYTES
from server.dependencies import DecoderPoolDependency, EngineDependency, SettingsDependency
from server.engine import EngineClient, cached_catalog, find_saved_voice, fresh_catalog, require_consent, status_of
from server.http.auth import client_of
from server.http.errors import ApiError, documented
from server.http.form_bodies import BROKEN_FORM, FormOrJson, FormOrJsonDto, keep_json, read_upload
from server.http.json_bodies import JsonDecoder
from server.http.streaming import cancel_on_disconnect
from server.resolution import models_with_voices, unaliased
from server.schemas import (
    MAX_INSTRUCTIONS,
    MAX_NAME,
    MAX_REF_TEXT,
    Name,
    SavedVoiceObject,
    VoiceDeleted,
    VoiceList,
    VoiceNames,
    VoiceObject,
)
from shared.catalog import OPENAI_VOICES, ModelSpec, Voice
from shared.protocol import Action, CloneVoice, DeleteVoice, DesignVoice, SavedVoice, Snapshot
from shared.settings import Settings
from shared.text import is_printable, is_speakable

MIN_SCRIPT: Final = 20
MAX_SCRIPT: Final = 400
"""Characters of the text that a voice says while it is designed; 30 s may hold them."""

_MAKE_TIMEOUT_S: Final = 300.0
"""Making a voice may include loading a model."""

_DELETE_TIMEOUT_S: Final = 10.0

VoiceName = Annotated[str, PathParameter(description="A voice's id or name; a name may contain a slash.")]


class VoiceForm(msgspec.Struct, kw_only=True):
    """A recording to clone (`audio_sample`) or, with `type=prompt`, the description of a voice to design.

    `clone` is another name of the type `audio_sample`. `model` is taken and has no effect.
    """

    name: Name
    type: Literal["audio_sample", "prompt", "clone"] = "audio_sample"
    audio_sample: UploadFile | None = None
    ref_text: Annotated[str, Meta(max_length=MAX_REF_TEXT, description="The transcript of audio_sample.")] | None = None
    prompt: Annotated[str, Meta(max_length=MAX_INSTRUCTIONS, description="The description of the voice.")] | None = None
    model: Name | None = None
    script_hint: (
        Annotated[str, Meta(max_length=MAX_SCRIPT, description="What the voice says while it is designed.")] | None
    ) = None
    consent: Name | None = None
    description: Annotated[str, Meta(max_length=MAX_INSTRUCTIONS)] | None = None


class VoiceBody(FormOrJsonDto[VoiceForm]):
    """The DTO of a new voice."""

    decoder = JsonDecoder(VoiceForm, {})


@get(
    "/voices",
    operation_id="listVoices",
    summary="List the voices",
    tags=["Voices"],
    responses=documented(400, 401, 403, 404, 500, 503),
)
async def list_voices(
    engine: EngineDependency,
    settings: SettingsDependency,
    *,
    model: Annotated[
        str | None, QueryParameter(description="List the voices of this model.", max_length=MAX_NAME)
    ] = None,
    legacy: Annotated[bool, QueryParameter(description="Plain strings instead of objects.")] = False,
) -> VoiceList | VoiceNames:
    """What a request can name as its voice: preset voices, OpenAI's names for them, and saved voices.

    With `model`, a request for that model; else one that names no model, or one of OpenAI's.
    """
    listed = await voices_for(model, engine, settings)
    if legacy:
        names = [voice.id for voice in listed.uploaded_voices]
        return VoiceNames(voices=[voice.id for voice in listed.voices], uploaded_voices=names)
    return listed


async def voices_for(model: str | None, engine: EngineClient, settings: Settings) -> VoiceList:
    """The voices of a request for `model`, or of one that names no model."""
    catalog, snapshot = await fresh_catalog(engine)
    named = unaliased(model.strip(), settings.model_aliases) if model else None
    spec, base = models_with_voices(named or None, catalog, snapshot.default_model)
    served = [other.id for other in _served(catalog, snapshot)]
    voices = _voices_of(spec) if named or spec.id in served else []
    if base is not None and (named or base.id in served):
        voices += [_saved_in_list(voice, base) for voice in snapshot.voices]
    speaker = base.id if base and base.id in served else _speaker_of_saved(catalog, snapshot)
    saved = [_saved_voice_object(voice, speaker) for voice in snapshot.voices if base or not named]
    return VoiceList(voices=voices, uploaded_voices=saved, data=voices)


@post(
    "/voices",
    operation_id="createVoice",
    summary="Save a voice",
    tags=["Voices"],
    status_code=200,
    dto=VoiceBody,
    return_dto=None,
    before_request=keep_json,
    operation_class=FormOrJson,
    exception_handlers=BROKEN_FORM,
    responses=documented(400, 401, 403, 408, 409, 413, 415, 429, 500, 503),
)
async def create_voice(
    request: Request[Any, Any, Any],
    data: Annotated[VoiceForm, Body(media_type=RequestEncodingType.MULTI_PART)],
    engine: EngineDependency,
    settings: SettingsDependency,
    decoder_pool: DecoderPoolDependency,
) -> SavedVoiceObject:
    """Save a voice, cloned from a recording (1 to 60 s, at most 10 MiB) or designed from a description."""
    if not is_printable(data.name):
        raise ApiError("invalid_value", "name: must have printable characters only.", param="name")
    client = client_of(settings, request)
    action: Action
    pcm = None
    if data.type == "prompt":
        action = _design(data)
    else:
        if settings.require_consent:
            await require_consent(data.consent, engine, client)
        sample = await read_upload(data.audio_sample, "audio_sample", MAX_REFERENCE_BYTES)
        pcm = await cancel_on_disconnect(request, decoder_pool.decode(sample, "audio_sample"))
        transcript = (data.ref_text or "").strip()
        action = CloneVoice(
            name=data.name,
            text=transcript if is_speakable(transcript) else None,
            description=data.description or "",
            consent=data.consent or "",
        )
    making = engine.call(action, client=client, payload=pcm, timeout_s=_MAKE_TIMEOUT_S)
    reply = await cancel_on_disconnect(request, making)
    if reply.voice is None:
        raise ApiError("internal_error", "The GPU worker saved the voice but did not send its id.")
    return _saved_voice_object(reply.voice, _speaker_of_saved(*cached_catalog(engine)))


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
    saved = await _existing(name, engine, client_of(settings, request))
    return _saved_voice_object(saved, _speaker_of_saved(*cached_catalog(engine)))


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
    client = client_of(settings, request)
    voice = await _existing(voice_id.removeprefix("/").strip(), engine, client)
    try:
        await engine.call(DeleteVoice(id=voice.id), client=client, timeout_s=_DELETE_TIMEOUT_S)
    except ApiError as error:
        # Another client has deleted the voice meanwhile.
        raise _no_such_voice() if error.code == "voice_not_found" else error from None
    return VoiceDeleted(id=voice.id)


def _design(data: VoiceForm) -> DesignVoice:
    if not (data.prompt or "").strip():
        raise ApiError("invalid_value", "prompt: must describe the voice.", param="prompt")
    script = (data.script_hint or "").strip()
    if script and (len(script) < MIN_SCRIPT or not is_speakable(script)):
        raise ApiError(
            "invalid_value", f"script_hint: must have at least {MIN_SCRIPT} characters.", param="script_hint"
        )
    return DesignVoice(name=data.name, prompt=data.prompt or "", script=script, description=data.description or "")


def _served(catalog: list[ModelSpec], snapshot: Snapshot) -> list[ModelSpec]:
    """The models that can speak, the default one first."""
    served = [spec for spec in catalog if status_of(spec, snapshot).state != "unavailable"]
    return sorted(served, key=lambda spec: spec.id != snapshot.default_model)


def _speaker_of_saved(catalog: list[ModelSpec], snapshot: Snapshot) -> str:
    """The model that speaks with saved voices: the default model's Base model, else any; "" if none can speak."""
    _, base = models_with_voices(None, catalog, snapshot.default_model)
    bases = [spec for spec in _served(catalog, snapshot) if spec.task == "Base"]
    return min((spec.id for spec in bases), key=lambda name: base is None or name != base.id, default="")


async def _existing(name: str, engine: EngineClient, client: str) -> SavedVoice:
    await fresh_catalog(engine)
    voice = await find_saved_voice(name, engine, client)
    if voice is None:
        raise _no_such_voice()
    return voice


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


def _saved_voice_object(voice: SavedVoice, model: str) -> SavedVoiceObject:
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
    )
