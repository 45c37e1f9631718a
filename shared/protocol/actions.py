"""The actions of a Call: everything but speech that a web worker asks of the GPU worker."""

from datetime import date
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from shared.pcm import bytes_for
from shared.protocol.parts import CacheName, Instructions, KeyLimits, Name, Priority, Transcript
from shared.recordings import MAX_RECORDING_S

MAX_PORTABLE_PCM: Final = bytes_for(MAX_RECORDING_S)
"""Bytes of the longest recording that a voice is cloned from."""


class LoadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load a model, or restore it from host RAM. `keep_alive_s` is as in Speak, from now on."""

    model: str
    keep_alive_s: float | None = None


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drop a model from device and host RAM; refused (`model_busy`) while it has requests."""

    model: str


class PinModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Protect a model from eviction, or end that."""

    model: str
    pinned: bool


class Cleanup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run a pass that evicts idle models now."""


class FindVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Find a saved voice by id or name, in any case."""

    name: str


class CloneVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Save the payload as a voice: cloned in context if `text` (its transcript) is there, else by speaker embedding."""

    name: str
    text: str | None = None
    description: str = ""
    consent: str = ""
    shared: bool = False


class DesignVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Let the voice-design model speak as `prompt` describes, and save its speech as a voice.

    `script` is what it says; "" for the worker's own text. The payload, if there is one, is such speech that was made
    before: it is saved as it is, and `script` is its transcript, "" if that is unknown. `limits` and `priority` are as
    in Speak.
    """

    name: str
    prompt: str
    script: str = ""
    description: str = ""
    limits: KeyLimits = KeyLimits()
    priority: Priority = "interactive"
    shared: bool = False


class UpdateVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Give the saved voice with this id another name, share it with all keys, or end that; None leaves it as it is."""

    id: str
    name: str | None = None
    shared: bool | None = None


class DeleteVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Delete the saved voice with this id."""

    id: str


class PortableConsent(msgspec.Struct, frozen=True, kw_only=True):
    """A consent as it goes from one server to another. `created_at` is in Unix seconds."""

    name: Name
    language: Name
    created_at: Annotated[int, Meta(ge=0)]
    pcm: Annotated[bytes, Meta(max_length=MAX_PORTABLE_PCM)]


class PortableVoice(msgspec.Struct, frozen=True, kw_only=True):
    """A saved voice with its recording and the consent of its speaker, as it goes from one server to another.

    `pcm` is 24 kHz mono int16 little-endian, `text` its transcript. It is no payload: there may be two recordings.
    """

    name: Name
    kind: Literal["clone", "design"]
    text: Transcript | None = None
    prompt: Instructions = ""
    description: Instructions = ""
    pcm: Annotated[bytes, Meta(max_length=MAX_PORTABLE_PCM)]
    consent: PortableConsent | None = None


class ExportVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Read the saved voice with this id from the disk, and its consent if that is kept."""

    id: str


class ImportVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Save a voice of another server, and its consent."""

    voice: PortableVoice
    shared: bool = False


class FindSpeech(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Find out how a request ended, by its request id or its speech id (see `new_speak_id`); the latest one counts.

    With a `client`, only among the requests of that client.
    """

    id: str
    client: str = ""


class CreateConsent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Save the payload, in which a speaker consents to be cloned. `language` is a BCP 47 tag."""

    name: str
    language: str


class FindConsent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Find a consent by its id."""

    id: str


class ListConsents(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """List `limit` consents, the newest first, from the one behind `after` on."""

    limit: int
    after: str = ""


class RenameConsent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Give a consent another name."""

    id: str
    name: str


class DeleteConsent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Delete the consent with this id; voices that were made with it stay."""

    id: str


class EmptyCache(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Empty a cache: of all engines, or of all web workers, which learn it from Snapshot.emptied."""

    name: CacheName


ModelAction = LoadModel | UnloadModel | PinModel | Cleanup
VoiceAction = FindVoice | CloneVoice | DesignVoice | UpdateVoice | DeleteVoice | ExportVoice | ImportVoice
ConsentAction = CreateConsent | FindConsent | ListConsents | RenameConsent | DeleteConsent


class FindUsage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """List what was used from the day `since` to the day `until`, both included, UTC."""

    since: date
    until: date


class Reload(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Take these settings: variables that WorkerLive marks, and their values as text; "" is one that is unset."""

    variables: dict[str, str]


Action = ModelAction | VoiceAction | ConsentAction | FindSpeech | EmptyCache | FindUsage | Reload
