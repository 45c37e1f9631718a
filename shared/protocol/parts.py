"""The parts of messages: the terms of a request, of its limits, its voice and its outcome, and of caches."""

from datetime import date
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from shared.text import MAX_INPUT_CHARS, MAX_RESPELLED

Task = Literal["CustomVoice", "VoiceDesign", "Base"]
PublicState = Literal["absent", "loading", "resident", "offloaded", "unavailable"]
"""The state of a model as clients see it; the GPU worker itself tells more states apart."""

FinishReason = Literal["stop", "length", "empty"]
"""`stop`: the model ended the speech. `length`: a limit cut it. `empty`: nothing was speakable."""

MAX_NAME: Final = 200
Name = Annotated[str, Meta(max_length=MAX_NAME)]
"""A name or an id: of a request, a client, a model, a voice, a language, a consent."""

MAX_INSTRUCTIONS: Final = 4096
Instructions = Annotated[str, Meta(max_length=MAX_INSTRUCTIONS)]
"""How to speak, or the description of a voice."""

MAX_TRANSCRIPT: Final = 4096
Transcript = Annotated[str, Meta(max_length=MAX_TRANSCRIPT)]
"""What is said in a recording."""

SpokenText = Annotated[str, Meta(max_length=MAX_RESPELLED * MAX_INPUT_CHARS)]

Temperature = Annotated[float, Meta(ge=0, le=2)]
TopK = Annotated[int, Meta(ge=0, le=4096)]
TopP = Annotated[float, Meta(gt=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(ge=0.5, le=2)]
MaxNewTokens = Annotated[int, Meta(ge=1, le=8192)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The sampling parameters of one request; None means the model's default.

    Numbers beyond these bounds would fail a step of all jobs, and with it a GPU's context.
    `temperature` 0 is greedy at both levels (talker and code predictor).
    `max_new_tokens` caps the frames (80 ms each) of the whole request.
    """

    seed: int | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    max_new_tokens: MaxNewTokens | None = None


Priority = Literal["interactive", "batch"]
"""`batch`: no listener waits for the speech, so other requests come first, in the queue and for a slot."""


MAX_COUNT: Final = 2**53
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
"""What a side has counted. A number on the wire has 64 bits, and the GPU worker adds these up."""

KeyLimit = Annotated[int, Meta(ge=1, le=1_000_000_000)]


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The limits of the API key of a request; None: no such limit. The GPU worker counts, over all web workers."""

    requests_per_minute: KeyLimit | None = None
    characters_per_day: KeyLimit | None = None
    concurrent_requests: KeyLimit | None = None


LimitName = Literal[
    "requests_per_minute",
    "characters_per_day",
    "concurrent_requests",
    "queue",
    "requests_of_address",
    "body_memory",
    "recordings",
    "texts_of_socket",
    "dashboards",
]
"""A limit that a request can be refused by: the three of its key and the places of the queue, in the GPU worker;
those of its address, of the memory for bodies, of the recordings that are being decoded, of the texts that wait in one
WebSocket and of the readers of /admin/events, in a web worker.
"""


class VoiceAccess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The saved voices and consents that a client may use beside those of all: those of the key `owner`, or `all`.

    `owner` is the key's name in the file of keys; "" for a client that can own no voice: all that it makes is shared.
    """

    owner: str = ""
    all: bool = False


SHARED_VOICES: Final = VoiceAccess()
"""The access of a client that can own no voice."""

ALL_VOICES: Final = VoiceAccess(all=True)
"""The access of an admin without a name, and of every client where no key protects the service."""


class RateLimit(msgspec.Struct, frozen=True, kw_only=True):
    """The requests a minute of a key: `remaining` are left now, all `limit` of them after `reset_s` seconds."""

    limit: int
    remaining: int
    reset_s: float


TraceParent = Annotated[str, Meta(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$")]
"""The context of W3C's header `traceparent`: version, trace, span, flags; "" without a trace that is kept.

Its companion `tracestate` is dropped: it is kilobytes of whatever a client likes.
"""


class KeyUse(msgspec.Struct, frozen=True, array_like=True):
    """The use of a client with limits, at one GPU worker since that started, or at several together.

    `minute_s` counts 60 s divided by its requests a minute for each request. `characters` are those of `day`, a day
    by date.toordinal, UTC; `running` are its requests now.
    """

    minute_s: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    day: Annotated[int, Meta(ge=0, le=date.max.toordinal())] = 0
    characters: Count = 0
    running: Count = 0


class WorkerUse(msgspec.Struct, frozen=True, kw_only=True):
    """The use of all clients with limits at one GPU worker. Workers with one usage file have one `usage_source`."""

    usage_source: str
    clients: dict[str, KeyUse]


MAX_PAUSES_MS: Final = 600_000
"""All pauses of one text together."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a text, and the silence behind it.

    `text` is "" only if a pause comes before the first word.
    `pause_ms` is silence on top of the gap that an engine makes between sentences.
    `rate`: how many times as fast as the rest to speak. Engines speak at rate 1 and pass the number on, see Audio.
    """

    text: SpokenText
    pause_ms: Annotated[int, Meta(ge=0, le=MAX_PAUSES_MS)] = 0
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


CacheName = Literal[
    "references", "prompts", "prefixes", "tokens", "recordings", "catalog", "pronunciations", "stored_audio"
]
"""Of engines: encoded recordings, constant parts of prompts, their keys and values, tokens of texts. Of the GPU worker:
recordings of saved voices. Of web workers: the models' catalogue, the service's pronunciations, finished audio on disk.
"""


class CacheCounts(msgspec.Struct, frozen=True, array_like=True):
    """How often a cache had what was asked of it, and how often not."""

    hits: Count = 0
    misses: Count = 0


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
