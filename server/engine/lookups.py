"""Lookups that routes share: the catalogue with a snapshot, a model's status, a saved voice, a request's outcome."""

from contextlib import suppress
from typing import Final

from server.engine.client import EngineClient
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import (
    FindConsent,
    FindSpeech,
    FindVoice,
    ModelStatus,
    SavedVoice,
    Snapshot,
    SpeechOutcome,
    VoiceAccess,
)
from shared.voice_access import find_voice

_FIND_TIMEOUT_S: Final = 15.0
"""A pause of the GPU worker of 10 s costs no request."""

CatalogAndSnapshot = tuple[list[ModelSpec], Snapshot]


def cached_catalog(engine: EngineClient) -> CatalogAndSnapshot:
    """The catalogue and the latest snapshot; ApiError (`worker_unavailable`) before the first connection."""
    if engine.snapshot is None or not engine.catalog:
        raise engine.unavailable() or ApiError("worker_unavailable", "The GPU worker has not reported its models yet.")
    return engine.catalog, engine.snapshot


async def fresh_catalog(engine: EngineClient) -> CatalogAndSnapshot:
    """The catalogue and a new snapshot, which holds the changes that other web workers have just made.

    If the worker does not answer, the latest snapshot is used.
    """
    with suppress(ApiError):
        await engine.fresh_snapshot(0)
    return cached_catalog(engine)


def status_of(spec: ModelSpec, snapshot: Snapshot) -> ModelStatus:
    """The model's status; "absent" if the snapshot does not name the model."""
    named = (status for status in snapshot.models if status.id == spec.id)
    return next(named, ModelStatus(id=spec.id, state="absent"))


async def find_saved_voice(name: str, engine: EngineClient, client: str, access: VoiceAccess) -> SavedVoice | None:
    """The saved voice that a client means by that id or name (in any case), or None; ApiError without a worker.

    The snapshot answers without a message. If it lacks the voice, the worker is asked: another web worker may have
    saved the voice a moment ago. So it is for a voice of another key: neither the answer nor its time tells of it.
    """
    voice = find_voice(name, engine.snapshot.voices if engine.snapshot else (), access)
    if voice is not None:
        return voice
    find = FindVoice(name=name)
    try:
        return (await engine.call(find, client=client, access=access, timeout_s=_FIND_TIMEOUT_S)).voice
    except ApiError as error:
        if error.code == "voice_not_found":
            return None
        raise


async def find_speech(name: str, engine: EngineClient, client: str, owner: str) -> SpeechOutcome:
    """The outcome of the request with that request id or speech id; ApiError (`not_found`) if it is not kept.

    With an `owner`, only if the request is that client's.
    """
    reply = await engine.call(FindSpeech(id=name, client=owner), client=client, timeout_s=_FIND_TIMEOUT_S)
    if reply.speech is None:
        raise ApiError("internal_error", "The GPU worker found the request but did not send its outcome.")
    return reply.speech


async def require_consent(consent_id: str | None, engine: EngineClient, client: str, access: VoiceAccess) -> None:
    """Raise ApiError unless `consent_id` is that of a recorded consent of the client (TTS_REQUIRE_CONSENT)."""
    if not consent_id:
        message = "consent: this server clones a voice only with the id of a consent (POST /v1/audio/voice_consents)."
        raise ApiError("invalid_value", message, param="consent")
    await engine.call(FindConsent(id=consent_id), client=client, access=access, timeout_s=_FIND_TIMEOUT_S)
