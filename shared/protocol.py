"""The protocol between the web workers and the GPU worker: its messages as tagged Structs, encode and decode.

A message is one header frame (a tagged Struct in msgpack) and, if it has sound, one payload frame of raw PCM
(24 kHz mono int16 little-endian). Nothing else crosses the socket, and nothing is ever pickled.

    web worker -> GPU worker: Hello, Speak (+PCM of a reference), Append, EndText, Credit, Cancel, Spoken,
                              Call (+PCM of a recording), Ping, UsedElsewhere
    GPU worker -> web worker: Welcome, Started, Audio (+PCM), Finished, Failed, Reply, Pong, Probe

The worker answers a Speak with Started, Audio …, and then exactly one Finished or Failed;
it never sends more Audio messages than it has credit for.
The text of an open Speak goes on with Append, until EndText.
"""

import uuid
from datetime import date
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from shared.catalog import ModelSpec
from shared.pcm import bytes_for
from shared.recordings import MAX_RECORDING_S

VERSION: Final = 15
"""Hello and Welcome have it; the two sides talk only if their versions are equal."""

STARTING: Final = b"s"
READY: Final = b"r"
"""What a GPU worker writes into its supervisor's pipe, a byte a second: its loop runs; and its models are preloaded."""

MAX_PORTABLE_PCM: Final = bytes_for(MAX_RECORDING_S)
"""Bytes of the longest recording that a voice is cloned from."""

Task = Literal["CustomVoice", "VoiceDesign", "Base"]
PublicState = Literal["absent", "loading", "resident", "offloaded", "unavailable"]
"""The state of a model as clients see it; the GPU worker itself tells more states apart."""


FinishReason = Literal["stop", "length", "empty"]
"""`stop`: the model ended the speech. `length`: a limit cut it. `empty`: nothing was speakable."""


class ProtocolError(Exception):
    """The frames are not a message of this protocol."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """The base of all messages; the name of the class is the tag on the wire."""


# --- parts of messages -----------------------------------------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The sampling parameters of one request; None means the model's default.

    `temperature` 0 is greedy at both levels (talker and code predictor).
    `max_new_tokens` caps the frames (80 ms each) of the whole request.
    """

    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


Priority = Literal["interactive", "batch"]
"""`batch`: no listener waits for the speech, so other requests come first, in the queue and for a slot."""


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The limits of the API key of a request; None: no such limit. The GPU worker counts, over all web workers."""

    requests_per_minute: int | None = None
    characters_per_day: int | None = None
    concurrent_requests: int | None = None


LimitName = Literal["requests_per_minute", "characters_per_day", "concurrent_requests", "queue"]
"""A limit that a request can be refused by: the three of its key, and the places of the queue."""


class VoiceAccess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which saved voices and consents a client may use beside those of all: those of the key `owner`, or `all`.

    `owner` is the key's name in the file of keys; "" for a client that can own no voice: all that it makes is shared.
    """

    owner: str = ""
    all: bool = False


SHARED_VOICES: Final = VoiceAccess()
"""The access of a client that can own no voice."""

ALL_VOICES: Final = VoiceAccess(all=True)
"""The access of an admin without a name, and of every client where no key protects the service."""


class RateLimit(msgspec.Struct, frozen=True, kw_only=True):
    """What a key has left of its requests a minute: `remaining` now, all `limit` of them after `reset_s` seconds."""

    limit: int
    remaining: int
    reset_s: float


TraceParent = Annotated[str, Meta(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$")]
"""The context of W3C's header `traceparent`: version, trace, span, flags; "" without a trace that is kept.

Its companion `tracestate` is dropped: it is kilobytes of whatever a client likes.
"""


class KeyUse(msgspec.Struct, frozen=True, array_like=True):
    """What a client with limits has used: at one GPU worker since that started, or at several together.

    `minute_s` counts 60 s divided by its requests a minute for each request. `characters` are those of `day`, a day
    by date.toordinal, UTC; `running` are its requests now.
    """

    minute_s: float = 0.0
    day: int = 0
    characters: int = 0
    running: int = 0


class WorkerUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients with limits have used at one GPU worker. Workers with one usage file have one `usage_source`."""

    usage_source: str
    clients: dict[str, KeyUse]


class Segment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a text, and the silence behind it.

    `text` is "" only if a pause comes before the first word.
    `pause_ms` is silence on top of the gap that an engine makes between sentences.
    `rate`: how many times as fast as the rest to speak. Engines speak at rate 1 and pass the number on, see Audio.
    """

    text: str
    pause_ms: int = 0
    rate: float = 1.0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of the input text and the codec tokens (frames of 80 ms) of the speech."""

    input_tokens: int
    output_tokens: int


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one request, in seconds since it reached the worker.

    `queue_s` is the wait before admission; `load_s` is the part of it in which the model was loaded or restored.
    """

    queue_s: float
    load_s: float
    first_audio_s: float
    total_s: float


class Word(msgspec.Struct, frozen=True, array_like=True):
    """text[start:end] of a segment, which is said from `start_s` to `end_s` of the request's PCM, pauses included."""

    segment: int
    start: int
    end: int
    start_s: float
    end_s: float


CacheName = Literal["references", "prompts", "tokens", "recordings", "catalog", "pronunciations", "stored_audio"]
"""Of engines: encoded recordings, constant parts of prompts, tokens of texts. Of the GPU worker: recordings of saved
voices. Of web workers: the models' catalogue, the service's pronunciations, finished audio on disk.
"""


class CacheCounts(msgspec.Struct, frozen=True, array_like=True):
    """How often a cache had what was asked of it, and how often not."""

    hits: int = 0
    misses: int = 0


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """A cache now, and how often it had what was asked of it. `bytes` is None where they cannot be measured.

    `model` is "" for a cache that belongs to no engine. An engine counts from its load on.
    """

    name: CacheName
    model: str = ""
    entries: int
    bytes: int | None
    hits: int
    misses: int


class SpeechError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request failed: `code` is an error code of the HTTP contract, `param` the wrong request field."""

    code: str
    message: str
    param: str | None = None


# --- from the web worker ---------------------------------------------------------------------------------------------


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

    id: str
    client: str
    model: str
    task: Task
    segments: list[Segment]
    credit: int
    voice: str = ""
    saved_voice: bool = False
    language: str = "auto"
    instructions: str = ""
    reference_text: str | None = None
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

    id: str
    text: str
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
    `open_sockets` is the number of its WebSockets.
    """

    caches: dict[CacheName, CacheCounts] = {}
    open_sockets: int = 0


class UsedElsewhere(Message, frozen=True, kw_only=True):
    """What clients with limits have used at all other GPU workers of a cluster; it has no answer.

    `minute_s` of a KeyUse never falls in the messages with one `source`. From then on, snapshots have `key_use`.
    """

    source: str
    clients: dict[str, KeyUse]


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

    name: Annotated[str, Meta(max_length=200)]
    language: Annotated[str, Meta(max_length=200)]
    created_at: Annotated[int, Meta(ge=0)]
    pcm: Annotated[bytes, Meta(max_length=MAX_PORTABLE_PCM)]


class PortableVoice(msgspec.Struct, frozen=True, kw_only=True):
    """A saved voice with its recording and the consent of its speaker, as it goes from one server to another.

    `pcm` is 24 kHz mono int16 little-endian, `text` its transcript. It is no payload: there may be two recordings.
    """

    name: Annotated[str, Meta(max_length=200)]
    kind: Literal["clone", "design"]
    text: Annotated[str, Meta(max_length=4096)] | None = None
    prompt: Annotated[str, Meta(max_length=4096)] = ""
    description: Annotated[str, Meta(max_length=4096)] = ""
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


class Call(Message, frozen=True, kw_only=True):
    """Do an action that is not speech; the answer is Reply or Failed. What it saves belongs to `access.owner`."""

    id: str
    client: str
    action: Action
    access: VoiceAccess = VoiceAccess()


# --- from the GPU worker ---------------------------------------------------------------------------------------------


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
    """What one key used of one model on one day, UTC. `key` is its name or digest, "" for all clients without one.

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
    """How a Speak ended, or how far it is; only one that is done has `finish_reason` and `usage`.

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


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The device's memory by its driver, in bytes; on a CPU, the RAM and the part of it that this process uses."""

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    used_bytes: int
    free_bytes: int
    ours_bytes: int
    others_bytes: int
    budget_bytes: int


class HostMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Host RAM in bytes: of the machine, of this process, and of offloaded models."""

    total_bytes: int
    free_bytes: int
    ours_bytes: int
    offloaded_bytes: int
    budget_bytes: int


class BufferMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Host RAM in bytes of audio that waits for its readers and of parked requests, and its budget."""

    used_bytes: int
    budget_bytes: int


class CleanupPass(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one pass over idle models. `timestamp` is in Unix seconds; bytes were measured before and after.

    `models_dropped` are those of `models_unloaded` that left host RAM too.
    """

    timestamp: float
    vram_before_bytes: int
    vram_after_bytes: int
    models_checked: list[str]
    models_unloaded: list[str]
    models_dropped: list[str] = []


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """The number of requests since the worker started."""

    started: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0


FIRST_AUDIO_BOUNDS_S: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
REAL_TIME_FACTOR_BOUNDS: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 0.9, 1.0, 1.5, 2.0, 5.0)
UNDERRUN_BOUNDS_S: Final = (0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The first bucket counts streams without an underrun."""

PLAYER_BUFFERS_S: Final = (0.0, 0.1, 0.3, 1.0)
"""How long after the first audio players start whose underruns are counted; each is one of UNDERRUN_BOUNDS_S."""

BATCH_SIZE_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
PERFORMANCE_MINUTES: Final = (1, 15, 60)
"""The windows of the figures of performance."""

TRANSITION_BOUNDS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Exemplar(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The latest request in a bucket of a histogram; its log lines and its outcome have the same speech id.

    `at` is in Unix seconds. `trace_id` is "" if no trace of the request is kept.
    """

    value: float
    at: float
    speech_id: str
    trace_id: str = ""


class Histogram(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The number of values in each bucket and their sum; empty without values.

    The upper bounds of the buckets are the constants above; the last bucket has the values above all bounds.
    `exemplars` are by bucket.
    """

    counts: list[int] = []
    sum: float = 0.0
    exemplars: dict[int, Exemplar] = {}


class ModelStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The statistics of one model since the worker started.

    The first four count streams. `first_audio_s`: from the arrival of a request to its first audio.
    `queue_wait_s`: from its arrival to its slot.
    `real_time_factor`: seconds of synthesis for each second of audio, without the time that the request was parked.
    `underrun_s`: the time in which a player that starts with the first audio would have had nothing to play.
    `audio_s`: seconds of audio made. `batch_size`: the number of jobs that shared a frame, for each frame.
    `captured_steps`: decode steps that replayed a captured function; `eager_steps` called Python for each operator.
    `transitions_s` and `failed_transitions` are by kind: load, restore, offload or drop.
    """

    first_audio_s: Histogram = Histogram()
    queue_wait_s: Histogram = Histogram()
    real_time_factor: Histogram = Histogram()
    underrun_s: Histogram = Histogram()
    audio_s: float = 0.0
    batch_size: Histogram = Histogram()
    captured_steps: int = 0
    eager_steps: int = 0
    transitions_s: dict[str, Histogram] = {}
    failed_transitions: dict[str, int] = {}
    out_of_memory: int = 0


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of `count` values; None without values."""

    count: int = 0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class WindowCounts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What WindowPerformance is computed from: histograms by bucket of shared.performance, sizes of batches by size.

    `underruns` are by PLAYER_BUFFERS_S.
    """

    minutes: int
    first_audio: dict[int, int] = {}
    real_time_factor: dict[int, int] = {}
    queue_wait: dict[int, int] = {}
    batch_size: dict[int, int] = {}
    streams: int = 0
    underruns: list[int]


class WindowPerformance(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one model over the last `minutes`; `first_audio_s` to `batch_size` are as in ModelStats.

    `underruns`: of the complete `streams`, those in which a player ran out of audio, by the milliseconds of its buffer.
    """

    minutes: int
    first_audio_s: Distribution
    real_time_factor: Distribution
    queue_wait_s: Distribution
    batch_size: Distribution
    streams: int
    underruns: dict[str, int]


ShownState = Literal["waiting", "generating", "buffered", "stalled"]
"""waiting: for its first slot, or its model. generating: it has a slot.
buffered: it has none, because its speech is complete or enough for now.
stalled: its reader has taken nothing for 10 s, with a slot or without.
"""


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """One request, without its text. `client` is the beginning of the key of fairness.

    `age_s` is the time since its arrival, `audio_s` the audio made so far, `buffered_s` the part that is not sent yet.
    """

    id: str
    model: str
    client: str
    state: ShownState
    age_s: float
    audio_s: float
    buffered_s: float = 0.0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's state when it answered a ping: all that health, metrics and dashboards read.

    `running` requests hold a slot, `slots` is how many can. `queued` ones wait for their first slot.
    `buffered` ones hold none: their audio is complete or enough for now, and waits for its readers.
    `stalled`, of those with a slot and those without: the reader has taken nothing for 10 s.
    `waiting_for_text`, of both kinds: open ones that can go on only with more text.
    `open_sockets` are the WebSockets of all web workers.
    It is sent several times a second, so `model_stats` has active models alone and `streams` the oldest few.
    `restarts` is the number of workers that the supervisor started before this one.
    """

    pid: int
    boot_id: str
    uptime_s: float
    accepting: bool
    default_model: str
    running: int
    queued: int
    slots: int
    buffered: int
    stalled: int
    audio_buffer: BufferMemory
    requests: Counters
    models: list[ModelStatus]
    device: DeviceMemory
    host: HostMemory
    shared_bytes: dict[str, int]
    voices: list[SavedVoice]
    cleanup: CleanupPass | None = None
    preloading: list[str] = []
    """Models of TTS_PRELOAD, and the default one, that are not loaded yet."""

    restarts: int = 0
    model_stats: dict[str, ModelStats] = {}
    streams: list[StreamState] = []
    waiting_for_text: int = 0
    open_sockets: int = 0
    performance: dict[str, list[WindowPerformance]] = {}
    """By model, of those that did something in the last hour; a window each for PERFORMANCE_MINUTES."""

    caches: list[CacheStats] = []
    """Those of the engines and of the GPU worker."""

    web_caches: dict[CacheName, CacheCounts] = {}
    """The sums of what the web workers have counted."""

    limit_hits: dict[LimitName, int] = {}
    """How often a request was over a limit."""

    emptied: dict[CacheName, int] = {}
    """How often a cache of the web workers was to be emptied."""

    key_use: WorkerUse | None = None
    performance_counts: dict[str, list[WindowCounts]] = {}
    """Of a GPU worker in a cluster: what its keys have used, and what `performance` was computed from."""


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


def new_speak_id(request_id: str) -> str:
    """A new id for a Speak: the client's request id, which a client may use twice, a dot, and the speech id.

    The speech id is unguessable. The logs of both sides show the whole, so that either part finds the request there.
    """
    return f"{request_id}.{uuid.uuid4().hex}"


def speech_id_of(speak_id: str) -> str:
    """The speech id in the id of a Speak."""
    return speak_id.rpartition(".")[2]


def request_id_in(speak_id: str) -> str:
    """The client's request id in the id of a Speak."""
    return speak_id.rpartition(".")[0]


def is_known_as(speak_id: str, name: str) -> bool:
    """True if `name` is the request id or the speech id in `speak_id`."""
    request_id, _, speech_id = speak_id.rpartition(".")
    return name in (request_id, speech_id)


_encoder = msgspec.msgpack.Encoder()
_from_web: msgspec.msgpack.Decoder[FromWeb] = msgspec.msgpack.Decoder(FromWeb)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: Message, payload: bytes | None = None) -> list[bytes]:
    """The frames of `message` for send_multipart."""
    header = _encoder.encode(message)
    return [header] if payload is None else [header, payload]


def decode_from_web(frames: list[bytes]) -> tuple[FromWeb, bytes | None]:
    """The message of a web worker, and its payload; ProtocolError if it is none."""
    return _decode(_from_web, frames)


def decode_from_worker(frames: list[bytes]) -> tuple[FromWorker, bytes | None]:
    """The message of the GPU worker, and its payload; ProtocolError if it is none."""
    return _decode(_from_worker, frames)


def _decode(decoder: Any, frames: list[bytes]) -> tuple[Any, bytes | None]:
    match frames:
        case [header]:
            payload = None
        case [header, payload]:
            pass
        case _:
            raise ProtocolError(f"a message has one or two frames, not {len(frames)}")
    try:
        return decoder.decode(header), payload
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of version {VERSION}: {error}") from error
