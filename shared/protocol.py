"""The conversation between a web worker and the GPU worker: tagged Structs, version, encode and decode.

A message is one header frame (a msgpack-encoded tagged Struct) and, where the message carries sound, one payload frame
of raw PCM (24 kHz mono int16 little-endian). Nothing else crosses the socket, and nothing here is ever pickled.

    web worker -> GPU worker: Hello, Speak (+PCM of a reference), Credit, Cancel, Call (+PCM of a recording), Ping
    GPU worker -> web worker: Welcome, Started, Audio (+PCM), Finished, Failed, Reply, Pong

The worker answers a Speak with Started, Audio …, and then exactly one Finished or Failed;
it sends at most as many Audio messages as it holds credit for.
"""

from typing import Any, Final, Literal

import msgspec

from shared.catalog import ModelSpec

VERSION: Final = 1
"""Both sides say theirs in Hello and Welcome; they talk only when it is the same."""

Task = Literal["CustomVoice", "VoiceDesign", "Base"]
State = Literal["absent", "loading", "resident", "offloaded", "unavailable"]


class ProtocolError(Exception):
    """A message that is not of this conversation."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """The parent of every message; the class's name is its tag on the wire."""


# --- what both sides say about a request -----------------------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request; None means the model's own default.

    `temperature` 0 is greedy at both levels (talker and code predictor).
    `max_new_tokens` caps the frames (80 ms each) of the whole request.
    """

    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the text that went in and codec tokens (frames of 80 ms) that came out."""

    input_tokens: int
    output_tokens: int


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went, in seconds since it reached the worker.

    `queue_s` is the wait before admission, of which `load_s` passed while the model was brought to the device.
    """

    queue_s: float
    load_s: float
    first_audio_s: float
    total_s: float


# --- from the web worker ---------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """The first word on every new connection."""

    version: int
    token: str


class Speak(Message, frozen=True, kw_only=True):
    """Speak `text`; names are already resolved to what the model itself uses.

    `client` is the key of fairness: requests of one client queue behind each other, not in front of others.
    `voice` is a preset voice, "" where the task takes none, or with `saved_voice` the id of a saved one.
    The payload, if any, is the reference recording to clone; `reference_text` is its transcript.
    `keep_alive_s`: how long the model stays resident after this request; negative: for ever; None: as configured.
    `credit` is how many Audio messages may be sent before the first Credit.
    """

    id: str
    client: str
    model: str
    task: Task
    text: str
    credit: int
    voice: str = ""
    saved_voice: bool = False
    language: str = "auto"
    instructions: str = ""
    reference_text: str | None = None
    x_vector_only: bool = False
    sampling: Sampling = Sampling()
    non_streaming_mode: bool | None = None
    keep_alive_s: float | None = None


class Credit(Message, frozen=True, kw_only=True):
    """The web worker has passed on `chunks` Audio messages and can take as many more."""

    id: str
    chunks: int


class Cancel(Message, frozen=True, kw_only=True):
    """Nobody listens to this request any more, or waits for this call; idempotent, never answered."""

    id: str


class Ping(Message, frozen=True, kw_only=True):
    """Is the synthesis loop alive? Answered by that loop, not by the socket's thread."""


class LoadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bring a model to the device."""

    model: str


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drop a model from the device and from host RAM; refused (`model_busy`) while it has requests."""

    model: str


class PinModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Keep a model from being evicted, or let it go again."""

    model: str
    pinned: bool


class Cleanup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run an eviction pass now."""


class FindVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Look a saved voice up by id or name, case aside."""

    name: str


class CloneVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Save the payload as a voice: in context with `text` (its transcript), as a speaker embedding without."""

    name: str
    text: str | None = None
    description: str = ""
    consent: str = ""


class DesignVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Let the voice-design model speak as `prompt` describes, and save that as a voice."""

    name: str
    prompt: str
    description: str = ""


class DeleteVoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget a saved voice, by id."""

    id: str


Action = LoadModel | UnloadModel | PinModel | Cleanup | FindVoice | CloneVoice | DesignVoice | DeleteVoice


class Call(Message, frozen=True, kw_only=True):
    """Do something other than speak; answered by Reply or Failed."""

    id: str
    client: str
    action: Action


# --- from the GPU worker ---------------------------------------------------------------------------------------------


class SavedVoice(msgspec.Struct, frozen=True, kw_only=True):
    """A voice kept on the worker's disk; `created_at` in Unix seconds.

    `in_context`: its transcript is known, so it is cloned in context rather than from a speaker embedding alone.
    """

    id: str
    name: str
    created_at: int
    kind: Literal["clone", "design"]
    description: str = ""
    seconds: float
    in_context: bool


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Where one model is, and what it holds there (bytes by purpose, as measured).

    `detail` says why a model is unavailable, or how far its loading or download has come.
    `keep_alive_s` negative: never evicted for idleness; None: as configured.
    """

    id: str
    state: State
    bytes: dict[str, int] = {}
    host_bytes: int = 0
    last_used: float | None = None
    idle_s: float | None = None
    references: int = 0
    pinned: bool = False
    keep_alive_s: float | None = None
    detail: str = ""


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The device's memory in bytes, as its driver tells it; on a CPU, the RAM and this process's part of it."""

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    used_bytes: int
    free_bytes: int
    ours_bytes: int
    others_bytes: int
    budget_bytes: int


class HostMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Host RAM in bytes: the machine's, this process's, and what offloaded models hold of it."""

    total_bytes: int
    free_bytes: int
    ours_bytes: int
    offloaded_bytes: int
    budget_bytes: int


class CleanupPass(msgspec.Struct, frozen=True, kw_only=True):
    """What one eviction pass did; `timestamp` in Unix seconds, bytes as measured around it.

    `models_dropped` are those of the unloaded that left host RAM too.
    """

    timestamp: float
    vram_before_bytes: int
    vram_after_bytes: int
    models_checked: list[str]
    models_unloaded: list[str]
    models_dropped: list[str] = []


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """Requests since the worker started."""

    started: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0


FIRST_AUDIO_BOUNDS_S: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
REAL_TIME_FACTOR_BOUNDS: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 0.9, 1.0, 1.5, 2.0, 5.0)
UNDERRUN_BOUNDS_S: Final = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The first bound holds the streams that never ran dry; all above it are underruns."""

MOVE_BOUNDS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How many values were at most each bound and above the one before, at last those above all; and their sum.

    Which bounds these are, both sides know. Without a value there are no counts at all.
    """

    counts: list[int] = []
    sum: float = 0.0


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model has done since the worker started.

    `first_audio_s`: from a request's arrival to its first piece. `real_time_factor`: seconds of synthesis for a second
    of audio, without the time that its reader held it up. `underrun_s`: how long a player that begins with the first
    piece would have had nothing to play. All three count streams.
    `moves_s` and `failed_moves` are by the kind of move: load, restore, offload or drop.
    """

    first_audio_s: Histogram = Histogram()
    real_time_factor: Histogram = Histogram()
    underrun_s: Histogram = Histogram()
    moves_s: dict[str, Histogram] = {}
    failed_moves: dict[str, int] = {}
    out_of_memory: int = 0


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """One request, never what it says. `age_s` since it arrived, `audio_s` the sound made so far.

    waiting: for a slot or its model. stalled: its reader takes nothing.
    `client` is the beginning of the key of fairness.
    """

    id: str
    model: str
    client: str
    state: Literal["waiting", "speaking", "stalled"]
    age_s: float
    audio_s: float


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that dashboards read, as the synthesis loop saw it when it answered a ping.

    It is sent several times a second: `figures` name the models that did something, `streams` the oldest few.
    `restarts` is how often this worker's supervisor has started another one before it.
    """

    pid: int
    boot_id: str
    uptime_s: float
    accepting: bool
    default_model: str
    running: int
    queued: int
    slots: int
    requests: Counters
    models: list[ModelStatus]
    device: DeviceMemory
    host: HostMemory
    shared_bytes: dict[str, int]
    voices: list[SavedVoice]
    cleanup: CleanupPass | None = None
    preloading: list[str] = []
    """Models that the worker was told to load at its start and that have not arrived yet."""

    restarts: int = 0
    figures: dict[str, ModelFigures] = {}
    streams: list[StreamState] = []


class Welcome(Message, frozen=True, kw_only=True):
    """The answer to Hello: who the worker is and what it can speak with.

    `settings` are those in force that only the worker acts by, under their public names, without secrets.
    """

    version: int
    boot_id: str
    catalog: list[ModelSpec]
    snapshot: Snapshot
    settings: dict[str, Any] = {}


class Started(Message, frozen=True, kw_only=True):
    """The request holds a slot and will be heard; `sample_rate` in Hz."""

    id: str
    model: str
    sample_rate: int


class Audio(Message, frozen=True, kw_only=True):
    """The payload is the next piece of speech; `seq` counts from 0, and a gap is an error."""

    id: str
    seq: int


class Finished(Message, frozen=True, kw_only=True):
    """Everything has been said."""

    id: str
    reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings


class Failed(Message, frozen=True, kw_only=True):
    """A Speak or a Call did not work; `code` is one of the HTTP contract's, `param` the request field at fault.

    A Failed with an empty `id` answers a Hello that was refused.
    """

    id: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class Reply(Message, frozen=True, kw_only=True):
    """A Call worked; which field is set depends on its action."""

    id: str
    voice: SavedVoice | None = None
    model: ModelStatus | None = None
    cleanup: CleanupPass | None = None


class Pong(Message, frozen=True, kw_only=True):
    """The synthesis loop is alive, and this is what it saw."""

    boot_id: str
    snapshot: Snapshot


FromWeb = Hello | Speak | Credit | Cancel | Call | Ping
FromWorker = Welcome | Started | Audio | Finished | Failed | Reply | Pong

_encoder = msgspec.msgpack.Encoder()
_from_web: msgspec.msgpack.Decoder[FromWeb] = msgspec.msgpack.Decoder(FromWeb)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: Message, payload: bytes | None = None) -> list[bytes]:
    """The frames of `message`, ready for send_multipart."""
    header = _encoder.encode(message)
    return [header] if payload is None else [header, payload]


def decode_from_web(frames: list[bytes]) -> tuple[FromWeb, bytes | None]:
    """What a web worker said, and its payload; ProtocolError where that is not of this conversation."""
    return _decode(_from_web, frames)


def decode_from_worker(frames: list[bytes]) -> tuple[FromWorker, bytes | None]:
    """What the GPU worker said, and its payload; ProtocolError where that is not of this conversation."""
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
