"""OpenAI's own SDK against /v1/audio/voices, and our schema against the facts of the one that OpenAI publishes."""

from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
import openai
import pytest
import pytest_asyncio

from server.app import create_app
from shared.protocol import Call, CloneVoice, DeleteVoice, DesignVoice, FindVoice, Reply, SavedVoice
from shared.settings import Settings
from tests.audio import tone, wav
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP

pytestmark = SHARED_LOOP

CLONED: Final = SavedVoice(id="voice_1", name="Ada", kind="clone", created_at=7, seconds=3.0, in_context=False)
DESIGNED: Final = SavedVoice(
    id="voice_2", name="Bob", kind="design", created_at=8, seconds=3.0, in_context=True, prompt="calm"
)
RECORDING: Final = ("a.wav", wav(tone(1.2, fade_s=0)), "audio/wav")


def _answer(call: Call, _payload: bytes | None) -> Reply:
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
    worker.on_call = _answer
    async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


async def test_a_cloned_voice(sdk: openai.AsyncOpenAI, worker: FakeWorker) -> None:
    """voices.create with a recording, whose type may be left out."""
    voice = await sdk.audio.voices.create(name="Ada", audio_sample=RECORDING, consent="cons_1")
    assert voice == await sdk.audio.voices.create(
        name="Ada", audio_sample=RECORDING, consent="cons_1", type="audio_sample"
    )
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


@pytest.fixture(scope="module")
def document() -> Any:
    """Our OpenAPI document."""
    return create_app(Settings(worker_url="ipc:///nowhere")).app.openapi_schema.to_schema()


def _schema(document: Any, node: Any) -> Any:
    return document["components"]["schemas"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


FORM: Final = "multipart/form-data"
JSON: Final = "application/json"
BODIES: Final[list[tuple[str, str, str, set[str], set[str]]]] = [
    # path, method, media type, required fields, all fields
    ("/v1/audio/voices", "post", FORM, {"name"}, {"name", "type", "audio_sample", "consent", "prompt"}),
    ("/v1/audio/voices", "post", JSON, {"name"}, {"name", "type", "prompt", "model", "script_hint"}),
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
]
"""What OpenAI's published schema says of these paths."""


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
