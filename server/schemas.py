"""The bodies of requests and responses: Structs with the limits of their fields. The OpenAPI is made from them.

Bodies that belong to one route alone (/admin, the form for a new voice) are in that route's file.
resolution.py owns the rules between fields.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from server.audio import MAX_SPEED, MIN_SPEED, Format
from server.http.leniency import TRIMMED, absent
from server.text import InputFormat, Respelling, Word
from shared.protocol import (
    MAX_NAME,
    FinishReason,
    Instructions,
    MaxNewTokens,
    PublicState,
    RepetitionPenalty,
    Task,
    Temperature,
    TopK,
    TopP,
    Transcript,
    Usage,
)

MAX_PRONUNCIATIONS: Final = 200
MAX_KEEP_ALIVE_S: Final = 31_536_000
"""A year; -1 means longer than that: for ever."""

ALIASES: Final = {"speaker": "voice", "instruct": "instructions", "text": "input"}
"""Other speech servers' names of fields -> ours."""

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME, extra=TRIMMED)]


class VoiceRef(msgspec.Struct, frozen=True, kw_only=True):
    """A voice by its id, as OpenAI writes custom voices."""

    id: Name


def _describe(description: str, **limits: Any) -> Meta:
    return Meta(description=description, **limits)


class SpeechRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A text, and how to speak it. `text`, `speaker` and `instruct` are other names of `input`, `voice` and
    `instructions`.
    """

    input: Annotated[
        str, _describe("The text to speak.", min_length=1, examples=["The quick brown fox jumps over the lazy dog."])
    ]
    model: Annotated[
        Name | None,
        _describe(
            "A model's id, alias or Hugging Face id, in any case. "
            "tts-1, tts-1-hd and gpt-4o-mini-tts stand for the default model.",
            examples=["tts-1"],
        ),
    ] = None
    voice: Annotated[
        Name | VoiceRef | None,
        _describe(
            "A voice of the model, an OpenAI voice name or a saved voice, in any case. "
            "If a description or a recording makes the voice, OpenAI's names are ignored and other names are refused.",
            examples=["alloy"],
        ),
    ] = None
    instructions: Annotated[
        Instructions | None,
        _describe("How to speak the text; for a voice-design model, the description of the voice."),
    ] = None
    response_format: Annotated[
        Format | None,
        _describe(
            "The audio format. pcm is mono int16 little-endian without a header; ogg is opus; "
            "ulaw and alaw are G.711 (8 kHz)."
        ),
    ] = None
    sample_rate: Annotated[
        int | None,
        _describe(
            "The sample rate in Hz: 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100 or 48000; "
            "opus has 8000, 12000, 16000, 24000 and 48000, G.711 has 8000. 0: as if it were absent.",
            examples=[24000],
        ),
    ] = None
    speed: Annotated[
        Annotated[float, Meta(ge=MIN_SPEED, le=MAX_SPEED)] | None,
        _describe("The speed of the speech; its pitch does not change."),
    ] = None
    stream_format: Annotated[
        Literal["audio", "sse"] | None,
        _describe("audio: the bytes of the audio format. sse: server-sent events."),
    ] = None
    stream: Annotated[
        bool | None,
        _describe("false: one whole body with Content-Length. By default, audio is sent while it is made."),
    ] = None
    timestamps: Annotated[
        bool | None,
        _describe(
            "true: server-sent events have the words with their times, where the model knows them. "
            "An answer of bytes has no place for them."
        ),
    ] = None
    store: Annotated[
        bool | None,
        _describe("true: keep the finished audio for a while; the header `x-audio-url` is its path."),
    ] = None
    language: Annotated[
        Annotated[str, Meta(min_length=1, max_length=64, extra=TRIMMED)] | None,
        _describe("A language's name (English) or code (en, en-US), or auto."),
    ] = None
    task_type: Annotated[Task | None, _describe("The kind of model; by default it follows from the other fields.")] = (
        None
    )
    ref_audio: Annotated[
        str | None,
        _describe("The recording to clone: a data URL or base64, or an http(s) URL if the server allows URLs."),
    ] = None
    ref_text: Annotated[
        Transcript | None,
        _describe("The transcript of ref_audio."),
    ] = None
    x_vector_only_mode: Annotated[
        bool | None,
        _describe("Clone from the speaker embedding alone, without ref_text."),
    ] = None
    consent: Annotated[
        Name | None,
        _describe("The id of a consent; beside ref_audio it is needed if the server requires consents."),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1, extra=absent(-1))] | None,
        _describe("The same seed gives the same speech again."),
    ] = None
    temperature: Annotated[Temperature | None, _describe("The sampling temperature; 0 is greedy.")] = None
    top_k: Annotated[TopK | None, _describe("Sample from the k most likely tokens; 0 means all.")] = None
    top_p: Annotated[TopP | None, _describe("Nucleus sampling.")] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None, _describe("The penalty for repeated tokens; 1 means none.")
    ] = None
    max_new_tokens: Annotated[
        MaxNewTokens | None,
        _describe("The most frames, of 80 ms each, for the whole request."),
    ] = None
    non_streaming_mode: Annotated[
        bool | None,
        _describe(
            "Qwen3-TTS's text layout: the whole text before the first frame. It does not change how audio is sent."
        ),
    ] = None
    input_format: Annotated[
        InputFormat | None,
        _describe(
            "How to read the input. markdown: as a person would read it aloud. ssml: speak, p, s, break, sub, "
            "prosody rate, say-as characters. auto: ssml if the input begins with <speak, else text. "
            "[pause:1.5s] is a pause in all of them."
        ),
    ] = None
    pronunciations: Annotated[
        Annotated[dict[Word, Respelling], Meta(max_length=MAX_PRONUNCIATIONS)] | None,
        _describe(
            "Words and how to spell them for the voice: whole words, in any case.", examples=[{"nginx": "engine X"}]
        ),
    ] = None
    keep_alive: Annotated[
        int | float | Annotated[str, Meta(max_length=32)] | None,
        _describe(
            "How long the model stays resident after this request: seconds, 5m, 1h30m, 0 (not at all) or -1 (for ever)."
        ),
    ] = None


# --- server-sent events ----------------------------------------------------------------------------------------------


class TimedWord(msgspec.Struct, frozen=True, kw_only=True):
    """A word as it stands in the input, and when it is said: seconds from the beginning of the audio."""

    word: str
    start_time: float
    end_time: float


class SpeechUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the text (input) and of the speech (output)."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


def usage_of(usage: Usage) -> SpeechUsage:
    """The worker's usage with its total."""
    total = usage.input_tokens + usage.output_tokens
    return SpeechUsage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, total_tokens=total)


class SpeechDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="speech.audio.delta"):
    """The next bytes of audio in `response_format`, as base64. With `timestamps`, the words that are complete now."""

    audio: str
    timestamps: list[TimedWord] | msgspec.UnsetType = msgspec.UNSET


class SpeechDone(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="speech.audio.done"):
    """The last event of a complete speech.

    `finish_reason` length: a limit cut it. empty: nothing was speakable, and the audio is 100 ms of silence.
    `timestamps` are the words that no delta had.
    """

    usage: SpeechUsage
    finish_reason: FinishReason
    timestamps: list[TimedWord] | msgspec.UnsetType = msgspec.UNSET


# --- models and voices -----------------------------------------------------------------------------------------------


class ModelObject(msgspec.Struct, frozen=True, kw_only=True):
    """A model in OpenAI's shape, with more fields. `voices` are the ids of its preset voices.

    `instructions`, `sampling` and `timestamps`: the model follows these fields of a request.
    """

    id: str
    created: int
    owned_by: str
    name: str
    aliases: list[str]
    task: Task
    languages: list[str]
    voices: list[str]
    state: PublicState
    loaded_bytes: int
    instructions: bool
    sampling: bool
    timestamps: bool
    detail: str = ""
    object: Literal["model"] = "model"


class ModelId(msgspec.Struct, frozen=True, kw_only=True):
    """A model's id alone."""

    id: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """`data` is OpenAI's list, `models` the one that Open WebUI reads."""

    data: list[ModelObject]
    models: list[ModelId]
    object: Literal["list"] = "list"


class VoiceObject(msgspec.Struct, frozen=True, kw_only=True):
    """A voice that a speech request can name, and the model that speaks with it. `voice_id` equals `id`.

    `kind`: a preset voice, an OpenAI name for one, or a saved voice (clone or design).
    """

    id: str
    voice_id: str
    name: str
    model: str
    language: str
    description: str
    kind: Literal["preset", "openai", "clone", "design"]


class SavedVoiceObject(msgspec.Struct, frozen=True, kw_only=True):
    """A saved voice. `type` is how it was made, `created_at` in Unix seconds, `seconds` the recording's length.

    `prompt` is there if the voice was designed from one.
    `shared`: every key may list the voice and speak with it. Else the key that made it alone may, and admins.
    `owner` is the name of that key in the file of keys; it is there if a key owns the voice, for that key and admins.
    `in_context`: the recording's transcript is known, so the voice is cloned from more than a speaker embedding.
    `model` speaks with the voice; "" if no model can now. `voice_id` equals `id`.
    """

    id: str
    voice_id: str
    name: str
    created_at: int
    type: Literal["audio_sample", "prompt"]
    prompt: str | msgspec.UnsetType = msgspec.UNSET
    model: str
    description: str
    seconds: float
    in_context: bool
    shared: bool = True
    owner: str | msgspec.UnsetType = msgspec.UNSET
    object: Literal["audio.voice"] = "audio.voice"


class VoiceList(msgspec.Struct, frozen=True, kw_only=True):
    """`voices` and `data` are the same list: what one model can speak with, each voice once.

    `uploaded_voices` are the saved voices with more fields, those included that need another model.
    """

    voices: list[VoiceObject]
    uploaded_voices: list[SavedVoiceObject]
    data: list[VoiceObject]
    object: Literal["list"] = "list"


class VoiceNames(msgspec.Struct, frozen=True, kw_only=True):
    """The ids of the voices, for clients that read plain strings (`?legacy=true`)."""

    voices: list[str]
    uploaded_voices: list[str]


class VoiceDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The id of the deleted voice."""

    id: str
    object: Literal["audio.voice.deleted"] = "audio.voice.deleted"
    deleted: bool = True


class VoiceConsentObject(msgspec.Struct, frozen=True, kw_only=True):
    """A recording in which a speaker consents to be cloned. `language` is a BCP 47 tag."""

    id: str
    name: str
    language: str
    created_at: int
    object: Literal["audio.voice_consent"] = "audio.voice_consent"


class VoiceConsentList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of consents, the newest first; `last_id` as `after` asks for the next page."""

    data: list[VoiceConsentObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class VoiceConsentDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The id of the deleted consent."""

    id: str
    object: Literal["audio.voice_consent"] = "audio.voice_consent"
    deleted: bool = True


# --- service ---------------------------------------------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The longest text of a request, the largest recording, and how long one may be."""

    input_chars: int
    recording_bytes: int
    recording_min_s: float
    recording_max_s: float


class Requires(msgspec.Struct, frozen=True, kw_only=True):
    """True for each that a client must send: a key under /v1, an admin key under /admin, a consent to clone a voice."""

    key: bool
    admin_key: bool
    consent: bool


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """The service's name and version, its most important paths, its limits, and what it requires."""

    status: Literal["healthy"]
    service: str
    version: str
    docs: str
    endpoints: dict[str, str]
    limits: Limits
    requires: Requires


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The web process is running; `timestamp` in Unix seconds."""

    status: Literal["healthy"]
    timestamp: float


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The service is ready to speak; `model` is the default model, `worker` the boot id of the GPU worker."""

    status: Literal["ready"]
    model: str
    worker: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Always ok."""

    status: Literal["ok"] = "ok"
