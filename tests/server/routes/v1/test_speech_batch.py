"""POST /v1/audio/speech/batch: one result an item, in their order, whatever becomes of the others."""

import asyncio
import base64
import contextlib
import io
import json
import wave
from typing import Any

import httpx
import pytest

from server.audio import Encoder
from shared.protocol import Cancel, Failed, Speak
from tests.fakes import FakeWorker, tone
from tests.server.running import SHARED_LOOP, SPEECH, Serve, becomes

pytestmark = SHARED_LOOP

BATCH = f"{SPEECH}/batch"


async def spoken(client: httpx.AsyncClient, items: list[Any], **defaults: Any) -> dict[str, Any]:
    """The body of the answer to a batch."""
    answer = await client.post(BATCH, json={"items": items, **defaults})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def audio(result: dict[str, Any]) -> bytes:
    """The audio of a result."""
    assert result["status"] == "success", result
    return base64.b64decode(result["audio_data"])


async def test_one_result_an_item(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Each item has its own audio, at its index, over the shared defaults."""
    items = [{"input": "one"}, {"input": "two", "response_format": "wav"}, {"text": "three", "speaker": "fable"}]
    body = await spoken(client, items, response_format="pcm", voice="nova", x="unknown")
    assert (body["object"], body["total"], body["succeeded"], body["failed"]) == ("audio.speech.batch", 3, 3, 0)
    first, second, third = body["results"]
    assert [result["index"] for result in body["results"]] == [0, 1, 2]
    assert audio(first) == b"".join(tone("one", 3))
    assert audio(third) == b"".join(tone("three", 3))
    assert (first["media_type"], first["sample_rate"], first["finish_reason"]) == ("audio/pcm", 24_000, "stop")
    assert first["usage"] == {"input_tokens": 3, "output_tokens": 3, "total_tokens": 6}
    assert first["error"] is None
    with wave.open(io.BytesIO(audio(second))) as sound:
        assert sound.getnframes() == 3 * 1920
    voices = {speak.segments[0].text: speak.voice for speak in worker.of(Speak)}
    assert voices["one"] == voices["two"] != voices["three"]


async def test_each_item_can_be_found_afterwards(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Its request id is that of the batch and its index, its speech id stands in its result."""
    body = {"items": [{"input": "a"}, {"input": "b"}]}
    answer = (await client.post(BATCH, json=body, headers={"x-request-id": "mine"})).json()
    ids = {f"mine-{result['index']}.{result['id']}" for result in answer["results"]}
    assert answer["id"] == "mine"
    assert ids == {speak.id for speak in worker.of(Speak)}


async def test_a_failed_item_fails_alone(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong values, unknown voices and models, a blank text, a crash: each has its own error, the rest has speech."""

    class Crashing(Encoder):
        def finish(self) -> bytes:
            if self.sample_rate == 8000:
                raise RuntimeError
            return super().finish()

    monkeypatch.setattr("server.routes.speech_start.Encoder", Crashing)
    wrong: list[dict[str, Any]] = [
        {"input": "a", "speed": 9},
        {"input": "a", "voice": "nobody"},
        {"input": "a", "model": "nothing"},
        {"input": " "},
        {"input": None},
        {},
        {"input": "a", "sample_rate": 17},
        {"input": "a", "temperature": "hot"},
        {"input": "a", "sample_rate": 8000},
        {"input": "x" * 5000},
    ]
    body = await spoken(client, [*wrong, {"input": "right"}], response_format="pcm")
    *failed, right = body["results"]
    assert audio(right) == b"".join(tone("right", 3))
    codes = [(result["error"]["code"], result["error"]["param"]) for result in failed]
    assert codes == [
        ("invalid_value", "speed"),
        ("voice_not_found", "voice"),
        ("model_not_found", "model"),
        *[("invalid_value", "input")] * 3,
        ("invalid_value", "sample_rate"),
        ("invalid_value", "temperature"),
        ("internal_error", None),
        ("invalid_value", "input"),
    ]
    assert all(result["audio_data"] is None for result in failed)
    assert (body["succeeded"], body["failed"]) == (1, 10)


async def test_the_worker_refuses(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A full queue is the error of each item; the answer is still a 200."""
    worker.fail_with = Failed(id="", code="queue_full", message="no", retry_after_s=1)
    body = await spoken(client, [{"input": "a"}, {"input": "b"}])
    assert [result["error"]["code"] for result in body["results"]] == ["queue_full"] * 2


@pytest.mark.parametrize(
    "items",
    [None, [], [{"input": "a"}] * 33, {"input": "a"}, "a", 1, ["a"], [[]], [None], [{"input": "a"}, 1], [{}] * 20_000],
    ids=repr,
)
async def test_bad_items(client: httpx.AsyncClient, worker: FakeWorker, items: Any) -> None:
    """Anything but 1 to 32 objects is refused as a whole."""
    answer = await client.post(BATCH, json={"items": items, "input": "default"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "items")
    assert not worker.of(Speak)


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '"x"', '{"items": [{]}', '{"items": ' + "[" * 100_000, '{"items": [{"input": "\\x"}]}']
)
async def test_bad_bodies(client: httpx.AsyncClient, body: str) -> None:
    """A body that is no JSON object is a 400 in the usual shape."""
    answer = await client.post(BATCH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


async def test_lenient_as_one_request_is(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Empty fields are absent, numbers may stand in quotes; a body may come as text."""
    body = json.dumps({"items": [{"input": "a", "voice": "", "speed": "1.0"}], "voice": " Nova ", "seed": -1})
    answer = await client.post(BATCH, content=body, headers={"content-type": "text/plain"})
    assert answer.json()["succeeded"] == 1, answer.text
    assert len(worker.of(Speak)) == 1


async def test_few_at_a_time(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """No more than eight items of a batch are with the GPU worker, and each is spoken in the end."""
    worker.hold = True
    asking = asyncio.create_task(spoken(client, [{"input": f"text {number}"} for number in range(32)]))
    await asyncio.to_thread(worker.wait_for, Speak, 8)
    await client.get("/v1/models")  # a round trip to the GPU worker
    assert len(worker.of(Speak)) == worker.busy == 8
    worker.hold = False
    assert (await asking)["succeeded"] == 32


@pytest.mark.slow
async def test_memory_is_bounded(
    client: httpx.AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The item that is too much fails alone; compressed audio counts as what it is."""
    worker.chunks = 100
    monkeypatch.setattr("server.routes.v1.speech_batch.MAX_BATCH_BYTES", 1_000_000)
    monkeypatch.setattr("server.routes.v1.speech_batch.PER_BATCH_AT_ONCE", 1)
    items = [{"input": f"text {number}"} for number in range(4)]
    body = await spoken(client, items, response_format="pcm")
    assert [result["status"] for result in body["results"]] == ["success", "success", "error", "error"]
    assert body["results"][2]["error"]["param"] == "input"
    assert (await spoken(client, items, response_format="mp3"))["succeeded"] == 4
    await becomes(lambda: worker.busy == 0)


async def test_a_client_that_leaves(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """All items that are with the GPU worker are cancelled."""
    worker.hold = True
    asking = asyncio.create_task(client.post(BATCH, json={"items": [{"input": "a"}] * 10}))
    await asyncio.to_thread(worker.wait_for, Speak, 8)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await asyncio.to_thread(worker.wait_for, Cancel, 8)
    await becomes(lambda: worker.busy == 0)


async def test_a_long_batch_is_kept_alive(
    client: httpx.AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """White space comes while the items are spoken, and the JSON behind it is whole."""
    monkeypatch.setattr("server.routes.v1.speech_batch.KEEPALIVE_S", 0.01)
    worker.hold = True
    async with client.stream("POST", BATCH, json={"items": [{"input": "a"}]}) as answer:
        pieces = answer.aiter_text()
        assert (await anext(pieces)).strip() == ""
        worker.hold = False
        assert json.loads("".join([piece async for piece in pieces]))["succeeded"] == 1


async def test_it_needs_a_key(serve: Serve) -> None:
    """As every request for speech."""
    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
    assert (await client.post(BATCH, json={"items": [{"input": "a"}]})).status_code == 401
