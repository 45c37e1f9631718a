"""OpenAI's own SDK against /v1/audio/voices and voice_consents, and the facts of the schema that OpenAI publishes."""

import base64
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio

from server.app import create_app
from shared.protocol import (
    Call,
    CloneVoice,
    CreateConsent,
    DeleteConsent,
    DeleteVoice,
    DesignVoice,
    Failed,
    FindConsent,
    FindVoice,
    ListConsents,
    RenameConsent,
    Reply,
    SavedVoice,
    Speak,
    VoiceConsent,
)
from shared.settings import Settings
from tests.audio import tone, wav
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, Serve

pytestmark = SHARED_LOOP

CLONED: Final = SavedVoice(id="voice_1", name="Ada", kind="clone", created_at=7, seconds=3.0, in_context=False)
DESIGNED: Final = SavedVoice(
    id="voice_2", name="Bob", kind="design", created_at=8, seconds=3.0, in_context=True, prompt="calm"
)
RECORDING: Final = ("a.wav", wav(tone(1.2, fade_s=0)), "audio/wav")


class _Consents:
    """The consents of a worker, in memory; the first `number` are there already."""

    def __init__(self, number: int = 0) -> None:
        self._kept: dict[str, VoiceConsent] = {}
        for _ in range(number):
            self._add("Ada", "en")

    def _add(self, name: str, language: str) -> VoiceConsent:
        number = len(self._kept) + 1
        consent = VoiceConsent(id=f"cons_{number}", name=name, language=language, created_at=number)
        self._kept[consent.id] = consent
        return consent

    def answer(self, call: Call, payload: bytes | None) -> Reply | Failed:
        """Answer a call as the worker does."""
        match call.action:
            case CreateConsent(name=name, language=language):
                assert payload
                return Reply(id=call.id, consent=self._add(name, language))
            case ListConsents(limit=limit, after=after):
                newest_first = [*self._kept.values()][::-1]
                ids = [consent.id for consent in newest_first]
                if after and after not in ids:
                    return _no_consent(call)
                rest = newest_first[ids.index(after) + 1 if after else 0 :]
                return Reply(id=call.id, consents=rest[:limit], has_more=len(rest) > limit)
            case FindConsent() | RenameConsent() | DeleteConsent() as action if action.id in self._kept:
                consent = self._kept[action.id]
                if isinstance(action, RenameConsent):
                    consent = self._kept[action.id] = msgspec.structs.replace(consent, name=action.name)
                if isinstance(action, DeleteConsent):
                    del self._kept[action.id]
                return Reply(id=call.id, consent=consent)
            case FindConsent() | RenameConsent() | DeleteConsent():
                return _no_consent(call)
            case _:
                return _answer_voices(call)


def _no_consent(call: Call) -> Failed:
    return Failed(id=call.id, code="consent_not_found", message="there is no such consent", param="consent")


def _answer_voices(call: Call) -> Reply:
    match call.action:
        case DesignVoice():
            return Reply(id=call.id, voice=DESIGNED)
        case CloneVoice() | FindVoice():
            return Reply(id=call.id, voice=CLONED)
        case _:
            return Reply(id=call.id)


@pytest_asyncio.fixture(loop_scope="session")
async def sdk(client: httpx.AsyncClient, worker: FakeWorker) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's SDK with our address. It checks no answer by itself, so the tests compare types."""
    worker.on_call = _Consents().answer
    async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("given", [{}, {"type": "audio_sample"}], ids=["without a type", "with a type"])
async def test_a_cloned_voice(sdk: openai.AsyncOpenAI, worker: FakeWorker, given: Any) -> None:
    """voices.create with a recording, whose type may be left out."""
    voice = await sdk.audio.voices.create(name="Ada", audio_sample=RECORDING, consent="cons_1", **given)
    assert (voice.id, voice.name, voice.created_at) == ("voice_1", "Ada", 7)
    assert (voice.object, voice.type) == ("audio.voice", "audio_sample")
    assert "prompt" not in voice.model_fields_set
    assert worker.of(Call)[0].action == CloneVoice(name="Ada", consent="cons_1")


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}], ids=["multipart", "JSON"])
async def test_a_designed_voice(sdk: openai.AsyncOpenAI, worker: FakeWorker, headers: dict[str, str]) -> None:
    """voices.create with a prompt, as a form and as JSON."""
    script = "Good morning to all of you."
    voice = await sdk.audio.voices.create(
        name="Bob", type="prompt", prompt="calm", model="auto", script_hint=script, extra_headers=headers
    )
    assert (voice.object, voice.type, voice.prompt) == ("audio.voice", "prompt", "calm")
    assert worker.of(Call)[0].action == DesignVoice(name="Bob", prompt="calm", script=script)


async def test_delete(sdk: openai.AsyncOpenAI, worker: FakeWorker) -> None:
    """voices.delete."""
    deleted = await sdk.audio.voices.delete("voice_1")
    assert (deleted.id, deleted.object, deleted.deleted) == ("voice_1", "audio.voice.deleted", True)
    assert worker.of(Call)[-1].action == DeleteVoice(id="voice_1")


async def test_consents(sdk: openai.AsyncOpenAI) -> None:
    """A consent from its creation to its deletion."""
    consents = sdk.audio.voice_consents
    made = await consents.create(name=" Ada ", language="en-US", recording=RECORDING)
    assert (made.name, made.language, made.object) == ("Ada", "en-US", "audio.voice_consent")
    assert await consents.retrieve(made.id) == made
    renamed = await consents.update(made.id, name="Eva")
    assert (renamed.id, renamed.name) == (made.id, "Eva")
    assert (await consents.list()).data == [renamed]
    deleted = await consents.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "audio.voice_consent", True)
    assert (await consents.list()).data == []
    for gone in (consents.retrieve(made.id), consents.update(made.id, name="x"), consents.delete(made.id)):
        with pytest.raises(openai.NotFoundError) as caught:
            await gone
        assert caught.value.code == "consent_not_found"


async def test_pages_of_consents(sdk: openai.AsyncOpenAI, worker: FakeWorker) -> None:
    """The SDK walks through all pages by itself, and each page says whether there is another."""
    consents = sdk.audio.voice_consents
    worker.on_call = _Consents(5).answer
    walked = [consent.id async for consent in consents.list(limit=2)]
    assert walked == ["cons_5", "cons_4", "cons_3", "cons_2", "cons_1"]
    page = await consents.list(limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    last = await consents.list(limit=2, after="cons_2")
    assert ([consent.id for consent in last.data], last.has_more) == (["cons_1"], False)
    for limit in (0, 101):
        with pytest.raises(openai.BadRequestError) as caught:
            await consents.list(limit=limit)
        assert caught.value.param == "limit"
    with pytest.raises(openai.BadRequestError) as caught:
        await consents.list(after="cons_none")
    assert caught.value.param == "after"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": " "}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"language": ""}, "language"),
        ({"language": "English (US)"}, "language"),
        ({"language": "x" * 300}, "language"),
        ({"recording": ("a.wav", wav(tone(0.2, fade_s=0)))}, "recording"),
    ],
)
async def test_bad_consents(sdk: openai.AsyncOpenAI, fields: dict[str, Any], param: str) -> None:
    """The error names the field."""
    form: dict[str, Any] = {"name": "Ada", "language": "en", "recording": RECORDING} | fields
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.audio.voice_consents.create(**form)
    assert caught.value.param == param


async def test_consents_without_a_form(client: httpx.AsyncClient, sdk: openai.AsyncOpenAI) -> None:
    """A consent needs a file, and an update a name."""
    _ = sdk
    path = "/v1/audio/voice_consents"
    missing = await client.post(path, json={"name": "Ada", "language": "en"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "recording")
    assert (await client.post(path, content=b"x", headers={"content-type": "text/html"})).status_code == 415
    assert (await client.post(f"{path}/cons_1", json={"name": ""})).json()["error"]["param"] == "name"
    large = {"recording": ("a.wav", b"x" * (10 * 2**20 + 1))}
    assert (await client.post(path, data={"name": "Ada", "language": "en"}, files=large)).status_code == 413


@pytest.mark.usefixtures("no_decoding")
async def test_required_consents(serve: Serve, worker: FakeWorker) -> None:
    """With TTS_REQUIRE_CONSENT=true a voice is cloned only with the id of a consent, saved or in one request."""
    worker.on_call = _Consents(1).answer
    worker.snapshot = msgspec.structs.replace(worker.snapshot, default_model="qwen3-tts-1.7b-customvoice")
    client = await serve(require_consent=True)
    async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as sdk:
        for consent, code in (("", "invalid_value"), ("she agreed", "consent_not_found")):
            with pytest.raises(openai.BadRequestError) as caught:
                await sdk.audio.voices.create(name="Ada", audio_sample=RECORDING, consent=consent)
            assert (caught.value.code, caught.value.param) == (code, "consent")
        assert (await sdk.audio.voices.create(name="Ada", audio_sample=RECORDING, consent="cons_1")).id == "voice_1"
        assert (await sdk.audio.voices.create(name="Bob", type="prompt", prompt="calm")).id == "voice_2"
    clone = {"input": "hi", "ref_audio": base64.b64encode(RECORDING[1]).decode(), "ref_text": "la"}
    for consent, status in ((None, 400), ("cons_9", 400), ("cons_1", 200)):
        answer = await client.post(SPEECH, json=clone | {"consent": consent})
        assert answer.status_code == status, answer.text
    assert len(worker.of(Speak)) == 1
    assert (await client.post(SPEECH, json={"input": "hi"})).status_code == 200


@pytest.fixture(scope="module")
def document() -> Any:
    """Our OpenAPI document."""
    return create_app(Settings(worker_url="ipc:///nowhere")).app.openapi_schema.to_schema()


def _schema(document: Any, node: Any) -> Any:
    return document["components"]["schemas"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


CONSENT_FIELDS: Final = {"name", "language", "recording"}
CONSENT: Final = {
    "id": "string",
    "name": "string",
    "language": "string",
    "created_at": "integer",
    "object": "audio.voice_consent",
}
FORM: Final = "multipart/form-data"
JSON: Final = "application/json"
BODIES: Final[list[tuple[str, str, str, set[str], set[str]]]] = [
    # path, method, media type, required fields, all fields
    ("/v1/audio/voices", "post", FORM, {"name"}, {"name", "type", "audio_sample", "consent", "prompt"}),
    ("/v1/audio/voices", "post", JSON, {"name"}, {"name", "type", "prompt", "model", "script_hint"}),
    ("/v1/audio/voice_consents", "post", FORM, CONSENT_FIELDS, CONSENT_FIELDS),
    ("/v1/audio/voice_consents/{consent_id}", "post", JSON, {"name"}, {"name"}),
]
ANSWERS: Final[list[tuple[str, str, dict[str, str], set[str]]]] = [
    # path, method, types of the required fields, optional fields
    (
        "/v1/audio/voices",
        "post",
        {"id": "string", "name": "string", "created_at": "integer", "object": "audio.voice", "type": "string"},
        {"prompt"},
    ),
    (
        "/v1/audio/voices/{voice_id}",
        "delete",
        {"id": "string", "deleted": "boolean", "object": "audio.voice.deleted"},
        set(),
    ),
    ("/v1/audio/voice_consents", "post", CONSENT, set()),
    ("/v1/audio/voice_consents", "get", {"object": "list", "data": "array", "has_more": "boolean"}, set()),
    ("/v1/audio/voice_consents/{consent_id}", "get", CONSENT, set()),
    ("/v1/audio/voice_consents/{consent_id}", "post", CONSENT, set()),
    (
        "/v1/audio/voice_consents/{consent_id}",
        "delete",
        {"id": "string", "deleted": "boolean", "object": "audio.voice_consent"},
        set(),
    ),
]
"""OpenAI's published schema of these paths."""


@pytest.mark.parametrize(("path", "method", "media_type", "required", "fields"), BODIES)
async def test_bodies(
    document: Any, path: str, method: str, *, media_type: str, required: set[str], fields: set[str]
) -> None:
    """We require no more than OpenAI does, and take every field."""
    schema = _schema(document, document["paths"][path][method]["requestBody"]["content"][media_type]["schema"])
    assert set(schema["required"]) <= required
    assert fields <= set(schema["properties"])


@pytest.mark.parametrize(("path", "method", "required", "optional"), ANSWERS)
async def test_answers(document: Any, path: str, method: str, required: dict[str, str], optional: set[str]) -> None:
    """We give every field that OpenAI gives, with its type."""
    content = document["paths"][path][method]["responses"]["200"]["content"]
    schema = _schema(document, content[JSON]["schema"])
    for name, kind in required.items():
        field = schema["properties"][name]
        assert kind in (field.get("type"), field.get("const"))
        assert name in schema["required"] or "const" in field or "default" in field
    assert optional <= set(schema["properties"]) - set(schema["required"])


async def test_types_of_voices(document: Any) -> None:
    """A voice has one of OpenAI's two types."""
    kinds = document["components"]["schemas"]["SavedVoiceObject"]["properties"]["type"]["enum"]
    assert set(kinds) == {"audio_sample", "prompt"}


async def test_pages_of_the_list(document: Any) -> None:
    """A page of consents has from 1 to 100, 20 by default, and begins behind `after`."""
    parameters = {p["name"]: p for p in document["paths"]["/v1/audio/voice_consents"]["get"]["parameters"]}
    assert parameters.keys() == {"after", "limit"}
    limit = parameters["limit"]["schema"]
    assert (limit["minimum"], limit["maximum"], limit["default"]) == (1, 100, 20)
    assert not any(parameter.get("required") for parameter in parameters.values())
