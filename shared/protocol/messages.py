"""The messages, and their order.

A message is one header frame (a tagged Struct in msgpack) and, if it has sound, one payload frame of raw PCM
(24 kHz mono int16 little-endian). Nothing else crosses the socket, and nothing is ever pickled.

    web worker -> GPU worker: Hello, Speak (+PCM of a reference), Append, EndText, Credit, Cancel, Spoken,
                              Call (+PCM of a recording), Ping, UsedElsewhere
    GPU worker -> web worker: Welcome, Started, Audio (+PCM), Finished, Failed, Reply, Pong, Probe

The worker answers a Speak with Started, Audio …, and then exactly one Finished or Failed;
it never sends more Audio messages than it has credit for.
The text of an open Speak goes on with Append, until EndText.
"""

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from shared.catalog import ModelSpec
from shared.protocol.actions import Action, PortableVoice
from shared.protocol.parts import (
    CacheCounts,
    CacheName,
    FinishReason,
    Instructions,
    KeyLimits,
    KeyUse,
    LimitName,
    Name,
    Priority,
    RateLimit,
    Sampling,
    Segment,
    SpeechError,
    SpokenText,
    Task,
    Timings,
    TraceParent,
    Transcript,
    Usage,
    VoiceAccess,
    Word,
)
from shared.protocol.results import ModelStatus, SavedVoice, SpeechOutcome, UsageRow, VoiceConsent
from shared.protocol.snapshot import CleanupPass, Snapshot

VERSION: Final = 17
"""Hello and Welcome have it; the two sides talk only if their versions are equal."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """The base of all messages; the name of the class is the tag on the wire."""


class Hello(Message, frozen=True, kw_only=True):
    """The first message on each connection."""

    version: int
    token: str


class Speak(Message, frozen=True, kw_only=True):
    """Speak `segments`, one after the other. Model, voice and language have the model's own names.

    `id` is one of `new_speak_id`.
    `client` is the key of fairness: requests of one client wait for each other, not other clients for them.
    `limits` are those of all requests of the client together.
    `deadline_s`: the request fails (`deadline_exceeded`) if its audio has not begun so many seconds after its arrival.
    `voice` is a preset voice, "" if the task takes none, or with `saved_voice` the id of a saved voice.
    The payload, if there is one, is the reference recording to clone; `reference_text` is its transcript.
    `keep_alive_s`: the model stays resident for so long after this request; negative: for ever; None: as configured.
    `timestamps`: tell the times of the words, which only models with ModelSpec.timestamps know.
    `open`: the last segment goes on with Append, until EndText. There may be no segment yet.
    `credit` is the number of Audio messages that may be sent before the first Credit.
    `traceparent`: the spans of the GPU worker are children of this one.
    """

    id: Name
    client: Name
    model: Name
    task: Task
    segments: list[Segment]
    credit: int
    voice: Name = ""
    saved_voice: bool = False
    language: Name = "auto"
    instructions: Instructions = ""
    reference_text: Transcript | None = None
    x_vector_only: bool = False
    sampling: Sampling = Sampling()
    non_streaming_mode: bool | None = None
    timestamps: bool = False
    keep_alive_s: float | None = None
    limits: KeyLimits = KeyLimits()
    priority: Priority = "interactive"
    deadline_s: float | None = None
    open: bool = False
    access: VoiceAccess = VoiceAccess()
    traceparent: TraceParent = ""


class Append(Message, frozen=True, kw_only=True):
    """More text of an open Speak, as the next part of its last segment.

    `flush`: the segment ends behind this text. It is spoken to its end; text that follows begins another one.
    It has no answer. A request that is over ignores it.
    """

    id: Name
    text: SpokenText
    flush: bool = False


class EndText(Message, frozen=True, kw_only=True):
    """The text of an open Speak is complete. It has no answer. A request that is over ignores it."""

    id: str


class Credit(Message, frozen=True, kw_only=True):
    """Allow `chunks` more Audio messages, because the web worker has passed on as many."""

    id: str
    chunks: int


class Cancel(Message, frozen=True, kw_only=True):
    """End a Speak or a Call, because its client is gone, or because its response failed by `error`.

    Idempotent; it has no answer. After Finished it tells that the client has not received the whole response.
    """

    id: str
    error: SpeechError | None = None


class Spoken(Message, frozen=True, kw_only=True):
    """A request that the web worker has answered by itself; it has no answer."""

    outcome: "SpeechOutcome"


class Ping(Message, frozen=True, kw_only=True):
    """Ask for a Pong. The synthesis loop answers, not the socket's thread, so a Pong proves that the loop is alive.

    `caches`: how often the web worker has found something in its own caches since it started, and how often not.
    `open_sockets` is the number of its WebSockets. `limit_hits`: the requests that it has refused since its last Ping.
    """

    caches: dict[CacheName, CacheCounts] = {}
    open_sockets: Annotated[int, Meta(ge=0, le=2**31)] = 0
    limit_hits: dict[LimitName, Annotated[int, Meta(ge=0, le=2**31)]] = {}


class UsedElsewhere(Message, frozen=True, kw_only=True):
    """The use of clients with limits at all other GPU workers of a cluster. It has no answer.

    `minute_s` of a KeyUse never falls in the messages with one `source`. From then on, snapshots have `key_use`.
    """

    source: str
    clients: dict[str, KeyUse]


class Call(Message, frozen=True, kw_only=True):
    """Do an action that is not speech; the answer is Reply or Failed. Saved voices belong to `access.owner`."""

    id: str
    client: str
    action: Action
    access: VoiceAccess = VoiceAccess()


class Welcome(Message, frozen=True, kw_only=True):
    """The answer to Hello: the worker's identity, catalogue and first snapshot.

    `settings` are the settings that the worker alone uses, by their public names, without secrets.
    """

    version: int
    boot_id: str
    catalog: list[ModelSpec]
    snapshot: Snapshot
    settings: dict[str, Any] = {}


class Started(Message, frozen=True, kw_only=True):
    """The request has a slot. `sample_rate` is in Hz. `rate_limit` is that of its key, if that has one."""

    id: str
    model: str
    sample_rate: int
    rate_limit: RateLimit | None = None


class Audio(Message, frozen=True, kw_only=True):
    """The payload is the next PCM of the speech; `seq` counts from 0, and a gap is an error.

    `rate` is that of its segment. None marks the silence of a pause, whose length no speed changes.
    `words` are those whose times became known since the last message, in order; they may lie ahead of this PCM,
    as the synthesizer knows them, or behind it, as an aligner does.
    """

    id: str
    seq: int
    rate: float | None = 1.0
    words: list[Word] = []


class Finished(Message, frozen=True, kw_only=True):
    """The speech is complete."""

    id: str
    reason: FinishReason
    usage: Usage
    timings: Timings


class Failed(Message, frozen=True, kw_only=True):
    """A Speak or a Call failed. `code` is an error code of the HTTP contract, `param` the wrong request field.

    With an empty `id` it refuses a Hello. `rate_limit` is that of the key of a refused Speak, if that has one.
    """

    id: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    rate_limit: RateLimit | None = None


class Reply(Message, frozen=True, kw_only=True):
    """A Call succeeded; its action decides which field is set. `settings` are as in Welcome, after a Reload."""

    id: str
    voice: SavedVoice | None = None
    model: ModelStatus | None = None
    cleanup: CleanupPass | None = None
    speech: SpeechOutcome | None = None
    consent: VoiceConsent | None = None
    consents: list[VoiceConsent] = []
    has_more: bool = False
    exported: PortableVoice | None = None
    usage: list[UsageRow] = []
    usage_source: str = ""
    """The file of `usage`: GPU workers with one file have one source."""
    settings: dict[str, Any] = {}


class Pong(Message, frozen=True, kw_only=True):
    """The synthesis loop is alive; `snapshot` is its state."""

    boot_id: str
    snapshot: Snapshot


class Probe(Message, frozen=True, kw_only=True):
    """Nothing: that it cannot be sent shows that the web worker is gone. It has no answer."""


FromWeb = Hello | Speak | Append | EndText | Credit | Cancel | Spoken | Call | Ping | UsedElsewhere
FromWorker = Welcome | Started | Audio | Finished | Failed | Reply | Pong | Probe
