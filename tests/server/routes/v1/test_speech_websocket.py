"""WS /v1/audio/speech/stream: the messages of both dialects, in order; what ends a socket, and with which code."""

import asyncio
import gc
import json
import socket
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import websockets

from server.app import create_app
from server.http import json_socket
from server.routes import live_speech, speech_socket
from shared.protocol import Cancel, Failed, Speak
from shared.settings import Settings
from tests.audio import decode
from tests.fakes import FakeWorker, tone
from tests.server.running import HANDSHAKE, SHARED_LOOP, Serve, becomes, listening, plain_client, responds, until
from tests.server.sockets import STREAM, Talk, audio, is_a, said, talk

pytestmark = SHARED_LOOP

PCM = {"type": "session.config", "response_format": "pcm"}
DONE = {"type": "input.done"}
COMMIT = {"type": "input.commit"}
CLOSE = {"type": "session.close"}


def text(words: str) -> dict[str, str]:
    """A piece of text."""
    return {"type": "input.text", "text": words}


async def configured(socket: Talk, **fields: Any) -> dict[str, Any]:
    """Configure the socket; the answer."""
    await socket.say(PCM | fields)
    answer: dict[str, Any] = await socket.hear()
    assert is_a(answer, "session.configured"), answer
    return answer


async def test_two_utterances_over_one_socket(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Pieces are joined, parts are framed by start and done, commit and done end utterances, and close closes."""
    async with talk(client) as socket:
        assert (await configured(socket, voice="alloy"))["sample_rate"] == 24_000
        await socket.say(text("Hello "), text("there."), COMMIT)
        start, *pcm, done, committed = await socket.until("input.committed")
        assert start["sentence_text"] == "Hello "
        assert (start["utterance_index"], start["sentence_index"]) == (0, 0)
        assert (start["format"], start["sample_rate"], start["channels"]) == ("pcm", 24_000, 1)
        assert audio(pcm) == b"".join(tone("Hello ", 3) + tone("there.", 3))
        assert (done["total_bytes"], done["finish_reason"], done["error"]) == (len(audio(pcm)), "stop", False)
        assert done["usage"]["output_tokens"] == 6
        assert (committed["segment_index"], committed["segment_sentences"], committed["total_sentences"]) == (0, 1, 1)
        await socket.say(text("Again."), DONE, CLOSE)
        heard, code, _ = await socket.end()
        assert heard[0]["utterance_index"] == 1
        assert (heard[-1]["type"], heard[-1]["total_sentences"], code) == ("session.done", 1, 1000)
    assert said(worker) == ["Hello there.", "Again."]
    assert len({(speak.voice, speak.open) for speak in worker.of(Speak)}) == 1


async def test_an_utterance_without_text_is_nothing(client: httpx.AsyncClient) -> None:
    """It has no parts; one without a letter is a short silence."""
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(DONE, text("  "), DONE, text("…"), DONE)
        assert [(await socket.hear())["total_sentences"] for _ in range(2)] == [0, 0]
        _, *silence, done, _ = await socket.until("session.done")
        assert (done["finish_reason"], len(audio(silence))) == ("empty", 4800)


@pytest.mark.parametrize(
    ("split", "parts"), [("sentence", ["One, two.", "It is 3.14!", "四。", "end"]), ("clause", None)]
)
async def test_each_sentence_is_spoken_when_it_is_complete(
    client: httpx.AsyncClient, worker: FakeWorker, split: str, parts: list[str] | None
) -> None:
    """Before the next piece comes; in order, one request each, cut however the pieces are."""
    async with talk(client) as socket:
        await configured(socket, split_granularity=split)
        await socket.say(text("One, two. It i"))
        first = await socket.until("audio.done")
        assert first[0]["sentence_text"] == (parts[0] if parts else "One,")
        await socket.say(text("s 3."), text("14! 四。en"), text("d"), DONE)
        heard = [*first, *await socket.until("session.done")]
    spoken = [message["sentence_text"] for message in heard if is_a(message, "audio.start")]
    assert spoken == (parts or ["One,", "two.", "It is 3.14!", "四。", "end"])
    assert said(worker) == spoken
    assert audio(heard) == b"".join(piece for part in spoken for piece in tone(part, 3))


async def test_speech_begins_with_the_first_word(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Its audio comes before the next word is sent; pieces join where they were cut."""
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(text("  "), text("Hel"))
        start = await socket.hear()
        first = await socket.hear()
        assert (start["sentence_text"], len(first)) == ("  Hel", 3840)
        await socket.say(text("lo, w"), text("orld"), text(""), text("!"), DONE)
        await socket.until("session.done")
    assert said(worker) == ["  Hello, world!"]


async def test_pauses_in_a_growing_text(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A mark is a pause however it is cut, and what only begins like one is text."""
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(*(text(piece) for piece in ("One [", "pau", "se:1", "s] two [paus", "e] three [", "x")), DONE)
        heard = await socket.until("session.done")
    assert said(worker) == ["One ", " two [pause] three [x"]
    first = heard[: [is_a(message, "audio.done") for message in heard].index(True)]
    assert len(audio(first)) == 3 * 3840 + 48_000
    assert audio(first).endswith(bytes(48_000))
    assert heard[-1]["total_sentences"] == 2


@pytest.mark.parametrize(
    ("fields", "pieces", "expected"),
    [
        (
            {"pronunciations": {"nginx": "engine X"}},
            ["I like ng", "inx. Do ", "you, nginx"],
            ["I like engine X. Do you, engine X"],
        ),
        ({"input_format": "markdown"}, ["**Well", "** done"], ["Well done"]),
        ({}, ["<", "speak>Well <break", " time='1ms'/>done</speak>"], ["Well done"]),
        ({"input_format": "text"}, ["<", "speak>"], ["<speak>"]),
        ({}, ["<", "b>"], ["<b>"]),
        ({}, ["<spea"], ["<spea"]),
    ],
    ids=["pronunciations", "markdown", "ssml", "text", "no ssml", "beginning"],
)
async def test_texts_that_are_read(
    client: httpx.AsyncClient, worker: FakeWorker, fields: dict[str, Any], pieces: list[str], expected: list[str]
) -> None:
    """Respellings, Markdown and SSML mean what they mean in a whole text."""
    async with talk(client) as socket:
        await configured(socket, **fields)
        await socket.say(*(text(piece) for piece in pieces), DONE)
        await socket.until("session.done")
    assert said(worker) == expected


async def test_the_layout_of_whole_texts(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Qwen3-TTS gets a growing text in its streaming layout; non_streaming_mode asks for the whole text first."""
    async with talk(client) as socket:
        for layout in (None, True):
            await configured(socket, model="qwen3-tts-0.6b-customvoice", non_streaming_mode=layout)
            await socket.say(text("Well "), text("done."), DONE)
            await socket.until("session.done")
    assert said(worker) == ["Well done."] * 2
    assert [(speak.open, speak.non_streaming_mode) for speak in worker.of(Speak)] == [(True, False), (False, True)]


async def test_every_part_is_a_file(client: httpx.AsyncClient) -> None:
    """As a stream of frames, or with stream_audio false in one frame that has its length."""
    async with talk(client) as socket:
        await configured(socket, response_format="wav", stream_audio=False)
        await socket.say(text("Hello."), DONE)
        _, whole, *_ = await socket.until("session.done")
        await configured(socket, response_format="mp3")
        await socket.say(text("Hello."), DONE)
        streamed = audio(await socket.until("session.done"))
    assert int.from_bytes(whole[4:8], "little") == len(whole) - 8
    assert len(decode(whole, "wav")) == 3 * 3840
    assert len(decode(streamed, "mp3")) >= 3 * 3840


async def test_the_nested_form_and_other_names_of_fields(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """`session` may hold the configuration, fields have their other names, and what has no effect is named."""
    async with talk(client) as socket:
        session = {"speaker": "Alloy", "response_format": " PCM ", "speed": "1.0", "store": True, "unknown": 1}
        await socket.say({"type": "session.config", "session": session})
        answer = await socket.hear()
        assert (answer["response_format"], answer["ignored"]) == ("pcm", ["store"])
        await socket.say(text("Hello."), DONE)
        await socket.until("session.done")
    assert worker.of(Speak)[0].voice == answer["voice"]


async def test_cancel_stops_at_once(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """The request is cancelled, what waits is forgotten, and the socket goes on."""
    worker.hold = True
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(text("One."), DONE, text("Two."), DONE, text("Three"))
        assert is_a(await socket.hear(), "audio.start")
        await socket.say({"type": "input.cancel"})
        done, cancelled = await socket.until("input.cancelled")
        assert (done["finish_reason"], done["error"]) == ("cancelled", False)
        assert cancelled["utterance_index"] == 2
        await becomes(lambda: worker.of(Cancel))
        worker.hold = False
        await socket.say(text("Four."), DONE)
        assert (await socket.hear())["sentence_text"] == "Four."
        await socket.until("session.done")
    assert said(worker) == ["One.", "Four."]


async def test_a_client_that_leaves_ends_its_speech(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Without a word, and in the middle of a request."""
    worker.hold = True
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(text("One."), DONE)
        await becomes(lambda: worker.of(Speak))
        socket.socket.transport.abort()
    await becomes(lambda: worker.of(Cancel))
    await becomes(lambda: not worker.busy)


MISTAKES = [
    ("{", "invalid_json", ""),
    ("[]", "invalid_json", ""),
    ({}, "invalid_value", ""),
    ({"type": 7}, "invalid_value", ""),
    ({"type": "input.nothing"}, "invalid_value", "input.nothing"),
    (PCM | {"voice": "nobody"}, "voice_not_found", "session.config"),
    (PCM | {"speed": 9}, "invalid_value", "session.config"),
]
"""A message, the code of its error, and the action that the error names."""


@pytest.mark.parametrize(("message", "code", "action"), MISTAKES)
async def test_a_mistake_costs_no_speech(client: httpx.AsyncClient, message: Any, code: str, action: str) -> None:
    """After the configuration it is answered, and the next utterance is spoken as configured."""
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(message)
        error = await socket.hear()
        assert (error["type"], error["code"], error["action"]) == ("error", code, action)
        await socket.say(text("Hello."), DONE)
        assert audio(await socket.until("session.done")) == b"".join(tone("Hello.", 3))


async def test_a_configuration_within_an_utterance(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """It is refused, and the utterance goes on as it began."""
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(text("Hel"), PCM | {"response_format": "mp3"}, text("lo."), DONE)
        heard = await socket.until("session.done")
    (error,) = [message for message in heard if is_a(message, "error")]
    assert (error["code"], error["action"]) == ("invalid_value", "session.config")
    assert said(worker) == ["Hello."]
    assert {message["format"] for message in heard if is_a(message, "audio.start")} == {"pcm"}


@pytest.mark.parametrize(("message", "code", "action"), MISTAKES)
async def test_a_mistake_before_the_configuration_ends_the_socket(
    client: httpx.AsyncClient, message: Any, code: str, action: str
) -> None:
    """The error comes, and a close that is no normal end."""
    async with talk(client) as socket:
        await socket.say(message)
        (error,), close, reason = await socket.end()
        assert error["code"] == code if action != "input.nothing" else error["code"] == "invalid_value"
        assert (close, reason[:20]) == (1008, error["message"][:20])


LOST = [
    (text("x" * 5000), 1008, "invalid_value"),
    (text("a\0b"), 1008, "invalid_value"),
    ({"type": "input.text", "text": 7}, 1008, "invalid_value"),
    ({"type": "input.text"}, 1008, "invalid_value"),
    (b"binary", 1003, "unsupported_media_type"),
    (text("x" * json_socket.MAX_MESSAGE_BYTES), 1009, "request_too_large"),
    (text("ä" * (json_socket.MAX_MESSAGE_BYTES // 2)), 1009, "request_too_large"),
]
"""A message whose text would be missing from the speech, the code of the close, and that of the error."""


@pytest.mark.parametrize(("message", "close", "code"), LOST)
async def test_text_that_cannot_be_taken_ends_the_socket(
    client: httpx.AsyncClient, worker: FakeWorker, message: Any, close: int, code: str
) -> None:
    """No speech lacks a part of its text without an error."""
    async with talk(client) as socket:
        await configured(socket)
        data = json.dumps(message, ensure_ascii=False) if isinstance(message, dict) else message
        await socket.say(text("Before. "), data)
        heard, got, _ = await socket.end()
        (error,) = [message for message in heard if is_a(message, "error")]
        assert (error["code"], got) == (code, close)
        assert error["action"] == ("input.text" if close == 1008 else "")
        assert heard[-1] == error or heard[-1]["error"]
    await becomes(lambda: not worker.busy)


@pytest.mark.parametrize(
    "frame",
    [b"\x81\x82\0\0\0\0\xff\xfe", b"\x81\x02no", b"\xff" * 64, b"\x82\xff\0\0\0\0\xff\0\0\0\0\0\0\0"],
    ids=["no UTF-8", "not masked", "no frame", "huge"],
)
async def test_a_frame_that_cannot_be_read(client: httpx.AsyncClient, worker: FakeWorker, frame: bytes) -> None:
    """The close says so, and what was being spoken is cancelled."""
    worker.hold = True
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(text("Hello."), DONE)
        await becomes(lambda: worker.busy)
        socket.socket.transport.write(frame)
        _, code, reason = await socket.end()
        assert (code, reason) == (1002, "a frame could not be read")
    await becomes(lambda: not worker.busy)


async def test_the_session_has_the_id_of_the_request(client: httpx.AsyncClient) -> None:
    """By it, the log's lines about the socket are found."""
    async with talk(client, additional_headers={"x-request-id": "talk-1"}) as socket:
        assert (await configured(socket))["session_id"] == "talk-1"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pronunciations": {"a": "bcd " * 40}}, "a " * 100 + "end. "),
        ({"pronunciations": {"a": "bcd " * 40}}, "a " * 100),
        ({"pronunciations": {"a": "b"}}, "[pause:30s]" * 21),
        ({}, "Hello. [pause:31s]"),
        ({}, "<speak>Hello."),
    ],
    ids=["sentence", "rest", "pauses", "pause", "SSML"],
)
async def test_text_whose_rest_cannot_be_spoken_ends_the_socket(
    client: httpx.AsyncClient, worker: FakeWorker, fields: dict[str, Any], words: str
) -> None:
    """Pronunciations make it longer, as they make a whole one; and no utterance stays open that has ended.

    The error is about the field that the messages have, which is not called input.
    """
    async with talk(client) as socket:
        await configured(socket, **fields)
        await socket.say(text(words), DONE)
        heard, code, _ = await socket.end()
        assert (heard[-1]["code"], heard[-1]["param"], code) == ("invalid_value", "text", 1008)
        assert heard[-1]["message"].startswith("text: ")
        assert worker.of(Speak) == []


async def test_too_many_mistakes_and_utterances(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Both have a limit, after which the socket is closed."""
    async with talk(client) as socket:
        await configured(socket)
        await socket.say(*(["{"] * (speech_socket.MAX_MISTAKES + 1)))
        heard, code, _ = await socket.end()
        assert (len(heard), code) == (speech_socket.MAX_MISTAKES + 1, 1008)
    worker.hold = True
    async with talk(client) as socket:
        await configured(socket)
        for _ in range(live_speech.MAX_WAITING + 3):
            await socket.say(text("Hello."), DONE)
        heard, code, _ = await socket.end()
        assert (heard[-2]["code"], heard[-1]["error"], code) == ("queue_full", True, 1013)
    await becomes(lambda: not worker.busy)
    async with talk(client) as socket:
        await configured(socket)
        for _ in range(speech_socket.MAX_TEXTS + 1):
            await socket.say(text("x" * 4096), DONE)
        heard, code, _ = await socket.end()
        assert (heard[-2]["code"], heard[-1]["error"], code) == ("queue_full", True, 1013)
    await becomes(lambda: worker.of(Cancel))
    await becomes(lambda: worker.snapshot.limit_hits == {"texts_of_socket": 2})


@pytest.mark.parametrize("after", [0, 2])
async def test_failed_speech_ends_the_socket(client: httpx.AsyncClient, worker: FakeWorker, after: int) -> None:
    """The error comes, the part is marked as broken, and the close is 1011."""
    worker.fail_with = Failed(id="", code="synthesis_failed", message="It broke.")
    worker.break_after = after
    async with talk(client) as socket:
        await configured(socket)
        await socket.say({"type": "input.nothing"})
        await socket.until("error")
        await socket.say(text("Hello."), DONE)
        heard, code, reason = await socket.end()
    error, done = heard[-2:]
    assert (error["code"], error["message"], error["action"]) == ("synthesis_failed", "It broke.", "")
    assert (done["type"], done["error"], done["total_bytes"]) == ("audio.done", True, after * 3840)
    assert (code, reason) == (1011, "It broke.")


async def test_silence_has_limits(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not configure, or says nothing afterwards, is closed with 1008."""
    monkeypatch.setattr(speech_socket, "CONFIGURE_S", 0.05)
    monkeypatch.setattr(speech_socket, "IDLE_S", 0.1)
    async with talk(client) as socket:
        (error,), code, _ = await socket.end()
        assert (error["code"], code) == ("request_timeout", 1008)
    monkeypatch.setattr(speech_socket, "CONFIGURE_S", 10.0)
    async with talk(client, ping_interval=None) as socket:
        await configured(socket)
        (error,), code, _ = await socket.end()
        assert (error["code"], code) == ("request_timeout", 1008)


async def test_signs_of_life_keep_a_socket_open(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no message, such as pings, put the end off; a ping is answered."""
    silences = iter([0.0, 0.02, 0.0])

    async def silent_s(_socket: json_socket.JsonSocket) -> float:
        return next(silences, 1000.0)

    monkeypatch.setattr(json_socket.JsonSocket, "silent_s", silent_s)
    monkeypatch.setattr(speech_socket, "IDLE_S", 0.05)
    async with talk(client, ping_interval=None) as socket:
        await configured(socket)
        await (await socket.socket.ping())
        (error,), code, _ = await socket.end()
        assert (error["code"], code, next(silences, None)) == ("request_timeout", 1008, None)


KEYS = {"api_keys": ["sesame"]}


@pytest.mark.parametrize(
    "options",
    [
        {"additional_headers": {"authorization": "Bearer sesame"}},
        {"additional_headers": {"xi-api-key": "sesame"}},
        {"subprotocols": ["speech", "openai-insecure-api-key.sesame"]},
        {"subprotocols": ["openai-insecure-api-key.sesame"]},
        {},
    ],
    ids=["bearer", "xi-api-key", "subprotocol", "key alone", "first message"],
)
async def test_a_key_by_header_subprotocol_or_first_message(serve: Serve, options: dict[str, Any]) -> None:
    """Each way opens the socket; a browser gets one of the subprotocols that it offers."""
    client = await serve(**KEYS)
    async with talk(client, **options) as socket:
        assert socket.socket.subprotocol == next(iter(options.get("subprotocols", [])), None)
        await configured(socket, **({} if options else {"api_key": "sesame"}))
        await socket.say(text("Hello."), DONE)
        await socket.until("session.done")


async def test_an_error_does_not_repeat_megabytes(client: httpx.AsyncClient) -> None:
    """It names the type of the message at fault, if that can be one."""
    async with talk(client) as socket:
        await configured(socket)
        await socket.say({"type": "x" * 1_000_000}, {"type": "input.wrong"})
        assert [(await socket.hear())["action"] for _ in range(2)] == ["", "input.wrong"]


async def test_a_wrong_or_missing_key(serve: Serve) -> None:
    """A wrong one in the handshake is a 401; a wrong one or none in the first message is an error and 1008."""
    client = await serve(**KEYS)
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with talk(client, additional_headers={"authorization": "Bearer simsim"}):
            pass
    assert refused.value.response.status_code == 401
    assert json.loads(refused.value.response.body or b"")["error"]["code"] == "invalid_api_key"
    for key in ({"api_key": "simsim"}, {}):
        async with talk(client) as socket:
            await socket.say(PCM | key)
            (error,), code, _ = await socket.end()
            assert (error["code"], code) == ("invalid_api_key", 1008)


@pytest.mark.parametrize(
    ("settings", "origin", "status"),
    [
        ({}, "https://evil.example", 403),
        ({}, "null", 403),
        ({"cors_origins": ["https://good.example"]}, "https://good.example", 101),
        ({"cors_origins": ["https://good.example"]}, "https://evil.example", 403),
        ({}, None, 101),
    ],
)
async def test_foreign_pages(serve: Serve, settings: dict[str, Any], origin: str | None, status: int) -> None:
    """The origin decides as it does for a POST."""
    client = await serve(**settings)
    headers = {} if origin is None else {"origin": origin}
    post = await client.post("/v1/audio/speech", json={"input": "Hello."}, headers=headers)
    assert (post.status_code == 200) == (status == 101)
    handshake = await client.get(STREAM, headers=HANDSHAKE | headers)
    assert handshake.status_code == status
    if status == 403:
        assert handshake.json()["error"]["code"] == "foreign_origin"


@pytest.mark.slow
async def test_a_slow_reader_holds_back_itself_alone(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Audio that it does not read is not asked for: the worker has no credit left, and other sockets are served."""
    worker.chunks = 4000
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.connect((client.base_url.host, client.base_url.port))
    async with talk(client, sock=small) as slow, talk(client) as other:
        slow.socket.transport.pause_reading()
        await slow.say(PCM, text("Slow."), DONE)
        await becomes(lambda: worker.busy)
        await becomes(lambda: worker.of(Speak))
        worker.chunks = 3
        await configured(other)
        await other.say(text("Hello."), DONE)
        await other.until("session.done")
        assert worker.busy == 1
        slow.socket.transport.resume_reading()
        heard = await slow.until("session.done")
        assert len(audio(heard)) == 4000 * 3840


async def test_the_number_of_sockets_of_an_address(serve: Serve) -> None:
    """Open sockets count as requests in progress: one too many is a 429."""
    client = await serve(max_connections_per_address=2, trusted_proxies=[])
    opened, refused = 0, []
    async with AsyncExitStack() as stack:
        for _ in range(3):
            try:
                await stack.enter_async_context(talk(client))
                opened += 1
            except websockets.InvalidStatus as refusal:
                refused.append(refusal.response.status_code)
    assert opened > 0
    assert set(refused) == {429}


@pytest.mark.slow
async def test_no_task_and_no_socket_is_left(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """However sockets end: in the middle of speech, by a mistake, or because their client is gone."""
    ends = ["abort", b"binary", "{", json.dumps(CLOSE), json.dumps({"type": "input.cancel"}), "close"]

    async def a_round() -> None:
        for end in ends * 3:
            async with talk(client) as one:
                await one.say(PCM, text("Hello."), DONE, text("And"))
                await one.hear()
                if end == "abort":
                    one.socket.transport.abort()
                elif end != "close":
                    await one.say(end)

    def sockets() -> int:
        gc.collect()
        # Not isinstance: it asks each object for its class, and deprecated ones of torch warn.
        return sum(issubclass(type(one), speech_socket.SpeechSocket) for one in gc.get_objects())

    await a_round()
    await becomes(lambda: not worker.busy and not sockets())
    tasks = len(asyncio.all_tasks())
    await a_round()
    await becomes(lambda: not worker.busy and not sockets() and len(asyncio.all_tasks()) <= tasks)


async def test_the_end_of_the_service(worker: FakeWorker) -> None:
    """Quiet sockets close at once, speech ends first, and what is still being written is cut off in the end."""
    app = create_app(Settings(worker_url=worker.url))
    async with listening(app) as base_url, plain_client(base_url) as client:
        await until(lambda: responds(client, "/ready"))
        async with talk(client) as quiet, talk(client) as speaking, talk(client) as writing:
            for socket in (quiet, speaking, writing):
                await configured(socket)
            worker.hold = True
            await speaking.say(text("Hello."), DONE)
            await writing.say(text("Hello"))
            await becomes(lambda: worker.busy == 2)
            app.refuses_requests = True
            draining = asyncio.create_task(app.open_sockets.drain(1000))
            assert await quiet.end() == ([], 1001, "the service is shutting down")
            assert await responds(client, "/health")
            assert (await client.post("/v1/audio/speech", json={"input": "Hello."})).status_code == 503
            worker.hold = False
            heard, code, _ = await speaking.end()
            assert (heard[-1]["type"], code) == ("session.done", 1001)
            assert not draining.done()
            draining.cancel()
            cutting_off = asyncio.create_task(app.open_sockets.drain(0))
            heard, code, _ = await writing.end()
            assert (heard[-2]["code"], heard[-1]["error"], code) == ("shutting_down", True, 1001)
            await cutting_off
            assert app.open_sockets.count == 0
    await becomes(lambda: not worker.busy)
