"""POST /v1/audio/voices: a new voice, cloned from a recording or designed from a description.

The GPU worker makes and keeps it. This module checks names and turns recordings into PCM.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, post
from litestar.datastructures import UploadFile
from litestar.enums import RequestEncodingType
from litestar.params import Body
from msgspec import Meta

from server.audio import MAX_REFERENCE_BYTES, AudioStore
from server.dependencies import AudioStoreDependency, DecoderPoolDependency, EngineDependency, SettingsDependency
from server.engine import EngineClient, cached_catalog, require_consent
from server.http.auth import caller_of
from server.http.errors import ApiError, documented
from server.http.form_bodies import BROKEN_FORM, FormOrJson, FormOrJsonDto, keep_json, read_upload
from server.http.json_bodies import JsonDecoder
from server.http.keys import Caller
from server.http.streaming import cancel_on_disconnect
from server.routes.v1.voices import may_share, saved_voice_object
from server.schemas import Name, SavedVoiceObject
from shared.protocol import MAX_INSTRUCTIONS, MAX_NAME, MAX_TRANSCRIPT, Action, CloneVoice, DesignVoice
from shared.text import is_printable, is_speakable, transcript_of

MIN_SCRIPT: Final = 20
MAX_SCRIPT: Final = 400
"""Characters of the text that a voice says while it is designed; 30 s may hold them."""

_MAKE_TIMEOUT_S: Final = 300.0
"""Making a voice may include loading a model."""


class VoiceForm(msgspec.Struct, kw_only=True):
    """A recording to clone (`audio_sample`) or, with `type=prompt`, the description of a voice to design.

    `clone` is another name of the type `audio_sample`. `model` is taken and has no effect.
    """

    name: Name
    type: Literal["audio_sample", "prompt", "clone"] = "audio_sample"
    audio_sample: UploadFile | None = None
    ref_text: Annotated[str, Meta(max_length=MAX_TRANSCRIPT, description="The transcript of audio_sample.")] | None = (
        None
    )
    prompt: Annotated[str, Meta(max_length=MAX_INSTRUCTIONS, description="The description of the voice.")] | None = None
    model: Name | None = None
    script_hint: (
        Annotated[str, Meta(max_length=MAX_SCRIPT, description="What the voice says while it is designed.")] | None
    ) = None
    audio_id: (
        Annotated[
            str,
            Meta(
                max_length=MAX_NAME,
                description="With type=prompt: the id in the `x-audio-url` of stored speech that a voice-design model "
                "has made of the prompt. That speech becomes the voice, and script_hint is its text.",
            ),
        ]
        | None
    ) = None
    consent: (
        Annotated[Name, Meta(description="The id of a consent. It is checked if the server requires consents.")] | None
    ) = None
    description: Annotated[str, Meta(max_length=MAX_INSTRUCTIONS)] | None = None
    shared: (
        Annotated[bool, Meta(description="true: every key may speak with the voice. By default its own key alone may.")]
        | None
    ) = None


class VoiceBody(FormOrJsonDto[VoiceForm]):
    """The DTO of a new voice."""

    decoder = JsonDecoder(VoiceForm, {})


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
    *,
    engine: EngineDependency,
    settings: SettingsDependency,
    decoder_pool: DecoderPoolDependency,
    audio_store: AudioStoreDependency,
) -> SavedVoiceObject:
    """Save a voice, cloned from a recording (1 to 60 s, at most 10 MiB) or designed from a description."""
    if not is_printable(data.name):
        raise ApiError("invalid_value", "name: must have printable characters only.", param="name")
    caller = caller_of(settings, request)
    caller.require_voice(data.name, param="name")
    shared = may_share(caller.access, shared=data.shared)
    action: Action
    pcm = None
    if data.type == "prompt":
        action = _design(data, caller, shared=shared)
        if not data.audio_id:
            _require_designer(caller, engine)
        else:
            heard = await _heard_design(data.audio_id.strip(), audio_store)
            pcm = await cancel_on_disconnect(request, decoder_pool.decode(heard, "audio_id"))
    else:
        if settings.require_consent:
            await require_consent(data.consent, engine, caller.client, caller.access)
        sample = await read_upload(data.audio_sample, "audio_sample", MAX_REFERENCE_BYTES)
        pcm = await cancel_on_disconnect(request, decoder_pool.decode(sample, "audio_sample"))
        action = CloneVoice(
            name=data.name,
            text=transcript_of(data.ref_text),
            description=data.description or "",
            consent=data.consent or "",
            shared=shared,
        )
    making = engine.call(action, client=caller.client, access=caller.access, payload=pcm, timeout_s=_MAKE_TIMEOUT_S)
    reply = await cancel_on_disconnect(request, making)
    if reply.voice is None:
        raise ApiError("internal_error", "The GPU worker saved the voice but did not send its id.")
    return saved_voice_object(reply.voice, engine, caller)


def _require_designer(caller: Caller, engine: EngineClient) -> None:
    """Raise ApiError if the key may not use the model that designs voices."""
    catalog, _ = cached_catalog(engine)
    for spec in catalog:
        if spec.task == "VoiceDesign":
            caller.require_model(spec.id)


def _design(data: VoiceForm, caller: Caller, *, shared: bool) -> DesignVoice:
    if not (data.prompt or "").strip():
        raise ApiError("invalid_value", "prompt: must describe the voice.", param="prompt")
    script = (data.script_hint or "").strip()
    if script and (len(script) < MIN_SCRIPT or not is_speakable(script)):
        raise ApiError(
            "invalid_value", f"script_hint: must have at least {MIN_SCRIPT} characters.", param="script_hint"
        )
    return DesignVoice(
        name=data.name,
        prompt=data.prompt or "",
        script=script,
        description=data.description or "",
        limits=caller.limits,
        priority=caller.priority,
        shared=shared,
    )


async def _heard_design(audio_id: str, audio_store: AudioStore) -> bytes:
    """The stored speech of a voice-design model, as a file; ApiError if it is no such speech."""
    audio = await audio_store.open(audio_id)
    if audio is None:
        raise ApiError("invalid_value", "audio_id: this server keeps no such speech any more.", param="audio_id")
    try:
        if not audio.facts.designed:
            raise ApiError("invalid_value", "audio_id: no voice-design model made this speech.", param="audio_id")
        if audio.size > MAX_REFERENCE_BYTES:
            raise ApiError("invalid_value", "audio_id: this speech is too long for a voice.", param="audio_id")
        content = b""
        while piece := await audio.read(len(content), audio.size - len(content)):
            content += piece
        return content
    finally:
        audio.close()
