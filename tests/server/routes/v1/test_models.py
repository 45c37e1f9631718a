"""GET /v1/models and /v1/audio/models."""

import httpx
import msgspec
import pytest

from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP

pytestmark = SHARED_LOOP

HUB = "Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/audio/models"])
async def test_list(client: httpx.AsyncClient, worker: FakeWorker, path: str) -> None:
    """OpenAI's list and Open WebUI's list, with the state of each model."""
    answer = (await client.get(path)).json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["models"]] == [spec.id for spec in worker.catalog]
    espeak = answer["data"][0]
    assert espeak["object"] == "model"
    assert espeak["state"] == "resident"
    assert espeak["task"] == "CustomVoice"
    assert {"tts-1", "tts-1-hd", "gpt-4o-mini-tts", "espeak"} == set(espeak["aliases"])
    assert "english" in espeak["languages"]
    assert len(espeak["voices"]) >= 20


@pytest.mark.parametrize("name", ["qwen3-tts-1.7b-customvoice", HUB, HUB.lower(), HUB.replace("/", "%2F")])
@pytest.mark.parametrize("prefix", ["/v1/models/", "/v1/audio/models/"])
async def test_one_model(client: httpx.AsyncClient, prefix: str, name: str) -> None:
    """By id or by Hugging Face id, whose slash may be escaped."""
    answer = (await client.get(prefix + name)).json()
    assert answer["id"] == "qwen3-tts-1.7b-customvoice"
    assert (await client.get(prefix + "tts-1")).json()["id"] == "espeak-ng"


@pytest.mark.parametrize("state", ["loading", "resident"])
async def test_the_state_is_fresh(client: httpx.AsyncClient, worker: FakeWorker, state: str) -> None:
    """A client that has just moved a model sees it moved, whichever web worker answers."""
    models = [msgspec.structs.replace(model, state=state) for model in worker.snapshot.models]
    worker.snapshot = msgspec.structs.replace(worker.snapshot, models=models)
    assert {model["state"] for model in (await client.get("/v1/models")).json()["data"]} == {state}
