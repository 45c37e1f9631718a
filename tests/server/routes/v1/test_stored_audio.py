"""`store: true` and GET /v1/audio/speech/{id}/audio: what players ask for, and who may ask."""

import asyncio
import io
import wave
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import soundfile
import structlog

from shared.protocol import Cancel, Failed
from tests.fakes import FakeWorker, tone
from tests.server.running import SHARED_LOOP, SPEECH, Serve

pytestmark = SHARED_LOOP

PCM = b"".join(tone("hello", 3))
FORMS: list[dict[str, Any]] = [{}, {"stream": False}, {"stream_format": "sse"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the store."""
    return tmp_path_factory.mktemp("audio") / "store"


@pytest_asyncio.fixture(loop_scope="session")
async def keeping(serve: Serve, folder: Path) -> httpx.AsyncClient:
    """A client of an application that stores audio in `folder`."""
    return await serve(audio_store_dir=folder)


def names(folder: Path) -> set[str]:
    """The files in `folder`."""
    return {path.name for path in folder.iterdir()}


async def stored(client: httpx.AsyncClient, **fields: Any) -> str:
    """Speak, and keep it; the path of the audio."""
    answer = await client.post(SPEECH, json={"input": "hello", "store": True, **fields})
    assert answer.status_code == 200
    return answer.headers["x-audio-url"]


@pytest.mark.parametrize("form", FORMS)
async def test_the_audio_is_there_at_the_end(keeping: httpx.AsyncClient, form: dict[str, Any]) -> None:
    """Whole, streamed or as events: as soon as the client has all of it. A path below the server's root."""
    path = await stored(keeping, response_format="pcm", **form)
    assert path.startswith("/v1/audio/speech/")
    answer = await keeping.get(path)
    assert answer.status_code == 200
    assert answer.content == PCM
    headers = answer.headers
    assert headers["content-length"] == str(len(PCM))
    assert (headers["accept-ranges"], headers["content-type"], headers["x-sample-rate"]) == (
        "bytes",
        "audio/pcm",
        "24000",
    )
    assert headers["cache-control"].startswith("private, max-age=3")


async def test_a_cache_tells_players_and_scripts_apart(serve: Serve, folder: Path) -> None:
    """A browser's cache must not give a script of another site what a player of that site has got without CORS."""
    client = await serve(cors_origins=["http://good.example"], audio_store_dir=folder)
    path = await stored(client, response_format="pcm")
    for headers in ({}, {"origin": "http://good.example"}, {"range": "bytes=0-1"}):
        answer = await client.get(path, headers=headers)
        assert answer.headers["vary"] == "Origin"


async def test_a_stream_is_stored_as_a_whole_file(keeping: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The header of the stored file has the true length, which that of the stream cannot have."""
    worker.chunks = 20
    data = (await keeping.get(await stored(keeping, response_format="wav"))).content
    with wave.open(io.BytesIO(data)) as sound:
        assert sound.getnframes() == 20 * 1920
    data = (await keeping.get(await stored(keeping, response_format="flac", sample_rate=16_000))).content
    assert soundfile.info(io.BytesIO(data)).frames == 20 * 1280
    data = (await keeping.get(await stored(keeping, response_format="wav", speed=2.0))).content
    assert len(data) == pytest.approx(10 * 3840, rel=0.05)


async def test_ranges(keeping: httpx.AsyncClient) -> None:
    """One range is a 206; a range behind the end is a 416 with the size; several are answered with all."""
    path = await stored(keeping, response_format="pcm")
    size = len(PCM)

    async def ask(asked: str, **headers: str) -> httpx.Response:
        return await keeping.get(path, headers={"range": asked, **headers})

    part = await ask("bytes=0-1")
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, PCM[:2], f"bytes 0-1/{size}")
    assert part.headers["content-length"] == "2"
    part = await ask("bytes=-100")
    assert (part.status_code, part.content) == (206, PCM[-100:])
    part = await ask("bytes=7000-")
    assert (part.status_code, part.content) == (206, PCM[7000:])
    refused = await ask(f"bytes={size}-")
    assert (refused.status_code, refused.headers["content-range"]) == (416, f"bytes */{size}")
    assert refused.json()["error"]["code"] == "range_not_satisfiable"
    assert (await ask("bytes=0-1,4-5")).content == PCM
    etag = part.headers["etag"]
    assert (await ask("bytes=0-1", **{"if-range": etag})).status_code == 206
    assert (await ask("bytes=0-1", **{"if-range": '"other"'})).content == PCM
    assert (await keeping.get(path, headers={"if-none-match": etag})).status_code == 304


async def test_head(keeping: httpx.AsyncClient) -> None:
    """The headers of the whole, also if a range is asked for."""
    path = await stored(keeping, response_format="pcm")
    for headers in ({}, {"range": "bytes=0-1"}):
        answer = await keeping.head(path, headers=headers)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == str(len(PCM))
        assert answer.headers["accept-ranges"] == "bytes"


async def test_audio_of_several_pieces(keeping: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Audio that is larger than a piece of the file is sent whole."""
    worker.chunks = 300
    path = await stored(keeping, response_format="pcm")
    assert (await keeping.get(path)).content == b"".join(tone("hello", 300))
    part = await keeping.get(path, headers={"range": "bytes=262140-600000"})
    assert part.content == b"".join(tone("hello", 300))[262140:600001]


async def test_another_web_worker_has_it(keeping: httpx.AsyncClient, serve: Serve, folder: Path) -> None:
    """Every application on that folder answers."""
    path = await stored(keeping)
    other = await serve(audio_store_dir=folder, api_title="another one")
    assert (await other.get(path)).status_code == 200


@pytest.mark.slow
async def test_a_player_needs_no_key(serve: Serve, folder: Path) -> None:
    """The id is enough for the audio, and for nothing else; it is neither the request id nor the speech id."""
    client = await serve(audio_store_dir=folder, api_keys=["user-1"])
    headers = {"authorization": "Bearer user-1", "x-request-id": "mine"}
    answer = await client.post(SPEECH, json={"input": "hello", "store": True}, headers=headers)
    path = answer.headers["x-audio-url"]
    assert (await client.get(path)).status_code == 200
    assert (await client.get(path.removesuffix("/audio"))).status_code == 401
    for name in ("mine", answer.headers["x-speech-id"]):
        assert name not in path
        assert (await client.get(f"{SPEECH}/{name}/audio")).status_code == 404


@pytest.mark.parametrize(
    "hostile", ["x", "..%2f..%2fetc%2fpasswd", "%2e%2e", ".lock", "%00", "A" * 32, "a" * 32, "a" * 5000, "%C3%A9"]
)
async def test_hostile_ids(keeping: httpx.AsyncClient, hostile: str) -> None:
    """A 404 in the usual shape."""
    answer = await keeping.get(f"{SPEECH}/{hostile}/audio")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_what_is_not_finished_is_not_stored(keeping: httpx.AsyncClient, worker: FakeWorker, folder: Path) -> None:
    """A failed speech, and one whose client has left, leave nothing behind."""
    await stored(keeping)
    before = names(folder)
    worker.chunks, worker.break_after = 10, 2
    worker.fail_with = Failed(id="", code="synthesis_failed", message="broke")
    with pytest.raises(httpx.RemoteProtocolError):
        await keeping.post(SPEECH, json={"input": "hello", "store": True, "response_format": "pcm"})
    worker.chunks, worker.break_after, worker.fail_with = 100_000, None, None
    async with keeping.stream("POST", SPEECH, json={"input": "hello", "store": True}) as answer:
        path = answer.headers["x-audio-url"]
        assert (await keeping.get(path)).status_code == 404
    await asyncio.to_thread(worker.wait_for, Cancel)
    assert (await keeping.get(path)).status_code == 404
    assert names(folder) == before


async def test_a_server_that_keeps_nothing(serve: Serve) -> None:
    """With TTS_AUDIO_STORE_MB=0 the field is refused; without the field no header promises anything."""
    client = await serve(audio_store_mb=0)
    answer = await client.post(SPEECH, json={"input": "hello", "store": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "store")
    assert "x-audio-url" not in (await client.post(SPEECH, json={"input": "hello", "store": False})).headers


@pytest.mark.slow
async def test_a_disk_that_takes_nothing(serve: Serve, tmp_path: Path) -> None:
    """The client has its speech; a whole answer promises no audio, and a line in the log names the request."""
    (tmp_path / "file").touch()
    client = await serve(audio_store_dir=tmp_path / "file")
    for form in FORMS:
        with structlog.testing.capture_logs() as logs:
            answer = await client.post(SPEECH, json={"input": "hello", "store": True, **form})
        assert answer.status_code == 200
        assert ("x-audio-url" in answer.headers) == (form != {"stream": False})
        (line,) = [line for line in logs if line["event"] == "audio_not_stored"]
        assert line["request_id"] == answer.headers["x-request-id"]


async def test_below_a_path(serve: Serve, folder: Path) -> None:
    """The path is the client's own: below the prefix that a proxy adds."""
    client = await serve(audio_store_dir=folder)
    headers = {"x-forwarded-prefix": "/tts"}
    answer = await client.post(SPEECH, json={"input": "hello", "store": True}, headers=headers)
    assert answer.headers["x-audio-url"].startswith("/tts/v1/audio/speech/")
