"""Which model, voice, language and task a request means: pure functions on the catalogue.

It owns the rules by which fields agree or contradict each other. It asks nobody and keeps nothing:
what must be looked up (a saved voice) is named by `saved_voice_name` and handed to `resolve`.
"""

import re
import unicodedata
from typing import Final

import msgspec

from server.http.errors import ApiError
from server.schemas import MAX_KEEP_ALIVE_S, SpeechRequest, VoiceRef
from shared.catalog import OPENAI_VOICES, ModelSpec
from shared.protocol import Sampling, SavedVoice, Task

OPENAI_MODELS: Final[dict[str, str]] = {"tts-1": "small", "tts-1-hd": "large", "gpt-4o-mini-tts": ""}
"""OpenAI's names of models and the size of the default model that each means ("": its own)."""

_DATE: Final = re.compile(r"-(?:\d{4}|\d{4}-\d{2}-\d{2})$")
"""What OpenAI puts behind the name of one state of a model: tts-1-1106, gpt-4o-mini-tts-2025-03-20."""

_SAMPLING: Final = (
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_new_tokens",
    "non_streaming_mode",
)
_NUMBER: Final = r"\d{1,9}(?:\.\d{0,9})?"
_DURATION: Final = re.compile(rf"(?P<sign>[+-]?)(?:(?P<seconds>{_NUMBER})|(?P<parts>(?:{_NUMBER}(?:ms|s|m|h))+))")
"""Seconds, or a duration as Go writes it: 1h30m."""
_PART: Final = re.compile(rf"({_NUMBER})(ms|s|m|h)")
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LISTED: Final = 60
"""Names that an error message lists at most."""


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """What a request means, in the model's own words; see shared.protocol.Speak for the fields."""

    model: ModelSpec
    voice: str
    saved_voice: bool
    language: str
    instructions: str
    sampling: Sampling
    keep_alive_s: float | None


def check_input(text: str, max_chars: int) -> None:
    """ApiError where `text` is too long, or holds nothing that could be said (white space, control characters)."""
    if len(text) > max_chars:
        raise ApiError(
            "invalid_value", f"input: {len(text)} characters, at most {max_chars} are possible.", param="input"
        )
    if "\0" in text:
        raise ApiError("invalid_value", "input: holds a null character.", param="input")
    # Categories C* (control, format, surrogate, unassigned) and Z* (separators) have no sound.
    if all(unicodedata.category(character)[0] in "CZ" for character in text):
        raise ApiError("invalid_value", "input: there is nothing to say in it.", param="input")


def find_model(name: str, catalog: list[ModelSpec]) -> ModelSpec:
    """The model of that id, Hugging Face id or alias; ApiError (`model_not_found`) lists what there is."""
    for spec in catalog:
        if spec.answers_to(name):
            return spec
    there = ", ".join(spec.id for spec in catalog)
    raise ApiError("model_not_found", f"There is no model {_shown(name)}; there are: {there}.", param="model")


def model_named(name: str, catalog: list[ModelSpec], default_model: str) -> ModelSpec:
    """As `find_model`, with OpenAI's names for the default model as well."""
    return _starting_model(name, catalog, default_model)[0]


def saved_voice_name(request: SpeechRequest, catalog: list[ModelSpec], default_model: str) -> str | None:
    """The name of the saved voice that `request` may mean; None where its voice is plainly something else."""
    name = _voice_name(request)
    if name is None or request.ref_audio is not None or request.task_type == "VoiceDesign":
        return None
    start, free = _starting_model(request.model, catalog, default_model)
    spec = _of_task(start, request.task_type, catalog) if free and request.task_type else start
    return None if spec.task == "VoiceDesign" or spec.voice(name) else name


def resolve(
    request: SpeechRequest, catalog: list[ModelSpec], default_model: str, saved: SavedVoice | None = None
) -> Resolved:
    """What `request` means; `saved` is the saved voice of the name that `saved_voice_name` gave, if there is one.

    A model that the client named means itself and nothing else.
    A request without one (or with a name of OpenAI's) goes to the model of its task, in the default model's family
    and size. Raises ApiError: `model_not_found`, `voice_not_found`, `task_mismatch`, `invalid_value`.
    """
    start, free = _starting_model(request.model, catalog, default_model)
    task: Task = request.task_type or ("Base" if request.ref_audio is not None or saved is not None else start.task)
    if free and saved is not None and request.task_type is None:
        spec = _of_saved_voice(start, saved, catalog)
    else:
        spec = _of_task(start, task, catalog) if free else start
    _check_task(request, spec, saved)
    _check_reference(request, spec, saved)
    return Resolved(
        model=spec,
        voice=_voice(request, spec, saved),
        saved_voice=saved is not None,
        language=_language(request.language, spec),
        instructions=_instructions(request.instructions, spec),
        sampling=_sampling(request, spec),
        keep_alive_s=keep_alive_s(request.keep_alive),
    )


def keep_alive_s(given: float | str | None) -> float | None:
    """Seconds: 300, "300", "5m", "1h30m"; -1 for ever (negative); None as configured. ApiError for anything else."""
    if given is None:
        return None
    if isinstance(given, str):
        match = _DURATION.fullmatch(given.strip())
        if match is None:
            said = "keep_alive: seconds (300), a duration (5m, 1h30m), 0 or -1 is expected."
            raise ApiError("invalid_value", said, param="keep_alive")
        parts = _PART.findall(match["parts"] or "")
        seconds = float(match["seconds"] or 0) + sum(float(number) * _UNITS[unit] for number, unit in parts)
        seconds = -seconds if match["sign"] == "-" else seconds
    else:
        seconds = float(given)
    if seconds > MAX_KEEP_ALIVE_S:
        said = f"keep_alive: at most {MAX_KEEP_ALIVE_S} seconds, a year; -1 means for ever."
        raise ApiError("invalid_value", said, param="keep_alive")
    return -1.0 if seconds < 0 else seconds


# --- the model -------------------------------------------------------------------------------------------------------


def _starting_model(name: str | None, catalog: list[ModelSpec], default_model: str) -> tuple[ModelSpec, bool]:
    """The model that `name` means, and whether the task may still choose another one of its family."""
    openai_size = OPENAI_MODELS.get(_DATE.sub("", name.casefold())) if name is not None else ""
    if name is not None and openai_size is None:
        return find_model(name, catalog), False
    default = find_model(default_model, catalog)
    if not openai_size or not default.size or openai_size == default.size:
        return default, True
    sized = (
        spec for spec in catalog if (spec.engine, spec.task, spec.size) == (default.engine, default.task, openai_size)
    )
    return next(sized, default), True


def _of_task(start: ModelSpec, task: Task, catalog: list[ModelSpec]) -> ModelSpec:
    """The model for `task` in the family of `start`: of its size where there is one, else of the size there is."""
    if start.task == task:
        return start
    family = [spec for spec in catalog if spec.engine == start.engine and spec.task == task]
    if not family:
        others = ", ".join(spec.id for spec in catalog if spec.task == task) or "none"
        raise ApiError(
            "task_mismatch",
            f"The default model {start.id} has no {task} model beside it; name one as model: {others}.",
            param="model",
        )
    return next((spec for spec in family if spec.size == start.size), family[0])


def _of_saved_voice(start: ModelSpec, saved: SavedVoice, catalog: list[ModelSpec]) -> ModelSpec:
    """The Base model beside `start`; where there is none, the message names the voice that needs one."""
    try:
        return _of_task(start, "Base", catalog)
    except ApiError as error:
        said = f"voice: {saved.name!r} is a saved voice, which needs a Base model. {error.message}"
        raise ApiError(error.code, said, param="voice") from None


def _check_task(request: SpeechRequest, spec: ModelSpec, saved: SavedVoice | None) -> None:
    if request.task_type is not None and request.task_type != spec.task:
        raise ApiError(
            "task_mismatch", f"task_type: {spec.id} is a {spec.task} model, not {request.task_type}.", param="task_type"
        )
    if request.ref_audio is not None and spec.task != "Base":
        raise ApiError(
            "task_mismatch", f"ref_audio: {spec.id} cannot clone a voice; a Base model can.", param="ref_audio"
        )
    if saved is not None and spec.task != "Base":
        raise ApiError(
            "task_mismatch",
            f"voice: {saved.name!r} is a saved voice, which needs a Base model; {spec.id} is none.",
            param="voice",
        )


def _check_reference(request: SpeechRequest, spec: ModelSpec, saved: SavedVoice | None) -> None:
    """The fields of cloning, against each other."""
    if request.ref_audio is None:
        if request.ref_text is not None:
            raise ApiError(
                "invalid_value", "ref_text: is the transcript of ref_audio, which is missing.", param="ref_text"
            )
        if request.x_vector_only_mode and saved is None:
            raise ApiError(
                "invalid_value", "x_vector_only_mode: needs ref_audio or a saved voice.", param="x_vector_only_mode"
            )
        if spec.task == "Base" and saved is None and _voice_name(request) is None:
            raise ApiError(
                "invalid_value",
                f"ref_audio: {spec.id} clones a voice; give ref_audio or a saved voice.",
                param="ref_audio",
            )
    elif not request.x_vector_only_mode and not (request.ref_text or "").strip():
        raise ApiError(
            "invalid_value", "ref_text: give what is said in ref_audio, or x_vector_only_mode: true.", param="ref_text"
        )


# --- the other fields ------------------------------------------------------------------------------------------------


def _voice_name(request: SpeechRequest) -> str | None:
    return request.voice.id if isinstance(request.voice, VoiceRef) else request.voice


def _voice(request: SpeechRequest, spec: ModelSpec, saved: SavedVoice | None) -> str:
    """The voice as the engine calls it; "" where a recording or a description makes it."""
    name = _voice_name(request)
    if saved is not None:
        return saved.id
    if request.ref_audio is not None or spec.task == "VoiceDesign":
        # OpenAI's SDK insists on a voice, so its own names must mean nothing here.
        if name is None or name.casefold() in OPENAI_VOICES:
            return ""
        maker = "ref_audio" if request.ref_audio is not None else "instructions"
        raise ApiError("task_mismatch", f"voice: {maker} makes the voice of this request; leave it out.", param="voice")
    if name is None:
        return spec.voices[0].id
    voice = spec.voice(name)
    if voice is None:
        there = ", ".join(voice.name for voice in spec.voices[:_LISTED])
        said = f"its voices: {there}, OpenAI's names and saved voices" if there else "it speaks with saved voices"
        raise ApiError("voice_not_found", f"voice: {spec.id} has no voice {_shown(name)}; {said}.", param="voice")
    return voice.id


def _language(name: str | None, spec: ModelSpec) -> str:
    if name is None or name.strip().casefold() == "auto":
        return "auto"
    language = spec.language(name)
    if language is None:
        there = ", ".join(language.name for language in spec.languages[:_LISTED])
        raise ApiError(
            "invalid_value", f"language: {spec.id} does not speak {_shown(name)}; it speaks: {there}.", param="language"
        )
    return language


def _instructions(given: str | None, spec: ModelSpec) -> str:
    instructions = (given or "").strip()
    if spec.task == "VoiceDesign" and not instructions:
        raise ApiError(
            "invalid_value", f"instructions: {spec.id} needs a description of the voice.", param="instructions"
        )
    if instructions and not spec.instructions:
        raise ApiError(
            "invalid_value", f"instructions: {spec.id} cannot follow any; leave them out.", param="instructions"
        )
    if "\0" in instructions:
        raise ApiError("invalid_value", "instructions: hold a null character.", param="instructions")
    return instructions


def _sampling(request: SpeechRequest, spec: ModelSpec) -> Sampling:
    if not spec.sampling:
        for field in _SAMPLING:
            if getattr(request, field) is not None:
                raise ApiError("invalid_value", f"{field}: means nothing to {spec.id}; leave it out.", param=field)
    return Sampling(
        seed=request.seed,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        repetition_penalty=request.repetition_penalty,
        max_new_tokens=request.max_new_tokens,
    )


def _shown(name: str) -> str:
    return repr(name if len(name) <= _LISTED else name[:_LISTED] + "…")
