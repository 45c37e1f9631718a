"""/v1/audio/voice_files: a saved voice as one file, from one server to another, with its recording and its consent.

The file is msgpack of a `VoiceFile`. It holds plain values alone, each with a bound, and no name of a file.
"""

from contextlib import suppress
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

import msgspec
from litestar import Request, Response, get, post
from litestar.datastructures import UploadFile
from litestar.enums import RequestEncodingType
from litestar.params import Body
from litestar.response import Stream

from server.dependencies import EngineDependency, SettingsDependency
from server.http.auth import caller_of
from server.http.errors import ApiError, documented
from server.http.form_bodies import BROKEN_FORM, FormOrJson, FormOrJsonDto, keep_json, read_upload
from server.http.json_bodies import JsonDecoder
from server.http.request_scope import is_head
from server.http.streaming import cancel_on_disconnect
from server.routes.v1.voice_consents import LANGUAGE_TAG
from server.routes.v1.voices import VoiceName, change_voice, may_share, saved_voice_object, usable_voice
from server.schemas import Name, SavedVoiceObject
from shared.protocol import MAX_PORTABLE_PCM, ExportVoice, ImportVoice, PortableVoice
from shared.text import transcript_of
from shared.voice_access import is_changeable

MAX_FILE_BYTES: Final = 2 * MAX_PORTABLE_PCM + 64 * 1024
"""Two recordings, and their words."""

_MEDIA_TYPE: Final = "application/octet-stream"
_TIMEOUT_S: Final = 30.0
"""A slow disk takes seconds."""


class VoiceFile(msgspec.Struct, frozen=True, kw_only=True):
    """The content of an exported file."""

    voice: PortableVoice
    format: Literal["qwen3-tts-voice"] = "qwen3-tts-voice"
    version: Literal[1] = 1


class VoiceFileForm(msgspec.Struct, kw_only=True):
    """The file of a voice, the name that it gets here (without one, its own), and whether every key may use it."""

    file: UploadFile
    name: Name | None = None
    shared: bool | None = None


class VoiceFileBody(FormOrJsonDto[VoiceFileForm]):
    """The DTO of a voice to import."""

    decoder = JsonDecoder(VoiceFileForm, {})


@get(
    "/voice_files/{voice_id:path}",
    operation_id="exportVoice",
    summary="Export a saved voice as a file",
    tags=["Voices"],
    media_type=_MEDIA_TYPE,
    responses=documented(400, 401, 403, 404, 429, 500, 503),
)
async def export_voice(
    request: Request[Any, Any, Any], voice_id: VoiceName, engine: EngineDependency, settings: SettingsDependency
) -> Response[bytes]:
    """The saved voice with that id or name: recording, transcript and description, and the consent if it is kept."""
    caller = caller_of(settings, request)
    voice = await usable_voice(voice_id, engine, caller)
    name = quote(f"{voice.name}.voice", safe="")
    headers = {"Content-Disposition": f"attachment; filename=\"{voice.id}.voice\"; filename*=UTF-8''{name}"}
    if is_head(request.scope) and is_changeable(voice, caller.access):
        # Nothing leaves this server, and the audit log must not say so; so the length is unknown.
        return Stream(iter(()), media_type=_MEDIA_TYPE, headers=headers)  # type: ignore[return-value]  # of bytes, too
    reply = await change_voice(ExportVoice(id=voice.id), engine, caller)
    if reply.exported is None:
        raise ApiError("internal_error", "The GPU worker did not send the voice.")
    return Response(msgspec.msgpack.encode(VoiceFile(voice=reply.exported)), media_type=_MEDIA_TYPE, headers=headers)


@post(
    "/voice_files",
    operation_id="importVoice",
    summary="Import a voice from a file",
    tags=["Voices"],
    status_code=200,
    dto=VoiceFileBody,
    return_dto=None,
    before_request=keep_json,
    operation_class=FormOrJson,
    exception_handlers=BROKEN_FORM,
    responses=documented(400, 401, 403, 408, 413, 415, 429, 500, 503),
)
async def import_voice(
    request: Request[Any, Any, Any],
    data: Annotated[VoiceFileForm, Body(media_type=RequestEncodingType.MULTI_PART)],
    engine: EngineDependency,
    settings: SettingsDependency,
) -> SavedVoiceObject:
    """Save the voice of a file that a server of this kind exported. It gets a new id, and so does its consent.

    Where the server requires consents, a file without one is refused: a file can say anything of where it comes from.
    """
    voice = _voice_in(await read_upload(data.file, "file", MAX_FILE_BYTES))
    if settings.require_consent and voice.consent is None:
        raise ApiError("invalid_value", "file: the voice has no consent, and this server requires one.", param="file")
    voice = msgspec.structs.replace(voice, name=data.name or voice.name, text=transcript_of(voice.text))
    caller = caller_of(settings, request)
    caller.require_voice(voice.name, param="name")
    action = ImportVoice(voice=voice, shared=may_share(caller.access, shared=data.shared))
    saving = engine.call(action, client=caller.client, access=caller.access, timeout_s=_TIMEOUT_S)
    reply = await cancel_on_disconnect(request, saving)
    if reply.voice is None:
        raise ApiError("internal_error", "The GPU worker saved the voice but did not send its id.")
    return saved_voice_object(reply.voice, engine, caller)


def _voice_in(content: bytes) -> PortableVoice:
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        voice = msgspec.msgpack.decode(content, type=VoiceFile).voice
        if voice.consent is None or LANGUAGE_TAG.fullmatch(voice.consent.language):
            return voice
    message = "file: is no voice that a server of this kind has exported, or it is damaged."
    raise ApiError("invalid_value", message, param="file")
