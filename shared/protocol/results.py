"""The results of actions: saved voices, consents, models, outcomes of requests, usage."""

from datetime import date
from typing import Literal

import msgspec

from shared.protocol.parts import FinishReason, PublicState, SpeechError, Timings, Usage


class SavedVoice(msgspec.Struct, frozen=True, kw_only=True):
    """A voice on the worker's disk. `created_at` is in Unix seconds.

    `in_context`: its transcript is known, so it is cloned in context and not from a speaker embedding alone.
    `prompt` is the description that it was designed from, "" if it was not.
    `owner` is the name of the key that made it, "" for none. A voice that is not `shared` is for its owner alone.
    """

    id: str
    name: str
    created_at: int
    kind: Literal["clone", "design"]
    prompt: str = ""
    description: str = ""
    seconds: float
    in_context: bool
    owner: str = ""
    shared: bool = True


class UsageRow(msgspec.Struct, frozen=True):
    """The use of one model by one key on one day, UTC. `key` is its name or digest, "" for all clients without one.

    `requests` counts those that were taken, `refused` those that were not.
    `failed` and `cancelled` of the requests did not end well.
    """

    date: date
    key: str
    model: str
    requests: int
    characters: int
    audio_s: float
    refused: int
    failed: int
    cancelled: int


class VoiceConsent(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded consent on the worker's disk. `created_at` is in Unix seconds."""

    id: str
    name: str
    language: str
    created_at: int


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one model and its measured memory: `bytes` on the device by purpose, `host_bytes` in host RAM.

    `detail` is the reason why a model is unavailable, or the progress of its load or download.
    `references` counts its requests. `keep_alive_s` negative: not evicted when idle; None: as configured.
    """

    id: str
    state: PublicState
    bytes: dict[str, int] = {}
    host_bytes: int = 0
    last_used: float | None = None
    idle_s: float | None = None
    references: int = 0
    pinned: bool = False
    keep_alive_s: float | None = None
    detail: str = ""


SpeechStatus = Literal["queued", "speaking", "done", "failed", "cancelled"]
"""done: the web worker has received all of it, and has not said that the client has not.
failed: `error` says why. cancelled: the client left.
"""


class SpeechOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a Speak, or its progress; only one that is done has `finish_reason` and `usage`.

    `queue_position` counts from 1, in the order in which queued requests get a slot; None for one that is not queued.

    `timings` are those of Finished, or the times up to the failure.
    """

    id: str
    client: str
    status: SpeechStatus
    model: str
    voice: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: SpeechError | None = None
    queue_position: int | None = None
