"""/v1/audio/voice_consents: recordings in which a speaker consents to be cloned, as OpenAI's API has them.

The GPU worker keeps them beside the saved voices. This module checks fields and turns recordings into PCM.
"""

import re
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, delete, get, post
from litestar.datastructures import UploadFile
from litestar.enums import RequestEncodingType
from litestar.params import Body, FromPath, JSONBody, QueryParameter
from msgspec import Meta

from server.audio import MAX_REFERENCE_BYTES
from server.dependencies import DecoderPoolDependency, EngineDependency, SettingsDependency
from server.engine import EngineClient
from server.http.auth import caller_of
from server.http.errors import ApiError, documented
from server.http.form_bodies import BROKEN_FORM, FormOrJsonDto, keep_json, read_upload
from server.http.json_bodies import JsonBodyDto, JsonDecoder
from server.http.keys import Caller
from server.http.leniency import TRIMMED
from server.http.streaming import cancel_on_disconnect
from server.schemas import Name, VoiceConsentDeleted, VoiceConsentList, VoiceConsentObject
from shared.protocol import (
    MAX_NAME,
    ConsentAction,
    CreateConsent,
    DeleteConsent,
    FindConsent,
    ListConsents,
    RenameConsent,
    Reply,
    VoiceConsent,
)

_TIMEOUT_S: Final = 30.0
"""A slow disk takes seconds."""

LANGUAGE_TAG: Final = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,8}")
"""The form of a BCP 47 tag."""


class ConsentForm(msgspec.Struct, kw_only=True):
    """The speaker's name, the language (a BCP 47 tag), and the recording: 1 to 60 s, at most 10 MiB."""

    name: Name
    language: Annotated[str, Meta(max_length=MAX_NAME, extra=TRIMMED)]
    recording: UploadFile


class ConsentUpdate(msgspec.Struct, kw_only=True):
    """Another name for a consent."""

    name: Name


class ConsentBody(FormOrJsonDto[ConsentForm]):
    """The DTO of a new consent."""

    decoder = JsonDecoder(ConsentForm, {})


class ConsentUpdateJson(JsonBodyDto[ConsentUpdate]):
    """The DTO of a consent's new name."""

    decoder = JsonDecoder(ConsentUpdate, {})


@post(
    "/voice_consents",
    operation_id="createVoiceConsent",
    summary="Save a consent",
    tags=["Voices"],
    status_code=200,
    dto=ConsentBody,
    return_dto=None,
    before_request=keep_json,
    exception_handlers=BROKEN_FORM,
    responses=documented(400, 401, 403, 408, 413, 415, 429, 500, 503),
)
async def create_consent(
    request: Request[Any, Any, Any],
    data: Annotated[ConsentForm, Body(media_type=RequestEncodingType.MULTI_PART)],
    engine: EngineDependency,
    settings: SettingsDependency,
    decoder_pool: DecoderPoolDependency,
) -> VoiceConsentObject:
    """Save a recording in which a speaker consents to be cloned."""
    if not LANGUAGE_TAG.fullmatch(data.language):
        raise ApiError("invalid_value", "language: must be a BCP 47 tag, such as en-US.", param="language")
    recording = await read_upload(data.recording, "recording", MAX_REFERENCE_BYTES)
    pcm = await cancel_on_disconnect(request, decoder_pool.decode(recording, "recording"))
    action = CreateConsent(name=data.name, language=data.language)
    caller = caller_of(settings, request)
    making = engine.call(action, client=caller.client, access=caller.access, payload=pcm, timeout_s=_TIMEOUT_S)
    return _object(await cancel_on_disconnect(request, making))


@get(
    "/voice_consents",
    operation_id="listVoiceConsents",
    summary="List the consents",
    tags=["Voices"],
    responses=documented(400, 401, 403, 500, 503),
)
async def list_consents(
    request: Request[Any, Any, Any],
    engine: EngineDependency,
    settings: SettingsDependency,
    *,
    after: Annotated[
        str | None, QueryParameter(description="The last consent of the page before.", max_length=MAX_NAME)
    ] = None,
    limit: Annotated[int, QueryParameter(description="The most consents on a page.", ge=1, le=100)] = 20,
) -> VoiceConsentList:
    """A page of consents, the newest first. Those of other keys are not there."""
    action = ListConsents(limit=limit, after=after or "")
    caller = caller_of(settings, request)
    try:
        reply = await engine.call(action, client=caller.client, access=caller.access, timeout_s=_TIMEOUT_S)
    except ApiError as error:
        if error.code != "consent_not_found":
            raise
        raise ApiError(error.code, f"after: {error.message}", param="after") from None
    return VoiceConsentList(
        data=[_public(consent) for consent in reply.consents],
        first_id=reply.consents[0].id if reply.consents else None,
        last_id=reply.consents[-1].id if reply.consents else None,
        has_more=reply.has_more,
    )


@get(
    "/voice_consents/{consent_id:str}",
    operation_id="getVoiceConsent",
    summary="Get a consent",
    tags=["Voices"],
    responses=documented(400, 401, 403, 404, 500, 503),
)
async def get_consent(
    request: Request[Any, Any, Any], consent_id: FromPath[str], engine: EngineDependency, settings: SettingsDependency
) -> VoiceConsentObject:
    """The consent with that id."""
    return _object(await _call(FindConsent(id=consent_id), engine, caller_of(settings, request)))


@post(
    "/voice_consents/{consent_id:str}",
    operation_id="updateVoiceConsent",
    summary="Rename a consent",
    tags=["Voices"],
    status_code=200,
    dto=ConsentUpdateJson,
    return_dto=None,
    responses=documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
)
async def update_consent(
    request: Request[Any, Any, Any],
    consent_id: FromPath[str],
    data: JSONBody[ConsentUpdate],
    engine: EngineDependency,
    settings: SettingsDependency,
) -> VoiceConsentObject:
    """Give the consent with that id another name."""
    action = RenameConsent(id=consent_id, name=data.name)
    return _object(await _call(action, engine, caller_of(settings, request)))


@delete(
    "/voice_consents/{consent_id:str}",
    operation_id="deleteVoiceConsent",
    summary="Delete a consent",
    tags=["Voices"],
    status_code=200,
    responses=documented(400, 401, 403, 404, 429, 500, 503),
)
async def delete_consent(
    request: Request[Any, Any, Any], consent_id: FromPath[str], engine: EngineDependency, settings: SettingsDependency
) -> VoiceConsentDeleted:
    """Delete the consent with that id. Voices that were made with it stay."""
    await _call(DeleteConsent(id=consent_id), engine, caller_of(settings, request))
    return VoiceConsentDeleted(id=consent_id)


async def _call(action: ConsentAction, engine: EngineClient, caller: Caller) -> Reply:
    """Carry out `action` on the consent that the path names: a missing one is a 404."""
    try:
        return await engine.call(action, client=caller.client, access=caller.access, timeout_s=_TIMEOUT_S)
    except ApiError as error:
        if error.code != "consent_not_found":
            raise
        message = "There is no consent with that id."
        raise ApiError(error.code, message, param="consent_id", status=404) from None


def _object(reply: Reply) -> VoiceConsentObject:
    if reply.consent is None:
        raise ApiError("internal_error", "The GPU worker did not send the consent.")
    return _public(reply.consent)


def _public(consent: VoiceConsent) -> VoiceConsentObject:
    return VoiceConsentObject(**msgspec.structs.asdict(consent))
