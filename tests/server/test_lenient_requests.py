"""Lenient requests over HTTP: a template's empty field, a number in quotes or a value's case cost nobody the speech."""

import json
from typing import Any, Final

import httpx
import msgspec
import pytest
import pytest_asyncio

from shared.protocol import Action, Call, CloneVoice, DesignVoice, Reply, SavedVoice, Segment, Speak
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, VOICES, Serve

LARGE: Final = "qwen3-tts-1.7b-customvoice"
SMALL: Final = "qwen3-tts-0.6b-customvoice"
SAVED: Final = SavedVoice(id="v1", name="Grandma", kind="clone", created_at=7, seconds=3.0, in_context=True)

pytestmark = SHARED_LOOP


@pytest_asyncio.fixture(loop_scope="session")
async def client(serve: Serve, worker: FakeWorker) -> httpx.AsyncClient:
    """A client of a service whose default model is Qwen3-TTS, with aliases of models."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model=LARGE)
    return await serve(model_aliases={"Kokoro": "tts-1", "tts-1-hd": "espeak-ng", "piper": "espeak-ng"})


CASES: Final[list[tuple[dict[str, Any], dict[str, Any]]]] = [
    ({}, {"model": LARGE, "voice": "ryan", "language": "auto", "instructions": ""}),
    ({"ref_text": ""}, {"model": LARGE, "reference_text": None}),
    ({"ref_audio": "", "ref_text": ""}, {"model": LARGE, "task": "CustomVoice"}),
    ({"model": ""}, {"model": LARGE}),
    ({"model": "  "}, {"model": LARGE}),
    ({"model": " TTS-1 "}, {"model": SMALL}),
    ({"model": f" {SMALL.upper()}\n"}, {"model": SMALL}),
    ({"model": " Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice "}, {"model": SMALL}),
    ({"model": "KOKORO "}, {"model": SMALL}),
    ({"model": "tts-1-hd"}, {"model": "espeak-ng", "voice": "en-us+f2"}),
    ({"model": "Piper", "voice": "EMMA"}, {"model": "espeak-ng", "voice": "en-us+f2"}),
    ({"voice": ""}, {"voice": "ryan"}),
    ({"voice": " Alloy "}, {"voice": "ryan"}),
    ({"voice": "alloy\n"}, {"voice": "ryan"}),
    ({"voice": {"id": "\tVIVIAN "}}, {"voice": "vivian"}),
    ({"speaker": " Vivian "}, {"voice": "vivian"}),
    ({"voice": " Grandma "}, {"voice": "v1", "saved_voice": True}),
    ({"language": ""}, {"language": "auto"}),
    ({"language": " EN_us "}, {"language": "english"}),
    ({"language": " AUTO "}, {"language": "auto"}),
    ({"task_type": "customvoice"}, {"task": "CustomVoice"}),
    ({"task_type": ""}, {"task": "CustomVoice"}),
    ({"instructions": " "}, {"instructions": ""}),
    ({"instructions": "", "instruct": "softly"}, {"instructions": "softly"}),
    ({"model": "kokoro", "instructions": "softly"}, {"instructions": "", "model": SMALL}),
    ({"non_streaming_mode": "false"}, {"non_streaming_mode": False}),
    ({"x_vector_only_mode": "False"}, {"x_vector_only": False}),
    ({"keep_alive": ""}, {"keep_alive_s": None}),
    ({"keep_alive": " 5m "}, {"keep_alive_s": 300.0}),
    ({"keep_alive": "60"}, {"keep_alive_s": 60.0}),
    ({"input": "Hi \ud83d"}, {"segments": [Segment(text="Hi \ufffd")]}),
]
SAMPLING: Final[list[tuple[dict[str, Any], dict[str, Any]]]] = [
    ({"seed": -1}, {"seed": None}),
    ({"seed": "-1"}, {"seed": None}),
    ({"seed": 42.0}, {"seed": 42}),
    ({"seed": "42"}, {"seed": 42}),
    ({"seed": ""}, {"seed": None}),
    ({"top_k": 50.0}, {"top_k": 50}),
    ({"top_k": "50.0"}, {"top_k": 50}),
    ({"temperature": "0.7"}, {"temperature": 0.7}),
    ({"temperature": " 0 "}, {"temperature": 0.0}),
    ({"top_p": "1"}, {"top_p": 1.0}),
    ({"repetition_penalty": "1.05"}, {"repetition_penalty": 1.05}),
    ({"max_new_tokens": 100.0}, {"max_new_tokens": 100}),
]


@pytest.mark.parametrize(("fields", "meant"), CASES, ids=[ascii(case[0]) for case in CASES])
async def test_fields(
    client: httpx.AsyncClient, worker: FakeWorker, fields: dict[str, Any], meant: dict[str, Any]
) -> None:
    """The request is spoken, and reaches the worker as it was meant."""
    worker.saved.append(SAVED)
    answer = await client.post(SPEECH, content=json.dumps({"input": "hello"} | fields))
    assert answer.status_code == 200, answer.text
    [speak] = worker.of(Speak)
    assert {name: getattr(speak, name) for name in meant} == meant


@pytest.mark.parametrize(("fields", "meant"), SAMPLING, ids=[str(case[0]) for case in SAMPLING])
async def test_sampling(
    client: httpx.AsyncClient, worker: FakeWorker, fields: dict[str, Any], meant: dict[str, Any]
) -> None:
    """Sampling parameters reach the worker as numbers."""
    answer = await client.post(SPEECH, json={"input": "hello"} | fields)
    assert answer.status_code == 200, answer.text
    [speak] = worker.of(Speak)
    assert {name: getattr(speak.sampling, name) for name in meant} == meant


@pytest.mark.parametrize(
    ("fields", "content_type"),
    [
        ({"response_format": "MP3"}, "audio/mpeg"),
        ({"response_format": " Wav "}, "audio/wav"),
        ({"response_format": ""}, "audio/mpeg"),
        ({"stream_format": ""}, "audio/mpeg"),
        ({"stream_format": "SSE"}, "text/event-stream"),
        ({"stream": "true", "speed": "1.0"}, "audio/mpeg"),
    ],
)
async def test_the_answer(client: httpx.AsyncClient, fields: dict[str, Any], content_type: str) -> None:
    """The fields that shape the answer are read as leniently."""
    answer = await client.post(SPEECH, json={"input": "hello"} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].partition(";")[0] == content_type


async def test_a_whole_body_by_a_string(client: httpx.AsyncClient) -> None:
    """`"stream": "False"` is a whole body."""
    answer = await client.post(SPEECH, json={"input": "hello", "stream": "False"})
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain; charset=utf-8"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": ""},
        {"content-type": 'Application/JSON; Charset="UTF-8"'},
    ],
)
async def test_media_types(client: httpx.AsyncClient, worker: FakeWorker, headers: dict[str, str]) -> None:
    """JSON is JSON under these types too."""
    body = '{"input": "Perché"}'.encode()
    assert (await client.post(SPEECH, content=body, headers=headers)).status_code == 200
    assert worker.of(Speak)[0].segments[0].text == "Perché"


async def test_a_declared_charset(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """With its charset ISO-8859-1 is understood; without, the message says what to do."""
    body = '{"input": "Perché"}'.encode("latin-1")
    declared = {"content-type": "application/json; charset=iso-8859-1"}
    assert (await client.post(SPEECH, content=body, headers=declared)).status_code == 200
    assert worker.of(Speak)[0].segments[0].text == "Perché"
    refused = await client.post(SPEECH, content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert "PowerShell 5.1" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"model": "tts-1", "instructions": "softly"}, "instructions"),
        ({"model": "piper", "instructions": "softly"}, "instructions"),
        ({"model": LARGE, "instructions": "softly"}, None),
        ({}, None),
    ],
)
async def test_ignored_fields(client: httpx.AsyncClient, fields: dict[str, Any], ignored: str | None) -> None:
    """The header x-ignored names the fields without an effect, in a stream as well as in a whole body."""
    for stream in (True, False):
        answer = await client.post(SPEECH, json={"input": "hello", "stream": stream} | fields)
        assert answer.headers.get("x-ignored") == ignored


async def test_an_unknown_voice(serve: Serve, worker: FakeWorker, client: httpx.AsyncClient) -> None:
    """An unknown voice is refused, unless TTS_UNKNOWN_VOICE=default: then the first voice speaks."""
    body = {"input": "hello", "voice": "af_sky"}
    refused = await client.post(SPEECH, json=body)
    assert refused.json()["error"]["code"] == "voice_not_found"
    lenient = await serve(unknown_voice="default")
    answer = await lenient.post(SPEECH, json=body)
    assert (answer.status_code, answer.headers["x-ignored"]) == (200, "voice")
    assert worker.of(Speak)[0].voice == "ryan"


async def test_aliases_elsewhere(client: httpx.AsyncClient) -> None:
    """An alias finds its model in every list, and stands among its names."""
    models = {model["id"]: model["aliases"] for model in (await client.get("/v1/models")).json()["data"]}
    assert {"Kokoro", "tts-1"} <= set(models[SMALL])
    assert {"piper", "tts-1-hd"} <= set(models["espeak-ng"])
    assert "tts-1-hd" not in models[LARGE]
    assert (await client.get("/v1/models/PIPER%20")).json()["id"] == "espeak-ng"
    assert (await client.get(f"{VOICES}/%20Vivian%20")).json()["id"] == "vivian"
    voices = (await client.get(VOICES, params={"model": " piper "})).json()["voices"]
    assert {voice["model"] for voice in voices} == {"espeak-ng"}
    everything = (await client.get(VOICES, params={"model": ""})).json()
    assert everything == (await client.get(VOICES)).json()


DESIGN: Final = DesignVoice(name="Ada", prompt="calm")
CLONE: Final = CloneVoice(name="Ada")
VOICE_CASES: Final[list[tuple[dict[str, str], Action]]] = [
    ({"type": "prompt", "prompt": "calm"}, DESIGN),
    ({"type": " Prompt ", "prompt": "calm", "consent": "", "ref_text": "", "audio_sample": ""}, DESIGN),
    ({"type": "PROMPT", "prompt": "calm", "model": "auto", "script_hint": "", "unknown": "x"}, DESIGN),
    ({"type": "prompt", "prompt": "calm", "name": " Ada\n"}, DESIGN),
    ({"type": "prompt", "prompt": "calm", "description": " "}, DESIGN),
    ({}, CLONE),
    ({"type": ""}, CLONE),
    ({"type": "clone"}, CLONE),
    ({"type": "Audio_Sample", "prompt": "", "model": ""}, CLONE),
    ({"ref_text": " "}, CLONE),
    ({"ref_text": "\u200b"}, CLONE),
    ({"ref_text": "…"}, CLONE),
    ({"ref_text": " la la "}, msgspec.structs.replace(CLONE, text="la la")),
    ({"consent": " cons_1 "}, msgspec.structs.replace(CLONE, consent="cons_1")),
]


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(("fields", "action"), VOICE_CASES, ids=[str(case[0]) for case in VOICE_CASES])
async def test_forms_of_voices(
    client: httpx.AsyncClient, worker: FakeWorker, fields: dict[str, str], action: Action
) -> None:
    """A form is read as leniently as JSON, and its two types are OpenAI's."""
    worker.on_call = lambda call, _payload: Reply(id=call.id, voice=SAVED)
    parts: dict[str, Any] = {name: (None, value) for name, value in ({"name": "Ada"} | fields).items()}
    if isinstance(action, CloneVoice):
        parts["audio_sample"] = ("a.wav", b"a recording", "audio/wav")
    answer = await client.post(VOICES, files=parts)
    assert answer.status_code == 200, answer.text
    assert worker.of(Call)[-1].action == action


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "application/json"}, {"content-type": ""}, {"content-type": "text/plain; charset=iso-8859-1"}],
)
async def test_a_voice_designed_from_json(
    client: httpx.AsyncClient, worker: FakeWorker, headers: dict[str, str]
) -> None:
    """JSON designs a voice as a form does."""
    worker.on_call = lambda call, _payload: Reply(id=call.id, voice=SAVED)
    charset = "latin-1" if "iso" in headers["content-type"] else "utf-8"
    body = '{"type": "Prompt", "name": " Zoé ", "prompt": "calm", "script_hint": null}'.encode(charset)
    answer = await client.post(VOICES, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert worker.of(Call)[-1].action == DesignVoice(name="Zoé", prompt="calm")
