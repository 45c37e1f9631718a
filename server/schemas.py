"""What clients send and get: Structs with their limits in them, from which the OpenAPI is made as well.

It owns shapes and the limits of single fields; what fields mean together is resolution.py's.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from server.audio import MAX_SPEED, MIN_SPEED, Format
from shared.protocol import State, Task

MAX_INSTRUCTIONS: Final = 4096
MAX_REF_TEXT: Final = 4096
MAX_NAME: Final = 200
MAX_KEEP_ALIVE_S: Final = 31_536_000
"""A year; who wants longer says -1."""

ALIASES: Final = {"speaker": "voice", "instruct": "instructions", "text": "input"}
"""Names that other speech servers use for the same fields."""

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]


class VoiceRef(msgspec.Struct, frozen=True, kw_only=True):
    """A voice by its id, as OpenAI writes custom voices."""

    id: Name


def _says(description: str, **limits: Any) -> Meta:
    return Meta(description=description, **limits)


class SpeechRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to say, and how. `speaker`, `instruct` and `text` are taken for `voice`, `instructions` and `input`."""

    input: Annotated[
        str, _says("What to say.", min_length=1, examples=["The quick brown fox jumps over the lazy dog."])
    ]
    model: Annotated[
        Annotated[str, Meta(min_length=1, max_length=MAX_NAME)] | None,
        _says(
            "A model's id, alias or Hugging Face id; case does not matter. "
            "tts-1, tts-1-hd and gpt-4o-mini-tts mean the default model.",
            examples=["tts-1"],
        ),
    ] = None
    voice: Annotated[
        Annotated[str, Meta(min_length=1, max_length=MAX_NAME)] | VoiceRef | None,
        _says(
            "A voice of the model, an OpenAI name or a saved voice; case does not matter. "
            "Where a description or a recording makes the voice, OpenAI's names are ignored and others are refused.",
            examples=["alloy"],
        ),
    ] = None
    instructions: Annotated[
        Annotated[str, Meta(max_length=MAX_INSTRUCTIONS)] | None,
        _says("How to say it; for a voice-design model, the description of the voice."),
    ] = None
    response_format: Annotated[
        Format | None,
        _says("The audio format; pcm is 24 kHz mono int16 little-endian."),
    ] = None
    speed: Annotated[
        Annotated[float, Meta(ge=MIN_SPEED, le=MAX_SPEED)] | None,
        _says("How fast; the pitch stays."),
    ] = None
    stream_format: Annotated[
        Literal["audio", "sse"] | None,
        _says("audio: the bytes of the format. sse: server-sent events."),
    ] = None
    stream: Annotated[
        bool | None,
        _says("false: the whole body at once, with Content-Length. By default audio leaves as it is made."),
    ] = None
    language: Annotated[
        Annotated[str, Meta(min_length=1, max_length=64)] | None,
        _says("A name (English), a code (en, en-US) or auto."),
    ] = None
    task_type: Annotated[Task | None, _says("Which kind of model; deduced where it is left out.")] = None
    ref_audio: Annotated[
        str | None,
        _says("The recording to clone: a data URL or base64; an http(s) URL only where the server allows it."),
    ] = None
    ref_text: Annotated[
        Annotated[str, Meta(max_length=MAX_REF_TEXT)] | None,
        _says("What is said in ref_audio."),
    ] = None
    x_vector_only_mode: Annotated[
        bool | None,
        _says("Clone from the speaker's embedding alone; needs no ref_text."),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        _says("The same seed gives the same speech again."),
    ] = None
    temperature: Annotated[Annotated[float, Meta(ge=0, le=2)] | None, _says("0 is greedy.")] = None
    top_k: Annotated[Annotated[int, Meta(ge=0, le=4096)] | None, _says("0 means all.")] = None
    top_p: Annotated[Annotated[float, Meta(gt=0, le=1)] | None, _says("Nucleus sampling.")] = None
    repetition_penalty: Annotated[Annotated[float, Meta(ge=0.5, le=2)] | None, _says("1 is none.")] = None
    max_new_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=8192)] | None,
        _says("At most so many frames of 80 ms in all."),
    ] = None
    non_streaming_mode: Annotated[
        bool | None,
        _says("Qwen3-TTS's text layout: the whole text before the first frame. Not about transport."),
    ] = None
    keep_alive: Annotated[
        int | float | Annotated[str, Meta(max_length=32)] | None,
        _says("How long the model stays resident after this request: seconds, 5m, 1h30m, 0, or -1 for ever."),
    ] = None


# --- server-sent events ----------------------------------------------------------------------------------------------


class SpeechUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the text and codec tokens of the speech."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class SpeechDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="speech.audio.delta"):
    """A piece of audio: base64 of bytes of `response_format`."""

    audio: str


class SpeechDone(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="speech.audio.done"):
    """Everything has been said."""

    usage: SpeechUsage


# --- models and voices -----------------------------------------------------------------------------------------------


class ModelObject(msgspec.Struct, frozen=True, kw_only=True):
    """A model as OpenAI lists it, and what this server knows beyond that. `voices` are the ids of its own voices."""

    id: str
    created: int
    owned_by: str
    name: str
    aliases: list[str]
    task: Task
    languages: list[str]
    voices: list[str]
    state: State
    loaded_bytes: int
    detail: str = ""
    object: Literal["model"] = "model"


class ModelId(msgspec.Struct, frozen=True, kw_only=True):
    """A model's id, for clients that read no more."""

    id: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """`data` is OpenAI's list, `models` the one that Open WebUI reads."""

    data: list[ModelObject]
    models: list[ModelId]
    object: Literal["list"] = "list"


class VoiceObject(msgspec.Struct, frozen=True, kw_only=True):
    """A voice that speech can be asked for with. `kind`: preset, an OpenAI name, a clone or a designed voice."""

    id: str
    name: str
    model: str
    language: str
    description: str
    kind: Literal["preset", "openai", "clone", "design"]


class VoiceList(msgspec.Struct, frozen=True, kw_only=True):
    """All voices; `uploaded_voices` are the saved ones among them, with more about each."""

    voices: list[VoiceObject]
    uploaded_voices: list["SavedVoiceObject"]


class VoiceNames(msgspec.Struct, frozen=True, kw_only=True):
    """The same as plain strings, for clients that read only those (`?legacy=true`)."""

    voices: list[str]
    uploaded_voices: list[str]


class SavedVoiceObject(msgspec.Struct, frozen=True, kw_only=True):
    """A saved voice; `type` is how it came to be, `created_at` in Unix seconds, `seconds` the recording's length."""

    id: str
    name: str
    created_at: int
    type: Literal["clone", "design"]
    description: str = ""
    seconds: float = 0.0
    in_context: bool = False
    object: Literal["audio.voice"] = "audio.voice"


class VoiceDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The voice is gone."""

    id: str
    object: Literal["audio.voice.deleted"] = "audio.voice.deleted"
    deleted: bool = True


# --- service ---------------------------------------------------------------------------------------------------------


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """What this is and where to go from here."""

    status: str
    service: str
    version: str
    docs: str
    endpoints: dict[str, str]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """This web process lives; `timestamp` in Unix seconds."""

    status: Literal["healthy"]
    timestamp: float


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Speech can be asked for; `model` is the default one."""

    status: Literal["ready"]
    model: str
    worker: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All is well."""

    status: Literal["ok"] = "ok"
