"""/admin/cache: the figures of the caches, and their emptying."""

from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from server.text import load_pronunciations
from shared.protocol import CacheStats, Call, EmptyCache, Failed, Reply
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, Serve, becomes

pytestmark = SHARED_LOOP

PROMPTS = CacheStats(name="prompts", model="m", entries=3, bytes=300, hits=7, misses=4)


def _obey(worker: FakeWorker) -> None:
    """Let the worker do as a real one does, which tells all web workers."""

    def on_call(call: Call, _payload: bytes | None) -> Reply | Failed:
        assert isinstance(call.action, EmptyCache)
        name, emptied = call.action.name, worker.snapshot.emptied
        more = {**emptied, name: emptied.get(name, 0) + 1}
        worker.snapshot = msgspec.structs.replace(worker.snapshot, emptied=more)
        return Reply(id=call.id)

    worker.on_call = on_call


async def _caches(client: httpx.AsyncClient, **headers: str) -> dict[str, dict[str, Any]]:
    """The caches by name."""
    answer = await client.get("/admin/cache", headers=headers)
    return {cache["name"]: cache for cache in answer.json()["caches"]}


async def test_figures(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Those of the worker as it reports them, and our own with what all web workers have counted."""
    worker.snapshot = msgspec.structs.replace(worker.snapshot, caches=[PROMPTS])
    for _ in range(2):
        await client.get("/v1/audio/voices")
    caches = await _caches(client)
    assert caches.keys() == {"prompts", "catalog", "pronunciations", "stored_audio"}
    assert caches["prompts"] == msgspec.to_builtins(PROMPTS)
    assert caches["catalog"]["entries"] == len(worker.catalog)
    assert caches["catalog"]["bytes"] > 1_000
    assert caches["catalog"]["hits"] > 0
    assert caches["pronunciations"]["bytes"] is None


@pytest.mark.parametrize("name", ["references", "prompts", "tokens", "recordings"])
async def test_caches_of_the_worker(client: httpx.AsyncClient, worker: FakeWorker, name: str) -> None:
    """The worker empties them; the answer says what was in there."""
    _obey(worker)
    worker.snapshot = msgspec.structs.replace(worker.snapshot, caches=[PROMPTS])
    answer = await client.delete(f"/admin/cache/{name}")
    assert answer.status_code == 200
    assert answer.json() == {"caches": [msgspec.to_builtins(PROMPTS)] if name == "prompts" else []}
    assert [call.action for call in worker.of(Call)] == [EmptyCache(name=name)]  # type: ignore[arg-type]


async def test_stored_audio(serve: Serve, worker: FakeWorker, tmp_path: Path) -> None:
    """Hits and misses are counted, and all of the audio goes."""
    client = await serve(audio_store_dir=tmp_path / "audio")
    answer = await client.post(SPEECH, json={"input": "hello", "store": True, "stream": False})
    url = answer.headers["x-audio-url"]
    assert (await client.get(url)).status_code == 200
    assert (await client.get("/v1/audio/speech/00000000000000000000000000000000/audio")).status_code == 404
    stored = (await _caches(client))["stored_audio"]
    assert (stored["entries"], stored["hits"], stored["misses"]) == (1, 1, 1)
    assert stored["bytes"] >= len(answer.content)
    assert (await client.delete("/admin/cache/stored_audio")).json() == {"caches": [stored]}
    assert (await client.get(url)).status_code == 404
    assert (await _caches(client))["stored_audio"]["entries"] == 0
    assert not worker.of(Call)


async def test_pronunciations(serve: Serve, worker: FakeWorker, tmp_path: Path) -> None:
    """The file is read again; one that cannot be used is refused, and the old words stay."""
    _obey(worker)
    path = tmp_path / "words.toml"
    path.write_text('[all]\nnginx = "engine x"\n')
    client = await serve(pronunciations=path)
    assert (await _caches(client))["pronunciations"]["entries"] == 1
    path.write_text("[all\n")
    refused = await client.delete("/admin/cache/pronunciations")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    assert str(path) in refused.json()["error"]["message"]
    assert load_pronunciations(path)["all"].count == 1
    path.write_text('[all]\nnginx = "engine x"\nCaddy = "caddie"\n')
    assert (await client.delete("/admin/cache/pronunciations")).status_code == 200
    assert (await _caches(client))["pronunciations"]["entries"] == 2
    assert load_pronunciations(path)["all"].count == 2


async def test_emptied_by_another_web_worker(serve: Serve, worker: FakeWorker, tmp_path: Path) -> None:
    """Each web worker reads its words again, whichever one was asked; a broken file by then changes nothing."""
    path = tmp_path / "words.toml"
    path.write_text('[all]\nnginx = "engine x"\n')
    client = await serve(pronunciations=path)
    path.write_text("[all\n")
    worker.snapshot = msgspec.structs.replace(worker.snapshot, emptied={"pronunciations": 1})
    assert (await _caches(client))["pronunciations"]["entries"] == 1
    path.write_text('[all]\na = "b"\nc = "d"\n')
    worker.snapshot = msgspec.structs.replace(worker.snapshot, emptied={"pronunciations": 2})
    await becomes(lambda: load_pronunciations(path)["all"].count == 2)
    worker.snapshot = msgspec.structs.replace(worker.snapshot, emptied={})


async def test_unknown(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A cache that does not exist is a client's error that names those that do."""
    answer = await client.delete("/admin/cache/everything")
    assert answer.status_code == 400
    assert "references" in answer.json()["error"]["message"]
    assert not worker.of(Call)


@pytest.mark.parametrize(
    "headers", [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}]
)
async def test_pages_of_other_sites(client: httpx.AsyncClient, worker: FakeWorker, headers: dict[str, str]) -> None:
    """The page of another site can empty nothing, even where no keys are configured."""
    answer = await client.delete("/admin/cache/prompts", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert not worker.of(Call)


async def test_needs_an_admin_key(serve: Serve, worker: FakeWorker) -> None:
    """401 without a key, 403 with one that may only speak."""
    client = await serve(api_keys=["user"], admin_keys=["boss"])
    for key, status in (("", 401), ("user", 403)):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert (await client.get("/admin/cache", headers=headers)).status_code == status
        assert (await client.delete("/admin/cache/prompts", headers=headers)).status_code == status
    assert await _caches(client, authorization="Bearer boss")
    assert not worker.of(Call)
