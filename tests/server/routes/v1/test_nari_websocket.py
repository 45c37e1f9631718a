"""WS /v1/audio/speech/ws, the subprotocol nari.speech.v1: its events in order, and what ends the socket."""

from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest

from server.routes.v1.nari_websocket import PROTOCOL
from shared.protocol import Cancel, Failed, Speak
from tests.fakes import FakeWorker, tone
from tests.server.running import SHARED_LOOP, Serve, becomes
from tests.server.sockets import Talk, audio, is_a, said, talk

pytestmark = SHARED_LOOP

PATH = "/v1/audio/speech/ws"
START = {"type": "request.start", "voice": "alloy", "language": "english"}


def nari(client: httpx.AsyncClient) -> AbstractAsyncContextManager[Talk]:
    """A socket of this protocol."""
    return talk(client, PATH, subprotocols=[PROTOCOL])


def append(sequence: Any, words: Any) -> dict[str, Any]:
    """A piece of text."""
    return {"type": "input_text.append", "sequence": sequence, "text": words}


def end(sequence: int) -> dict[str, Any]:
    """The end of the text."""
    return {"type": "input_text.end", "sequence": sequence}


async def test_a_request(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Greeting, configuration, acknowledgements, pcm and the end, each event as documented; then a normal close."""
    async with nari(client) as socket:
        assert socket.socket.subprotocol == PROTOCOL
        created = await socket.hear()
        assert (created["type"], created["protocol"]) == ("session.created", PROTOCOL)
        assert created["audio"] == {"encoding": "pcm_s16le", "sample_rate": 24_000, "channels": 1}
        await socket.say(START | {"response_format": "pcm16", "instruct": ""})
        assert is_a(await socket.hear(), "request.configured")
        await socket.say(append(0, "Hello."), append(1, " "), append(2, "You?"), end(3))
        heard, code, _ = await socket.end()
    acks = [(message["event"][11:], message["sequence"]) for message in heard if is_a(message, "input_text.ack")]
    assert acks == [("append", 0), ("append", 1), ("append", 2), ("end", 3)]
    assert [message["type"] for message in heard if isinstance(message, dict)].count("response.started") == 1
    assert said(worker) == ["Hello. You?"]
    assert audio(heard)[: 3 * 3840] == b"".join(tone("Hello.", 3))
    done = heard[-1]
    assert (done["type"], done["stop_reason"], code) == ("response.done", "stop", 1000)
    assert done["audio_chunks"] == sum(isinstance(message, bytes) for message in heard)


async def test_an_empty_text(client: httpx.AsyncClient) -> None:
    """It is done at once, without audio."""
    async with nari(client) as socket:
        await socket.say(START, end(0))
        heard, code, _ = await socket.end()
    assert (heard[-1]["stop_reason"], heard[-1]["audio_chunks"], code) == ("empty", 0, 1000)


async def test_cancel(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The speech stops, and the socket is closed."""
    worker.hold = True
    async with nari(client) as socket:
        await socket.say(START, append(0, "Hello."), end(1))
        await becomes(lambda: worker.of(Speak))
        await socket.say({"type": "response.cancel"})
        heard, code, _ = await socket.end()
    assert (heard[-1]["stop_reason"], code) == ("cancelled", 1000)
    await becomes(lambda: worker.of(Cancel))


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ([append(0, "Hello.")], "type", 1008),
        ([START, append(1, "Hello.")], "sequence", 1008),
        ([START, append(None, "Hello.")], "sequence", 1008),
        ([START, append(0, "Hello."), append(0, "Hello.")], "sequence", 1008),
        ([START, append(0, "")], "text", 1008),
        ([START, append(0, 7)], "text", 1008),
        ([START, append(0, "x" * 5000)], "text", 1008),
        ([START, end(0), append(1, "Hello.")], None, 1000),
        ([START, START], None, 1008),
        ([START | {"response_format": "mp3"}], "response_format", 1008),
        (['{"type": "request.start", "response_format": 1e999}'], "response_format", 1008),
        ([START | {"sample_rate": 8000}], "sample_rate", 1008),
        ([START | {"voice": "nobody"}], "voice", 1008),
        ([START, {"type": "session.update"}], "type", 1008),
        (["{"], None, 1008),
        ([b"binary"], None, 1003),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
async def test_mistakes_end_the_socket(
    client: httpx.AsyncClient, messages: list[Any], param: str | None, code: int
) -> None:
    """With an error in this protocol's shape, and a close that is no normal end; what comes after the end is late."""
    async with nari(client) as socket:
        await socket.say(*messages)
        heard, got, _ = await socket.end()
    assert got == code
    if code != 1000:
        assert (heard[-1]["type"], heard[-1]["error"]["param"]) == ("error", param)


async def test_failed_speech(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The error comes, and the close is 1011."""
    worker.fail_with = Failed(id="", code="synthesis_failed", message="It broke.")
    worker.break_after = 1
    async with nari(client) as socket:
        await socket.say(START, append(0, "Hello."), end(1))
        heard, code, _ = await socket.end()
    assert (heard[-1]["error"]["code"], code) == ("synthesis_failed", 1011)


async def test_a_client_without_the_protocol(client: httpx.AsyncClient) -> None:
    """It reads what is missing."""
    async with talk(client, PATH) as socket:
        heard, code, reason = await socket.end()
    assert PROTOCOL in reason
    assert (len(heard), code) == (1, 1008)


async def test_a_key_beside_the_protocol(serve: Serve) -> None:
    """As a page sends it."""
    client = await serve(api_keys=["sesame"])
    async with talk(client, PATH, subprotocols=[PROTOCOL, "openai-insecure-api-key.sesame"]) as socket:
        assert socket.socket.subprotocol == PROTOCOL
        await socket.say(START, end(0))
        assert (await socket.end())[1] == 1000
