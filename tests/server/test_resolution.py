"""The meaning of requests, rule by rule, on the real catalogue."""

from typing import Any

import msgspec
import pytest

from server.http.errors import ApiError
from server.resolution import check_input, keep_alive_s, resolve, resolve_model, saved_voice_name, unaliased
from server.schemas import SpeechRequest, VoiceRef
from shared.catalog import load_catalog
from shared.protocol import SavedVoice

CATALOG = load_catalog()
ESPEAK = "espeak-ng"
LARGE = "qwen3-tts-1.7b-customvoice"
SMALL = "qwen3-tts-0.6b-customvoice"
DESIGN = "qwen3-tts-1.7b-voicedesign"
BASE = "qwen3-tts-1.7b-base"
SMALL_BASE = "qwen3-tts-0.6b-base"
SAVED = SavedVoice(id="v1", name="Grandma", kind="clone", created_at=1, seconds=3.0, in_context=True)
CLONE = {"ref_audio": "UklGRg==", "ref_text": "hello"}


def _ask(**fields: Any) -> SpeechRequest:
    return SpeechRequest(input="hello", **fields)


@pytest.mark.parametrize(
    ("default", "fields", "model", "voice"),
    [
        (ESPEAK, {}, ESPEAK, "en-us+f2"),
        (ESPEAK, {"model": "tts-1"}, ESPEAK, "en-us+f2"),
        (ESPEAK, {"model": "tts-1-hd"}, ESPEAK, "en-us+f2"),
        (ESPEAK, {"model": "ESPEAK", "voice": "emma"}, ESPEAK, "en-us+f2"),
        (ESPEAK, {"voice": "EN-US+M3"}, ESPEAK, "en-us+m3"),
        (ESPEAK, {"voice": VoiceRef(id="Onyx")}, ESPEAK, "en-us+m7"),
        (ESPEAK, {"model": SMALL}, SMALL, "ryan"),
        (LARGE, {}, LARGE, "ryan"),
        (LARGE, {"model": "tts-1"}, SMALL, "ryan"),
        (LARGE, {"model": "TTS-1-HD"}, LARGE, "ryan"),
        (LARGE, {"model": "gpt-4o-mini-tts"}, LARGE, "ryan"),
        (SMALL, {"model": "gpt-4o-mini-tts"}, SMALL, "ryan"),
        (SMALL, {"model": "tts-1-hd"}, LARGE, "ryan"),
        (LARGE, {"model": "tts-1-1106"}, SMALL, "ryan"),
        (SMALL, {"model": "TTS-1-HD-1106"}, LARGE, "ryan"),
        (ESPEAK, {"model": "gpt-4o-mini-tts-2025-03-20"}, ESPEAK, "en-us+f2"),
        (LARGE, {"model": "qwen/qwen3-tts-12hz-0.6b-customvoice", "voice": "Uncle_Fu"}, SMALL, "uncle_fu"),
        (LARGE, CLONE, BASE, ""),
        (SMALL, CLONE, SMALL_BASE, ""),
        (LARGE, {"model": "tts-1", **CLONE}, SMALL_BASE, ""),
        (LARGE, {"model": SMALL_BASE, **CLONE}, SMALL_BASE, ""),
        (LARGE, {"voice": "alloy", **CLONE}, BASE, ""),
        (LARGE, {"ref_audio": "UklGRg==", "x_vector_only_mode": True}, BASE, ""),
        (LARGE, {"task_type": "VoiceDesign", "instructions": "an old man"}, DESIGN, ""),
        (SMALL, {"task_type": "VoiceDesign", "instructions": "an old man", "voice": "nova"}, DESIGN, ""),
        (LARGE, {"task_type": "CustomVoice"}, LARGE, "ryan"),
        (LARGE, {"task_type": "Base", **CLONE}, BASE, ""),
        (ESPEAK, {"model": BASE, **CLONE}, BASE, ""),
    ],
)
def test_model_and_voice(default: str, fields: dict[str, Any], model: str, voice: str) -> None:
    """A named model is used as it is; otherwise the task chooses within the default's family and size."""
    resolved = resolve(_ask(**fields), CATALOG, default)
    assert (resolved.model.id, resolved.voice, resolved.saved_voice) == (model, voice, False)


@pytest.mark.parametrize(
    ("default", "fields", "code", "param"),
    [
        (ESPEAK, {"model": "gpt-5"}, "model_not_found", "model"),
        (ESPEAK, {"model": "espeak-ng-1106"}, "model_not_found", "model"),
        (ESPEAK, {"voice": "nobody"}, "voice_not_found", "voice"),
        (LARGE, {"voice": "emma"}, "voice_not_found", "voice"),
        (ESPEAK, {"model": BASE, "voice": "alloy"}, "voice_not_found", "voice"),
        (ESPEAK, CLONE, "task_mismatch", "model"),
        (ESPEAK, {"model": ESPEAK, **CLONE}, "task_mismatch", "ref_audio"),
        (LARGE, {"model": LARGE, **CLONE}, "task_mismatch", "ref_audio"),
        (LARGE, {"task_type": "CustomVoice", **CLONE}, "task_mismatch", "ref_audio"),
        (LARGE, {"model": LARGE, "task_type": "Base"}, "task_mismatch", "task_type"),
        (ESPEAK, {"task_type": "VoiceDesign"}, "task_mismatch", "model"),
        (LARGE, {"voice": "ryan", **CLONE}, "task_mismatch", "voice"),
        (LARGE, {"model": DESIGN, "instructions": "old", "voice": "ryan"}, "task_mismatch", "voice"),
        (LARGE, {"model": DESIGN}, "invalid_value", "instructions"),
        (LARGE, {"model": DESIGN, "instructions": "  "}, "invalid_value", "instructions"),
        (LARGE, {"model": BASE}, "invalid_value", "ref_audio"),
        (LARGE, {"ref_audio": "UklGRg=="}, "invalid_value", "ref_text"),
        (LARGE, {"ref_audio": "UklGRg==", "ref_text": " "}, "invalid_value", "ref_text"),
        (LARGE, {"ref_text": "hello"}, "invalid_value", "ref_text"),
        (LARGE, {"x_vector_only_mode": True}, "invalid_value", "x_vector_only_mode"),
        (SMALL, {"instructions": "softly"}, "invalid_value", "instructions"),
        (SMALL, {"instructions": "softly", "model": "gpt-4o-mini-tts"}, "invalid_value", "instructions"),
        (LARGE, {"instructions": "softly", "model": SMALL}, "invalid_value", "instructions"),
        (LARGE, {"instructions": "softly", "model": SMALL_BASE, **CLONE}, "invalid_value", "instructions"),
        (ESPEAK, {"instructions": "soft\0ly"}, "invalid_value", "instructions"),
        (LARGE, {"instructions": "soft\0ly"}, "invalid_value", "instructions"),
        (ESPEAK, {"seed": 1}, "invalid_value", "seed"),
        (ESPEAK, {"temperature": 0.0}, "invalid_value", "temperature"),
        (ESPEAK, {"max_new_tokens": 5}, "invalid_value", "max_new_tokens"),
        (ESPEAK, {"non_streaming_mode": False}, "invalid_value", "non_streaming_mode"),
        (LARGE, {"language": "polish"}, "invalid_value", "language"),
        (LARGE, {"keep_alive": "soon"}, "invalid_value", "keep_alive"),
    ],
)
def test_contradictions(default: str, fields: dict[str, Any], code: str, param: str) -> None:
    """Contradictory fields are an error that names the field at fault; no field is dropped silently."""
    with pytest.raises(ApiError) as caught:
        resolve(_ask(**fields), CATALOG, default)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    ("fields", "model"),
    [({}, BASE), ({"model": "tts-1"}, SMALL_BASE), ({"model": SMALL_BASE}, SMALL_BASE), ({"task_type": "Base"}, BASE)],
)
def test_a_saved_voice_goes_to_a_base_model(fields: dict[str, Any], model: str) -> None:
    """The Base model of the default's family and size speaks with a saved voice, or the named model."""
    request = _ask(voice="grandma", **fields)
    assert saved_voice_name(request, CATALOG, LARGE) == "grandma"
    resolved = resolve(request, CATALOG, LARGE, SAVED)
    assert (resolved.model.id, resolved.voice, resolved.saved_voice) == (model, "v1", True)


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"voice": "aloy"}, "'aloy' (did you mean alloy?); its voices"),
        ({"voice": "emma2"}, "'emma2' (did you mean Emma?); its voices"),
        ({"voice": "bella"}, "'bella'; its voices"),
        ({"model": "espeak_ng"}, "'espeak_ng' (did you mean espeak-ng?); there are"),
        ({"model": "gpt-5"}, "'gpt-5'; there are"),
    ],
)
def test_a_mistyped_name(fields: dict[str, Any], meant: str) -> None:
    """The message has the name that was probably meant, if one is similar."""
    with pytest.raises(ApiError) as caught:
        resolve(_ask(**fields), CATALOG, ESPEAK)
    assert meant in caught.value.message


def test_a_saved_voice_with_a_model_of_another_task() -> None:
    """A saved voice with a model that cannot clone is an error."""
    with pytest.raises(ApiError) as caught:
        resolve(_ask(voice="grandma", model=LARGE), CATALOG, LARGE, SAVED)
    assert (caught.value.code, caught.value.param) == ("task_mismatch", "voice")


def test_a_saved_voice_without_a_base_model() -> None:
    """The message says that the voice is a saved one, and lists the models that can speak with it."""
    with pytest.raises(ApiError, match=rf"'Grandma' is a saved voice.*{BASE}") as caught:
        resolve(_ask(voice="grandma"), CATALOG, ESPEAK, SAVED)
    assert (caught.value.code, caught.value.param) == ("task_mismatch", "voice")


@pytest.mark.parametrize(
    "fields", [{}, {"voice": "RYAN"}, {"voice": "alloy"}, {"voice": "x", **CLONE}, {"voice": "x", "model": DESIGN}]
)
def test_only_unknown_names_are_looked_up(fields: dict[str, Any]) -> None:
    """Preset voices, OpenAI's names and voices made by a recording or a description are not looked up."""
    assert saved_voice_name(_ask(**fields), CATALOG, LARGE) is None


@pytest.mark.parametrize(
    ("name", "language"),
    [(None, "auto"), ("Auto", "auto"), ("English", "english"), ("en_GB", "english"), ("ZH-cn", "chinese")],
)
def test_language(name: str | None, language: str) -> None:
    """Names, codes and auto, in any case."""
    assert resolve(_ask(language=name), CATALOG, LARGE).language == language


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        *[(None, None), (0, 0.0), (-1, -1.0), ("-1", -1.0), ("5m", 300.0), ("1.5h", 5400.0), ("90", 90.0), (2.5, 2.5)],
        *[("1h30m", 5400.0), ("5m0s", 300.0), ("-1m", -1.0), ("1m1.5s", 61.5), ("0", 0.0), ("250ms", 0.25)],
    ],
)
def test_keep_alive(given: float | str | None, seconds: float | None) -> None:
    """Numbers are seconds, strings may have units, and a negative value means for ever."""
    assert keep_alive_s(given) == seconds


@pytest.mark.parametrize("given", ["", "5 minutes", "m", "1e3", 31_536_001, "9000h", "1h30", "-"])
def test_invalid_keep_alive(given: float | str) -> None:
    """Other strings, and more than a year, are errors."""
    with pytest.raises(ApiError):
        keep_alive_s(given)


@pytest.mark.parametrize("given", [1_000_000_000, "9000h"])
def test_keep_alive_of_more_than_a_year(given: float | str) -> None:
    """The message has the limit, and says that -1 means for ever."""
    with pytest.raises(ApiError, match=r"at most 31536000 seconds.*-1"):
        keep_alive_s(given)


@pytest.mark.parametrize("text", ["   ", "\n\t", "\u200b\u200d", "\x01\x02", "a\0b", "x" * 11])
def test_wrong_input(text: str) -> None:
    """White space, invisible characters, null characters and too long texts are errors."""
    with pytest.raises(ApiError) as caught:
        check_input(text, 10)
    assert caught.value.param == "input"


@pytest.mark.parametrize("text", ["x" * 10, "é", "你好", "👋", "---\n", "…", " a\n"])
def test_visible_input(text: str) -> None:
    """One visible character is enough; it may be one that no engine speaks."""
    check_input(text, 10)


@pytest.mark.parametrize(
    ("default", "fields", "ignored"),
    [
        (ESPEAK, {"instructions": "softly"}, ("instructions",)),
        (ESPEAK, {"instructions": "softly", "model": "gpt-4o-mini-tts"}, ("instructions",)),
        (LARGE, {"instructions": "softly", "model": ESPEAK}, ("instructions",)),
        (LARGE, {"instructions": "softly", "model": "TTS-1"}, ("instructions",)),
        (SMALL, {"instructions": "softly", "model": "tts-1-1106"}, ("instructions",)),
        (LARGE, {"instructions": "softly", "model": "tts-1-hd", **CLONE}, ("instructions",)),
        (
            LARGE,
            {"instructions": "softly", "voice": "gateway-default", "model": "tts-1", **CLONE},
            ("voice", "instructions"),
        ),
        (LARGE, {"voice": "gateway-default", **CLONE}, ("voice",)),
        (ESPEAK, {"voice": "gateway-default", "model": SMALL_BASE, **CLONE}, ("voice",)),
        (LARGE, {"voice": {"id": "a label"}, **CLONE}, ("voice",)),
        (LARGE, {"voice": "alloy", **CLONE}, ()),
        (LARGE, {"instructions": " ", "model": SMALL}, ()),
        (LARGE, {"instructions": "softly", "model": "tts-1-hd"}, ()),
        (LARGE, {}, ()),
    ],
)
def test_ignored_fields(default: str, fields: dict[str, Any], ignored: tuple[str, ...]) -> None:
    """Instructions count as ignored where OpenAI ignores them and the model cannot follow, and a label is no voice."""
    resolved = resolve(msgspec.convert({"input": "hello"} | fields, SpeechRequest), CATALOG, default)
    assert resolved.ignored == ignored
    assert not resolved.instructions or "instructions" not in ignored


def test_instructions_that_can_be_followed() -> None:
    """tts-1-hd of Qwen3-TTS follows instructions, although OpenAI's does not."""
    assert resolve(_ask(model="tts-1-hd", instructions=" softly "), CATALOG, LARGE).instructions == "softly"


@pytest.mark.parametrize(
    ("default", "fields", "voice"), [(ESPEAK, {}, "en-us+f2"), (LARGE, {}, "ryan"), (ESPEAK, {"model": SMALL}, "ryan")]
)
def test_an_unknown_voice_may_mean_the_first(default: str, fields: dict[str, Any], voice: str) -> None:
    """With TTS_UNKNOWN_VOICE=default the model's first voice speaks, and the voice counts as ignored."""
    resolved = resolve(_ask(voice="af_sky", **fields), CATALOG, default, unknown_voice="default")
    assert (resolved.voice, resolved.ignored) == (voice, ("voice",))


def test_a_base_model_has_no_first_voice() -> None:
    """TTS_UNKNOWN_VOICE=default finds no voice for a model that speaks with saved voices alone."""
    with pytest.raises(ApiError, match="saved voices"):
        resolve(_ask(voice="af_sky", model=BASE), CATALOG, LARGE, unknown_voice="default")


@pytest.mark.parametrize(
    ("name", "meant"), [("kokoro", "tts-1"), ("Kokoro", "tts-1"), ("TTS-1", LARGE), ("tts-1-hd", "tts-1-hd")]
)
def test_aliases_of_models(name: str, meant: str) -> None:
    """An alias counts in any case, and may replace one of OpenAI's names."""
    assert unaliased(name, {"kokoro": "tts-1", "tts-1": LARGE}) == meant


def test_openai_names() -> None:
    """OpenAI's names stand for the default model, also where a single model is looked up."""
    assert resolve_model("tts-1", CATALOG, LARGE).id == SMALL
