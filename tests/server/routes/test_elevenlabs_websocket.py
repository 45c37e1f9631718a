"""ElevenLabs' WebSockets: stream-input, and multi-stream-input with its contexts."""

import asyncio
import base64
import shutil
from pathlib import Path
from typing import Any

import elevenlabs
import httpx
import pytest
from elevenlabs.core import ApiError

from server.routes import elevenlabs_websocket
from shared.protocol import Append, Failed, Speak
from tests.audio import decode
from tests.fakes import FakeWorker, tone
from tests.server.running import SHARED_LOOP, Serve, becomes
from tests.server.sockets import said, talk
from tests.server.tls_relay import certificate, tls_relay

pytestmark = SHARED_LOOP

PATH = "/v1/text-to-speech/alloy/stream-input?output_format=pcm_24000&model_id=eleven_turbo_v2"
MULTI = "/v1/text-to-speech/alloy/multi-stream-input?output_format=pcm_24000&auto_mode=true"
BEGIN = {"text": " ", "voice_settings": {"stability": 0.5, "speed": 1.0}, "generation_config": None}
END = {"text": ""}
WAITING = BEGIN | {"generation_config": {"chunk_length_schedule": [1e9]}}
"""A text that is held until a flush."""


def sound(messages: list[Any], context: str | None = None) -> bytes:
    """The audio of a context."""
    return b"".join(
        base64.b64decode(message["audio"])
        for message in messages
        if message.get("audio") and message.get("contextId") == context
    )


def finals(messages: list[Any]) -> list[Any]:
    """The contexts that are final."""
    return [message.get("contextId") for message in messages if message.get("isFinal")]


async def test_a_text_in_pieces(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Its audio, then the final message, then a normal close; what is unknown is null."""
    async with talk(client, PATH) as socket:
        await socket.say(BEGIN, {"text": "Hello there. "}, {"text": "How ", "try_trigger_generation": True})
        await socket.say({"text": "are you? "}, END)
        heard, code, _ = await socket.end()
    assert sound(heard)[: 3 * 3840] == b"".join(tone(" Hello there. ", 3))
    assert heard[-1] == {"audio": None, "isFinal": True, "alignment": None, "normalizedAlignment": None}
    assert (finals(heard), code) == ([None], 1000)
    assert said(worker) == [" Hello there. How are you? "]


async def test_one_file_of_audio(client: httpx.AsyncClient) -> None:
    """The default is mp3 of 44,100 Hz: one stream, whatever the number of flushes."""
    async with talk(client, "/v1/text-to-speech/alloy/stream-input") as socket:
        await socket.say({"text": "One. ", "flush": True}, {"text": "Two. "}, END)
        heard, _, _ = await socket.end()
    assert 2 * 3 * 3840 <= len(decode(sound(heard), "mp3")) < 2.4 * 3 * 3840


async def test_an_empty_text_is_final_at_once(client: httpx.AsyncClient) -> None:
    """Without audio."""
    async with talk(client, PATH) as socket:
        await socket.say(BEGIN, END)
        heard, code, _ = await socket.end()
    assert (len(heard), finals(heard), code) == (1, [None], 1000)


async def test_when_a_generation_begins(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Not before as many characters as the schedule says, but at once with a flush or a trigger."""
    for now in ({"flush": True}, {"try_trigger_generation": True}):
        worker.reset()
        async with talk(client, PATH) as socket:
            await socket.say(BEGIN | {"generation_config": {"chunk_length_schedule": [50]}})
            await socket.say({"text": "One. Two "})
            await (await socket.socket.ping())
            assert not worker.of(Speak)
            await socket.say({"text": "and three. "} | now)
            await becomes(lambda: worker.of(Speak))
            await socket.say(END)
            await socket.end()
        worker.reset()
    async with talk(client, PATH) as socket:
        await socket.say(BEGIN | {"generation_config": {"chunk_length_schedule": [50]}})
        await socket.say({"text": "One and two and three and four. And five and six. "})
        await becomes(lambda: worker.of(Speak))


async def test_a_flush_ends_a_sentence(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The text so far is spoken, although its sentence has no end, and the text goes on."""
    async with talk(client, PATH) as socket:
        await socket.say(BEGIN, {"text": "Well then ", "flush": True})
        await becomes(lambda: worker.of(Speak))
        await socket.say({"text": "<break time='1s'/>Next."}, END)
        heard, _, _ = await socket.end()
    assert said(worker) == [" Well then ", "Next."]
    assert len(sound(heard)) == 6 * 3840 + 48_000


async def test_a_pause_in_pieces(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The mark is a pause however a language model cuts it, and what only begins like one is text."""
    async with talk(client, PATH) as socket:
        await socket.say(BEGIN, {"text": "Well then "}, *({"text": piece} for piece in ("<br", "eak time=", "'1s'/>")))
        await socket.say({"text": "is 1 <"}, {"text": " 2 or 3 <b"}, END)
        await socket.end()
    assert said(worker) == [" Well then ", "is 1 < 2 or 3 <b"], "a pause parts them"


async def test_contexts_speak_side_by_side(client: httpx.AsyncClient) -> None:
    """Each has its audio and its final message; a name can be used again; close_socket ends all."""
    async with talk(client, MULTI) as socket:
        await socket.say(END)  # keeps the socket open
        for name in ("a", "b"):
            await socket.say(BEGIN | {"context_id": name}, {"text": f"{name} speaks. ", "context_id": name})
        await socket.say({"context_id": "a", "flush": True}, {"context_id": "a", "close_context": True})
        heard = [await socket.hear()]
        while not finals(heard):
            heard.append(await socket.hear())
        assert finals(heard) == ["a"]
        await socket.say(
            {"text": "Again. ", "context_id": "a"}, {"text": "", "context_id": "a"}, {"close_socket": True}
        )
        rest, code, _ = await socket.end()
    assert sorted(finals(rest)) == ["a", "b"]
    assert code == 1000
    assert sound(heard + rest, "a") == b"".join(tone(" a speaks. ", 3) + tone("Again. ", 3))
    assert sound(heard + rest, "b") == b"".join(tone(" b speaks. ", 3))


async def test_a_context_in_one_message(client: httpx.AsyncClient) -> None:
    """It may open and close the context; one without words opens none."""
    async with talk(client, MULTI) as socket:
        await socket.say({"text": "Hello. ", "context_id": "a", "close_context": True})
        await socket.say({"text": " ", "context_id": "b", "close_context": True}, {"close_socket": True})
        heard, code, _ = await socket.end()
    assert (finals(heard), code) == (["a"], 1000)
    assert sound(heard, "a") == b"".join(tone("Hello. ", 3))


@pytest.mark.parametrize("begun", ["", "Hello. "])
async def test_the_last_text_in_the_message_that_closes_the_socket(
    client: httpx.AsyncClient, worker: FakeWorker, begun: str
) -> None:
    """It is spoken, in a context that is open and in a new one."""
    async with talk(client, MULTI) as socket:
        await socket.say({"text": begun, "context_id": "a"})
        await socket.say({"text": "Goodbye. ", "context_id": "a", "close_socket": True})
        heard, code, _ = await socket.end()
    assert (finals(heard), code) == (["a"], 1000)
    assert "".join(said(worker)) == f"{begun}Goodbye. "


async def test_many_flushes_at_once(client: httpx.AsyncClient) -> None:
    """An agent flushes behind each sentence of a long answer."""
    async with talk(client, MULTI) as socket:
        for _ in range(60):
            await socket.say({"text": "Hello there. ", "context_id": "a", "flush": True})
        await socket.say({"context_id": "a", "close_context": True}, {"close_socket": True})
        heard, code, _ = await socket.end()
    assert (len(sound(heard, "a")), code) == (60 * 3 * 3840, 1000)


async def test_too_many_contexts(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """There is a limit, the close says so, and the refusal is counted."""
    async with talk(client, MULTI) as socket:
        for number in range(elevenlabs_websocket.MAX_CONTEXTS + 1):
            await socket.say({"text": "Hello ", "context_id": str(number)})
        heard, code, _ = await socket.end()
    assert (heard[-1]["error"], heard[-1]["code"], code) == ("queue_full", 1013, 1013)
    await becomes(lambda: worker.snapshot.limit_hits == {"texts_of_socket": 1})


@pytest.mark.parametrize(
    ("path", "messages", "param"),
    [
        ("/v1/text-to-speech/nobody/stream-input", [BEGIN], "voice_id"),
        ("/v1/text-to-speech/alloy/stream-input?output_format=mp9", [BEGIN], "output_format"),
        ("/v1/text-to-speech/alloy/stream-input?inactivity_timeout=x", [], "inactivity_timeout"),
        (PATH, [{"text": 7}], "text"),
        (PATH, ["{"], "JSON"),
        (PATH, [BEGIN, {"text": "x" * 5000}], "text"),
        (PATH, [WAITING, *[{"text": "x" * 2000}] * 3], "text"),
    ],
    ids=["voice", "format", "timeout", "type", "json", "length", "held"],
)
async def test_mistakes(client: httpx.AsyncClient, path: str, messages: list[Any], param: str) -> None:
    """The message names what is wrong in ElevenLabs' words, and the close is 1008."""
    async with talk(client, path) as socket:
        await socket.say(*messages)
        (error,), code, _ = await socket.end()
    assert param in error["message"]
    assert (error["code"], code) == (1008, 1008)


@pytest.mark.parametrize("path", [PATH, MULTI])
@pytest.mark.parametrize("lost", ["{", {"text": 7}, {"text": "you", "flush": "maybe"}])
async def test_a_message_that_cannot_be_read(client: httpx.AsyncClient, path: str, lost: Any) -> None:
    """It ends the socket: no speech lacks a part of its text and ends as if it were whole."""
    async with talk(client, path) as socket:
        await socket.say(BEGIN, {"text": "Hello "}, lost, {"text": "there. "}, END, {"close_socket": True})
        heard, code, _ = await socket.end()
    (error,) = [message for message in heard if "error" in message]
    assert (error["code"], code) == (1008, 1008)
    assert not finals(heard)


async def test_failed_speech(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """No final message comes, and the close is 1011."""
    worker.fail_with = Failed(id="", code="synthesis_failed", message="It broke.")
    worker.break_after = 1
    async with talk(client, PATH) as socket:
        await socket.say(BEGIN, {"text": "Hello. "}, END)
        heard, code, _ = await socket.end()
    assert (heard[-1]["message"], heard[-1]["error"], code) == ("It broke.", "synthesis_failed", 1011)
    assert not finals(heard)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"additional_headers": {"xi-api-key": "sesame"}}, {}),
        ({}, {"xi_api_key": "sesame"}),
        ({}, {"authorization": "Bearer sesame"}),
    ],
)
async def test_a_key(serve: Serve, options: dict[str, Any], first: dict[str, str]) -> None:
    """In the header, or in the first message."""
    client = await serve(api_keys=["sesame"])
    async with talk(client, PATH, **options) as socket:
        await socket.say(BEGIN | first, {"text": "Hello. "}, END)
        heard, code, _ = await socket.end()
    assert (len(sound(heard)), code) == (3 * 3840, 1000)
    async with talk(client, PATH) as socket:
        await socket.say(BEGIN)
        (error,), code, _ = await socket.end()
    assert (error["error"], code) == ("invalid_api_key", 1008)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ConnectionClosed.:DeprecationWarning")  # in the SDK
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate: the SDK speaks TLS alone")
async def test_the_sdk_converts_in_real_time(
    client: httpx.AsyncClient, worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unmodified, through a TLS proxy: the audio of the whole text, and its own error for an unknown voice."""
    cert, key = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    async with tls_relay(client.base_url.port or 0, cert, key) as port:
        sdk = elevenlabs.ElevenLabs(base_url=f"https://127.0.0.1:{port}", api_key="none")

        def convert(voice: str) -> bytes:
            words = iter(["Hello there,", " my", " friend", ". How", " are you?"])
            pieces = sdk.text_to_speech.convert_realtime(
                voice, text=words, model_id="eleven_turbo_v2", output_format="pcm_24000"
            )
            return b"".join(pieces)

        heard = await asyncio.to_thread(convert, "alloy")
        with pytest.raises(ApiError) as refused:
            await asyncio.to_thread(convert, "nobody")
    assert " ".join(said(worker)[0].split()) == "Hello there, my friend. How are you?"
    assert len(heard) == 3840 * worker.chunks * (1 + len(worker.of(Append)))
    assert "nobody" in str(refused.value.body)
