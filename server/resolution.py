"""The model, voice, language and task of a request: pure functions of the request and the catalogue.

This module owns the rules by which fields agree or contradict each other. It does no I/O: the caller looks up the
saved voice that `saved_voice_name` names, and passes the voice to `resolve`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal

import msgspec

from server.audio import SAMPLE_RATES, Format, default_rate
from server.http.errors import ApiError
from server.schemas import MAX_KEEP_ALIVE_S, SpeechRequest, VoiceRef
from shared.catalog import OPENAI_MODELS, OPENAI_VOICES, ModelSpec
from shared.protocol import Sampling, SavedVoice, Task
from shared.text import NO_SPEAKABLE_TEXT, is_blank

_WITHOUT_INSTRUCTIONS: Final = {"tts-1", "tts-1-hd"}
"""OpenAI's models that ignore instructions, so their clients may always send some."""

_DATE: Final = re.compile(r"-(?:\d{4}|\d{4}-\d{2}-\d{2})$")
"""The date in OpenAI's names of model snapshots: tts-1-1106, gpt-4o-mini-tts-2025-03-20."""

_SAMPLING_FIELDS: Final = (*Sampling.__struct_fields__, "non_streaming_mode")
"""Fields that only models with sampling accept."""

_NUMBER: Final = r"\d{1,9}(?:\.\d{0,9})?"
_DURATION: Final = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<seconds>{_NUMBER})|(?P<parts>(?:{_NUMBER}(?:ms|s|m|h))+))", re.ASCII
)
"""Seconds, or a duration in Go's notation: 1h30m."""
_PART: Final = re.compile(rf"({_NUMBER})(ms|s|m|h)", re.ASCII)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_LISTED: Final = 60
"""The most names that an error message lists."""

_SIMILAR: Final = 0.75
"""A mistyped name is at least so similar to the one that was meant, by difflib's measure."""

_MAX_SHOWN: Final = 60
"""Characters of a client's name that an error message repeats."""


UnknownVoice = Literal["refuse", "default"]
"""The answer to an unknown voice: a refusal, or the model's first voice (TTS_UNKNOWN_VOICE)."""


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """The meaning of a request in the model's own names; shared.protocol.Speak describes the fields.

    `ignored` are the fields of the request that have no effect.
    """

    model: ModelSpec
    voice: str
    saved_voice: bool
    language: str
    instructions: str
    sampling: Sampling
    keep_alive_s: float | None
    ignored: tuple[str, ...] = ()

    def speaks(self, language: str) -> bool:
        """True if the text is read in `language`, a name or a code.

        With auto, espeak-ng reads in the language of its voice; which one Qwen3-TTS finds is unknown here.
        """
        voice = self.model.voice(self.voice) if self.language == "auto" and self.model.engine == "espeak" else None
        return self.model.language(language) == (voice.language if voice else self.language)


def check_input(text: str, max_chars: int) -> None:
    """Raise ApiError if `text` is too long, contains a null character or is blank."""
    if len(text) > max_chars:
        raise _invalid("input", f"must have at most {max_chars} characters (TTS_MAX_INPUT_CHARS), not {len(text)}.")
    if "\0" in text:
        raise _invalid("input", "contains a null character.")
    if is_blank(text):
        raise ApiError("invalid_value", f"{NO_SPEAKABLE_TEXT.capitalize()}.", param="input")


def find_model(name: str, catalog: list[ModelSpec]) -> ModelSpec:
    """The model with that id, Hugging Face id or alias; ApiError (`model_not_found`) lists the models."""
    for spec in catalog:
        if spec.answers_to(name):
            return spec
    known = [spec.id for spec in catalog]
    message = f"There is no model {_shown(name)}{_meant(name, known)}; there are: {', '.join(known)}."
    raise ApiError("model_not_found", message, param="model")


def unaliased(model: str, aliases: Mapping[str, str]) -> str:
    """`model`, or the model that TTS_MODEL_ALIASES has for this name, in any case."""
    wanted = model.casefold()
    return next((target for name, target in aliases.items() if name.casefold() == wanted), model)


def resolve_model(name: str, catalog: list[ModelSpec], default_model: str) -> ModelSpec:
    """Like `find_model`; OpenAI's names stand for the default model."""
    return _starting_model(name, catalog, default_model)[0]


def models_with_voices(
    name: str | None, catalog: list[ModelSpec], default_model: str
) -> tuple[ModelSpec, ModelSpec | None]:
    """The model that speaks when a request names the model `name`, and the one that then speaks with a saved voice."""
    start, replaceable = _starting_model(name, catalog, default_model)
    if start.task == "Base":
        return start, start
    family = (spec for spec in catalog if spec.engine == start.engine and spec.task == "Base" and replaceable)
    return start, min(family, key=lambda spec: spec.size != start.size, default=None)


def saved_voice_name(request: SpeechRequest, catalog: list[ModelSpec], default_model: str) -> str | None:
    """The name to look up among the saved voices; None if the voice of `request` cannot be a saved one."""
    name = _voice_name(request)
    if name is None or request.ref_audio is not None or request.task_type == "VoiceDesign":
        return None
    start, replaceable = _starting_model(request.model, catalog, default_model)
    spec = _of_task(start, request.task_type, catalog) if replaceable and request.task_type else start
    return None if spec.task == "VoiceDesign" or spec.voice(name) else name


def resolve(
    request: SpeechRequest,
    catalog: list[ModelSpec],
    default_model: str,
    saved: SavedVoice | None = None,
    *,
    unknown_voice: UnknownVoice = "refuse",
) -> Resolved:
    """Resolve `request`; `saved` is the saved voice with the name of `saved_voice_name`, if there is one.

    A model that the client names is used as it is.
    A request without a model, or with one of OpenAI's names, goes to the model for its task in the default model's
    family and size. Raises ApiError: `model_not_found`, `voice_not_found`, `task_mismatch`, `invalid_value`.
    """
    start, replaceable = _starting_model(request.model, catalog, default_model)
    task: Task = request.task_type or ("Base" if request.ref_audio is not None or saved is not None else start.task)
    if replaceable and saved is not None and request.task_type is None:
        spec = _of_saved_voice(start, saved, catalog)
    else:
        spec = _of_task(start, task, catalog) if replaceable else start
    _check_task(request, spec, saved)
    _check_reference(request, spec, saved)
    voice, voice_ignored = _voice(request, spec, saved, catalog, unknown_voice)
    instructions, instructions_ignored = _instructions(request, spec)
    ignored = {"voice": voice_ignored, "instructions": instructions_ignored}
    return Resolved(
        model=spec,
        voice=voice,
        saved_voice=saved is not None,
        language=_language(request.language, spec),
        instructions=instructions,
        sampling=_sampling(request, spec),
        keep_alive_s=keep_alive_s(request.keep_alive),
        ignored=tuple(name for name, is_ignored in ignored.items() if is_ignored),
    )


def sample_rate(request: SpeechRequest, audio_format: Format) -> int:
    """The sample rate of the answer; ApiError if the client asks for one that `audio_format` cannot have."""
    rate = request.sample_rate or default_rate(audio_format)
    if rate not in SAMPLE_RATES[audio_format]:
        known = ", ".join(str(known) for known in SAMPLE_RATES[audio_format])
        raise _invalid("sample_rate", f"{audio_format} cannot have {rate} Hz; it can have: {known}.")
    return rate


def keep_alive_s(given: float | str | None) -> float | None:
    """Seconds of 300, "300", "5m" or "1h30m"; negative: for ever; None: as configured. ApiError for anything else."""
    if given is None:
        return None
    if isinstance(given, str):
        match = _DURATION.fullmatch(given.strip())
        if match is None:
            raise _invalid("keep_alive", "must be seconds (300), a duration (5m, 1h30m), 0 or -1.")
        parts = _PART.findall(match["parts"] or "")
        seconds = float(match["seconds"] or 0) + sum(float(number) * _UNITS[unit] for number, unit in parts)
        seconds = -seconds if match["sign"] == "-" else seconds
    else:
        seconds = float(given)
    if seconds > MAX_KEEP_ALIVE_S:
        raise _invalid("keep_alive", f"must be at most {MAX_KEEP_ALIVE_S} seconds (a year); -1 means for ever.")
    return -1.0 if seconds < 0 else seconds


# --- the model -------------------------------------------------------------------------------------------------------


def _starting_model(name: str | None, catalog: list[ModelSpec], default_model: str) -> tuple[ModelSpec, bool]:
    """The model that `name` stands for, and whether the task may replace it by another of its family."""
    openai_size = OPENAI_MODELS.get(_undated(name)) if name is not None else ""
    if name is not None and openai_size is None:
        return find_model(name, catalog), False
    default = find_model(default_model, catalog)
    if not openai_size or not default.size or openai_size == default.size:
        return default, True
    sized = (
        spec for spec in catalog if (spec.engine, spec.task, spec.size) == (default.engine, default.task, openai_size)
    )
    return next(sized, default), True


def _undated(name: str) -> str:
    """`name` in lower case, without the date of one of OpenAI's snapshots."""
    return _DATE.sub("", name.casefold())


def _of_task(start: ModelSpec, task: Task, catalog: list[ModelSpec]) -> ModelSpec:
    """The model for `task` in the family of `start`, of the same size if there is one."""
    if start.task == task:
        return start
    family = [spec for spec in catalog if spec.engine == start.engine and spec.task == task]
    if not family:
        others = ", ".join(spec.id for spec in catalog if spec.task == task) or "none"
        message = f"The default model {start.id} has no {task} model in its family; name one as model: {others}."
        raise ApiError("task_mismatch", message, param="model")
    return next((spec for spec in family if spec.size == start.size), family[0])


def _of_saved_voice(start: ModelSpec, saved: SavedVoice, catalog: list[ModelSpec]) -> ModelSpec:
    """The Base model in the family of `start`; without one, the error names the voice that needs it."""
    try:
        return _of_task(start, "Base", catalog)
    except ApiError as error:
        message = f"voice: {saved.name!r} is a saved voice, which needs a Base model. {error.message}"
        raise ApiError(error.code, message, param="voice") from None


def _check_task(request: SpeechRequest, spec: ModelSpec, saved: SavedVoice | None) -> None:
    if request.task_type is not None and request.task_type != spec.task:
        raise _mismatch("task_type", f"{spec.id} is a {spec.task} model, not {request.task_type}.")
    if request.ref_audio is not None and spec.task != "Base":
        raise _mismatch("ref_audio", f"{spec.id} cannot clone a voice; a Base model can.")
    if saved is not None and spec.task != "Base":
        raise _mismatch("voice", f"{saved.name!r} is a saved voice, which needs a Base model; {spec.id} is none.")


def _check_reference(request: SpeechRequest, spec: ModelSpec, saved: SavedVoice | None) -> None:
    """Check the fields of voice cloning against each other."""
    if request.ref_audio is None:
        if request.ref_text is not None:
            raise _invalid("ref_text", "is the transcript of ref_audio, which is missing.")
        if request.x_vector_only_mode and saved is None:
            raise _invalid("x_vector_only_mode", "needs ref_audio or a saved voice.")
        if spec.task == "Base" and saved is None and _voice_name(request) is None:
            raise _invalid("ref_audio", f"{spec.id} clones a voice; send ref_audio or name a saved voice.")
    elif not request.x_vector_only_mode and not (request.ref_text or "").strip():
        raise _invalid("ref_text", "send the transcript of ref_audio, or x_vector_only_mode: true.")


# --- the other fields ------------------------------------------------------------------------------------------------


def _voice_name(request: SpeechRequest) -> str | None:
    return request.voice.id if isinstance(request.voice, VoiceRef) else request.voice


def _voice(
    request: SpeechRequest,
    spec: ModelSpec,
    saved: SavedVoice | None,
    catalog: list[ModelSpec],
    unknown_voice: UnknownVoice,
) -> tuple[str, bool]:
    """The engine's name of the voice, and whether the client's name of it has no effect.

    The engine's name is "" if a recording or a description makes the voice.
    """
    name = _voice_name(request)
    if saved is not None:
        return saved.id, False
    if request.ref_audio is not None or spec.task == "VoiceDesign":
        # OpenAI's SDK requires a voice, so its own names are ignored here.
        if name is None or name.casefold() in OPENAI_VOICES:
            return "", False
        if request.ref_audio is None:
            raise _mismatch("voice", "instructions make the voice of this request; leave voice out.")
        if any(known.voice(name) for known in catalog):
            raise _mismatch("voice", "ref_audio makes the voice of this request; leave voice out.")
        return "", True  # a label: gateways send one name with every recording
    if name is None:
        return spec.voices[0].id, False
    voice = spec.voice(name)
    if voice is not None:
        return voice.id, False
    if unknown_voice == "default" and spec.voices:
        return spec.voices[0].id, True
    names = [voice.name for voice in spec.voices[:_MAX_LISTED]]
    hint = (
        f"its voices: {', '.join(names)}, OpenAI's names and saved voices" if names else "it speaks with saved voices"
    )
    meant = _meant(name, [*names, *OPENAI_VOICES]) if names else ""
    message = f"voice: {spec.id} has no voice {_shown(name)}{meant}; {hint}."
    raise ApiError("voice_not_found", message, param="voice")


def _language(name: str | None, spec: ModelSpec) -> str:
    if name is None or name.strip().casefold() == "auto":
        return "auto"
    language = spec.language(name)
    if language is None:
        known = ", ".join(language.name for language in spec.languages[:_MAX_LISTED])
        raise _invalid("language", f"{spec.id} does not speak {_shown(name)}; it speaks: {known}.")
    return language


def _instructions(request: SpeechRequest, spec: ModelSpec) -> tuple[str, bool]:
    """The instructions, and whether the client's have no effect."""
    instructions = (request.instructions or "").strip()
    if spec.task == "VoiceDesign" and not instructions:
        raise _invalid("instructions", f"{spec.id} needs a description of the voice.")
    if "\0" in instructions:
        raise _invalid("instructions", "contain a null character.")
    if not instructions or spec.instructions:
        return instructions, False
    if spec.engine == "espeak" or _undated(request.model or "") in _WITHOUT_INSTRUCTIONS:
        return "", True
    raise _invalid("instructions", f"{spec.id} cannot follow any; leave them out.")


def _sampling(request: SpeechRequest, spec: ModelSpec) -> Sampling:
    if not spec.sampling:
        for field in _SAMPLING_FIELDS:
            if getattr(request, field) is not None:
                raise _invalid(field, f"has no meaning for {spec.id}; leave it out.")
    return msgspec.convert(request, Sampling, from_attributes=True)


def _meant(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, for a message."""
    by_folded = {one.casefold(): one for one in known}
    meant = difflib.get_close_matches(name[:_MAX_SHOWN].casefold(), by_folded, n=1, cutoff=_SIMILAR)
    return f" (did you mean {by_folded[meant[0]]}?)" if meant else ""


def _shown(name: str) -> str:
    return repr(name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + "…")


def _invalid(field: str, problem: str) -> ApiError:
    return ApiError("invalid_value", f"{field}: {problem}", param=field)


def _mismatch(field: str, problem: str) -> ApiError:
    return ApiError("task_mismatch", f"{field}: {problem}", param=field)
