"""Bad input over the wire: a table of requests with the error that each must get; none is a 500 or logs an error."""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
import structlog

from tests.server.running import SHARED_LOOP, SPEECH, VOICES, Serve

JSON = {"content-type": "application/json"}
BASE = "qwen3-tts-1.7b-base"
SOUND = ("audio_sample", ("a.wav", b"x"))
NOISE = base64.b64encode(b"this is no sound" * 100).decode()


def _fields(**fields: Any) -> dict[str, Any]:
    return {"json": {"input": "hello", **fields}}


def _raw(content: bytes, **headers: str) -> dict[str, Any]:
    return {"content": content, "headers": JSON | {name.replace("_", "-"): value for name, value in headers.items()}}


def _clone(**fields: Any) -> dict[str, Any]:
    return _fields(model=BASE, ref_text="hello", **fields)


OF_PYTHON = ("`", "<class", "UploadFile", "enum", "truncated", "of length", "array", "__")
"""Words that only Python programmers understand."""

DESIGN = {"name": "x", "type": "prompt", "prompt": "calm"}
"""The form of a designed voice."""

Case = tuple[str, dict[str, Any], int, str, str | None]
"""Name of the case, request, and status, code and param of the answer."""

CASES: list[Case] = [
    ("input missing", {"json": {}}, 400, "invalid_value", "input"),
    ("input null", _fields(input=None), 400, "invalid_value", "input"),
    ("input empty", _fields(input=""), 400, "invalid_value", "input"),
    ("input white space", _fields(input=" \n\t "), 400, "invalid_value", "input"),
    ("input control characters", _fields(input="\x01\x02\x03"), 400, "invalid_value", "input"),
    ("input zero-width", _fields(input="\u200b\u200b"), 400, "invalid_value", "input"),
    ("input null byte", _fields(input="a\0b"), 400, "invalid_value", "input"),
    ("input too long", _fields(input="x" * 4097), 400, "invalid_value", "input"),
    ("input number", _fields(input=7), 400, "invalid_value", "input"),
    ("input list", _fields(input=["a"]), 400, "invalid_value", "input"),
    ("input object", _fields(input={"a": 1}), 400, "invalid_value", "input"),
    ("input true", _fields(input=True), 400, "invalid_value", "input"),
    ("model unknown", _fields(model="gpt-7"), 404, "model_not_found", "model"),
    ("model number", _fields(model=1), 400, "invalid_value", "model"),
    ("model huge", _fields(model="m" * 10_000), 400, "invalid_value", "model"),
    ("model path", _fields(model="../../etc/passwd"), 404, "model_not_found", "model"),
    ("model null byte", _fields(model="tts-1\0"), 404, "model_not_found", "model"),
    ("voice unknown", _fields(voice="bob"), 400, "voice_not_found", "voice"),
    ("voice number", _fields(voice=3), 400, "invalid_value", "voice"),
    ("voice list", _fields(voice=["alloy"]), 400, "invalid_value", "voice"),
    ("voice object without id", _fields(voice={"name": "x"}), 400, "invalid_value", "voice"),
    ("voice object unknown", _fields(voice={"id": "x"}), 400, "voice_not_found", "voice"),
    ("voice object id number", _fields(voice={"id": 1}), 400, "invalid_value", "voice"),
    ("voice of another model", _fields(voice="ryan"), 400, "voice_not_found", "voice"),
    ("instructions too long", _fields(instructions="x" * 4097), 400, "invalid_value", "instructions"),
    ("instructions number", _fields(instructions=5), 400, "invalid_value", "instructions"),
    ("format unknown", _fields(response_format="midi"), 400, "invalid_value", "response_format"),
    ("format number", _fields(response_format=3), 400, "invalid_value", "response_format"),
    ("speed too small", _fields(speed=0.24), 400, "invalid_value", "speed"),
    ("speed too large", _fields(speed=4.01), 400, "invalid_value", "speed"),
    ("speed negative", _fields(speed=-1), 400, "invalid_value", "speed"),
    ("speed string", _fields(speed="fast"), 400, "invalid_value", "speed"),
    ("speed true", _fields(speed=True), 400, "invalid_value", "speed"),
    ("stream_format unknown", _fields(stream_format="websocket"), 400, "invalid_value", "stream_format"),
    ("stream string", _fields(stream="no"), 400, "invalid_value", "stream"),
    ("whole events", _fields(stream=False, stream_format="sse"), 400, "invalid_value", "stream"),
    ("language unknown", _fields(language="klingon"), 400, "invalid_value", "language"),
    ("language number", _fields(language=1), 400, "invalid_value", "language"),
    ("task unknown", _fields(task_type="Singing"), 400, "invalid_value", "task_type"),
    ("task not in the family", _fields(task_type="VoiceDesign"), 400, "task_mismatch", "model"),
    ("task of another model", _fields(model="espeak-ng", task_type="Base"), 400, "task_mismatch", "task_type"),
    ("cloning on espeak", _fields(model="espeak-ng", ref_audio=NOISE), 400, "task_mismatch", "ref_audio"),
    ("recording not base64", _clone(ref_audio="!!!"), 400, "invalid_audio", "ref_audio"),
    ("recording no audio", _clone(ref_audio=NOISE), 400, "invalid_audio", "ref_audio"),
    ("recording empty", _clone(ref_audio=""), 400, "invalid_value", "ref_text"),
    ("recording data URL not base64", _clone(ref_audio="data:audio/wav,abc"), 400, "invalid_audio", "ref_audio"),
    ("recording data URL cut", _clone(ref_audio="data:audio/wav;base64"), 400, "invalid_audio", "ref_audio"),
    ("recording URL", _clone(ref_audio="http://127.0.0.1/a.wav"), 400, "invalid_value", "ref_audio"),
    ("recording file URL", _clone(ref_audio="file:///etc/passwd"), 400, "invalid_audio", "ref_audio"),
    ("recording not ASCII", _clone(ref_audio="äöü"), 400, "invalid_audio", "ref_audio"),
    ("recording number", _clone(ref_audio=1), 400, "invalid_value", "ref_audio"),
    ("transcript missing", _fields(model=BASE, ref_audio=NOISE), 400, "invalid_value", "ref_text"),
    ("transcript alone", _fields(ref_text="hi"), 400, "invalid_value", "ref_text"),
    ("transcript too long", _clone(ref_audio=NOISE) | _fields(ref_text="x" * 5000), 400, "invalid_value", "ref_text"),
    ("x-vector string", _fields(x_vector_only_mode="yes"), 400, "invalid_value", "x_vector_only_mode"),
    ("Base without a recording", _fields(model=BASE), 400, "invalid_value", "ref_audio"),
    ("seed on espeak", _fields(seed=1), 400, "invalid_value", "seed"),
    ("seed negative", _fields(seed=-2), 400, "invalid_value", "seed"),
    ("seed huge", _fields(seed=2**64), 400, "invalid_value", "seed"),
    ("seed fraction", _fields(seed=1.5), 400, "invalid_value", "seed"),
    ("temperature negative", _fields(temperature=-0.1), 400, "invalid_value", "temperature"),
    ("temperature large", _fields(temperature=2.1), 400, "invalid_value", "temperature"),
    ("top_k negative", _fields(top_k=-1), 400, "invalid_value", "top_k"),
    ("top_p zero", _fields(top_p=0), 400, "invalid_value", "top_p"),
    ("top_p above one", _fields(top_p=1.1), 400, "invalid_value", "top_p"),
    ("penalty small", _fields(repetition_penalty=0.1), 400, "invalid_value", "repetition_penalty"),
    ("frames zero", _fields(max_new_tokens=0), 400, "invalid_value", "max_new_tokens"),
    ("keep_alive words", _fields(keep_alive="a while"), 400, "invalid_value", "keep_alive"),
    ("keep_alive list", _fields(keep_alive=[1]), 400, "invalid_value", "keep_alive"),
    ("body empty", _raw(b""), 400, "invalid_json", None),
    ("body not JSON", _raw(b"input=hello"), 400, "invalid_json", None),
    ("body cut", _raw(b'{"input": "hel'), 400, "invalid_json", None),
    ("body list", _raw(b'["hello"]'), 400, "invalid_json", None),
    ("body string", _raw(b'"hello"'), 400, "invalid_json", None),
    ("body null", _raw(b"null"), 400, "invalid_json", None),
    ("body NaN", _raw(b'{"input": "hello", "speed": NaN}'), 400, "invalid_json", None),
    ("body Infinity", _raw(b'{"input": "hello", "speed": Infinity}'), 400, "invalid_json", None),
    ("body number out of range", _raw(b'{"input": "hello", "speed": 1e999}'), 400, "invalid_value", "speed"),
    ("body deep", _raw(b'{"input": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"), 400, "invalid_json", None),
    ("body Latin-1", _raw('{"input": "é"}'.encode("latin-1")), 400, "invalid_json", None),
    ("body UTF-16 without a mark", _raw('{"input": "é"}'.encode("utf-16-le")), 400, "invalid_json", None),
    ("body surrogate bytes", _raw(b'{"input": "\xed\xa0\x80"}'), 400, "invalid_json", None),
    ("key twice, the last wrong", _raw(b'{"input": "hello", "input": 1}'), 400, "invalid_value", "input"),
    ("body too large", _raw(b'{"input": "' + b"x" * 1_100_000 + b'"}'), 413, "request_too_large", None),
    ("form", {"data": {"input": "hello"}}, 415, "unsupported_media_type", None),
    ("multipart", {"files": {"input": b"hello"}}, 415, "unsupported_media_type", None),
    (
        "charset unknown",
        _raw(b"{}", content_type="application/json; charset=klingon"),
        415,
        "unsupported_media_type",
        None,
    ),
    ("charset no text", _raw(b"{}", content_type="application/json; charset=hex"), 415, "unsupported_media_type", None),
    (
        "charset slow",
        _raw(b"{}", content_type="application/json; charset=punycode"),
        415,
        "unsupported_media_type",
        None,
    ),
    ("charset wrong", _raw(b'{"input": "\xff"}', content_type="text/json; charset=ascii"), 400, "invalid_json", None),
    ("msgpack", _raw(b"\x81", content_type="application/msgpack"), 415, "unsupported_media_type", None),
    ("strange media type", _raw(b"{}", content_type="a;;=;"), 415, "unsupported_media_type", None),
]
FINE: list[tuple[str, dict[str, Any]]] = [
    ("unknown fields", _fields(frobnicate=[1, {"a": None}])),
    ("nulls", _fields(model=None, voice=None, speed=None, stream=None, instructions=None, response_format=None)),
    ("alias", {"json": {"text": "hello"}}),
    ("alias beside null", {"json": {"text": "hello", "input": None}}),
    ("empty instructions", _fields(instructions="")),
    ("key twice, the last right", _raw(b'{"input": 1, "input": "hello"}')),
    ("no media type", _raw(b'{"input": "hello"}', content_type="")),
    ("media type with charset", _raw(b'{"input": "hello"}', content_type="application/json; charset=utf-8")),
    ("Accept of something else", _raw(b'{"input": "hello"}', accept="image/png")),
    ("request id abused", _raw(b'{"input": "hello"}', x_request_id="a" * 5000)),
    ("header long", _raw(b'{"input": "hello"}', x_thing="a" * 20_000)),
    ("emoji", _fields(input="👋")),
    ("right to left", _fields(input="\u202eabc")),
]


@pytest_asyncio.fixture(loop_scope="session")
async def client(serve: Serve) -> httpx.AsyncClient:
    """A client of an application that takes bodies of up to 1 MiB."""
    return await serve(max_body_mb=1)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
@SHARED_LOOP
async def test_bad_speech_request(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, case: Case) -> None:
    """Status, code and param follow the contract, in OpenAI's shape; the log has one line, at level info."""
    _, request, status, code, param = case
    with caplog.at_level(logging.WARNING), structlog.testing.capture_logs() as logged:
        answer = await client.post(SPEECH, **request)
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert len(error["message"]) < 2000
    assert not [word for word in OF_PYTHON if word in error["message"]]
    assert answer.headers["x-request-id"]
    assert not caplog.records
    assert [(line["event"], line["log_level"]) for line in logged] == [("request_refused", "info")]


@pytest.mark.parametrize(("name", "request_"), FINE, ids=[case[0] for case in FINE])
@SHARED_LOOP
async def test_odd_but_correct_speech_request(client: httpx.AsyncClient, name: str, request_: dict[str, Any]) -> None:
    """Odd requests that clients send in good faith are spoken."""
    _ = name
    answer = await client.post(SPEECH, **request_)
    assert answer.status_code == 200, answer.text
    assert len(answer.headers["x-request-id"]) <= 128


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/readyz", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/docs/nothing", 404, "not_found"),
        ("GET", "/docs/static/../../app.py", 404, "not_found"),
        ("GET", "/docs/static/VERSIONS.md", 404, "not_found"),
        ("GET", "/%00", 404, "not_found"),
        ("GET", "/%ff%fe", 404, "not_found"),
        ("GET", "/" + "a" * 5000, 404, "not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/models/some/thing", 404, "model_not_found"),
        ("GET", "/v1/audio/voices/none", 404, "voice_not_found"),
        ("DELETE", "/v1/audio/voices/none", 404, "voice_not_found"),
        ("GET", "/v1/audio/voices?model=none", 404, "model_not_found"),
        ("GET", "/v1/audio/voices?legacy=perhaps", 400, "invalid_value"),
        ("POST", "/admin/cleanup?trigger=perhaps", 400, "invalid_value"),
        ("POST", "/admin/models/espeak-ng/paint", 400, "invalid_value"),
        ("POST", "/admin/models/none/load", 404, "model_not_found"),
        ("POST", "/v1/audio/voices", 400, "invalid_json"),
    ],
)
@SHARED_LOOP
async def test_bad_path(client: httpx.AsyncClient, method: str, path: str, status: int, code: str) -> None:
    """Unknown paths, resources and query values get the same envelope."""
    answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "hinted"),
    [
        *[("/audio/speech", True), ("/models", True), ("/audio", False)],
        *[("/v1/v1/audio/speech", True), ("/v1/v1/models", True), ("/v1/audio/nothing", False)],
    ],
)
@SHARED_LOOP
async def test_a_wrong_base_url(client: httpx.AsyncClient, path: str, *, hinted: bool) -> None:
    """If /v1 is missing in a client's base URL, or stands there twice, the message says so."""
    answer = await client.post(path, json={"input": "hello"})
    assert answer.status_code == 404
    assert ("base URL" in answer.json()["error"]["message"]) == hinted


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", SPEECH, {"POST", "OPTIONS"}),
        ("DELETE", "/v1/models", {"GET", "HEAD", "OPTIONS"}),
        ("PUT", "/v1/audio/voices", {"GET", "HEAD", "POST", "OPTIONS"}),
        ("PATCH", "/health", {"GET", "HEAD", "OPTIONS"}),
        ("PUT", "/v1/audio/voices/x", {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}),
    ],
)
@SHARED_LOOP
async def test_wrong_method(client: httpx.AsyncClient, method: str, path: str, allowed: set[str]) -> None:
    """405 with the envelope, and an Allow header with the possible methods, as the response to OPTIONS has it."""
    answer = await client.request(method, path)
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert f"{method} {path} is not possible; possible: " in answer.json()["error"]["message"]
    options = await client.options(path)
    assert (options.status_code, set(options.headers["allow"].split(", "))) == (204, allowed)


@SHARED_LOOP
async def test_a_websocket_without_a_handshake(client: httpx.AsyncClient) -> None:
    """The message says what is there."""
    answer = await client.get("/v1/audio/speech/stream")
    assert answer.status_code == 405
    assert "connect to it as a WebSocket (ws://)" in answer.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "files", "code", "param"),
    [
        ({}, {"audio_sample": b"x"}, "invalid_value", "name"),
        ({"name": ""}, {"audio_sample": b"x"}, "invalid_value", "name"),
        ({"name": " "}, {"audio_sample": b"x"}, "invalid_value", "name"),
        ({"name": "a\nb"}, {"audio_sample": b"x"}, "invalid_value", "name"),
        ({"name": "n" * 300}, {"audio_sample": b"x"}, "invalid_value", "name"),
        ({"name": "x", "type": "song"}, {"audio_sample": b"x"}, "invalid_value", "type"),
        ({"name": "x"}, {"other": b"x"}, "invalid_value", "audio_sample"),
        ({"name": "x"}, {"audio_sample": b"no sound at all"}, "invalid_audio", "audio_sample"),
        ({"name": "x", "audio_sample": "text"}, {"other": b"x"}, "invalid_value", "audio_sample"),
        ({"name": "x", "type": "prompt"}, {"other": b"x"}, "invalid_value", "prompt"),
        ({"name": "x", "type": "prompt", "prompt": "p" * 5000}, {"other": b"x"}, "invalid_value", "prompt"),
        ({"name": "x", "type": "prompt", "prompt": " "}, {"other": b"x"}, "invalid_value", "prompt"),
        (DESIGN | {"script_hint": "short"}, {"other": b"x"}, "invalid_value", "script_hint"),
        (DESIGN | {"script_hint": "." * 50}, {"other": b"x"}, "invalid_value", "script_hint"),
        (DESIGN | {"script_hint": "s" * 401}, {"other": b"x"}, "invalid_value", "script_hint"),
        (DESIGN | {"model": "m" * 201}, {"other": b"x"}, "invalid_value", "model"),
        ({"name": "x", "name ": "y", "type": ""}, {"audio_sample": b"no sound"}, "invalid_audio", "audio_sample"),
    ],
)
@SHARED_LOOP
async def test_bad_voice_form(
    client: httpx.AsyncClient, fields: dict[str, str], files: dict[str, bytes], code: str, param: str
) -> None:
    """The error of a wrong form names the field at fault."""
    answer = await client.post("/v1/audio/voices", data=fields, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert not [word for word in OF_PYTHON if word in error["message"]]


@pytest.mark.parametrize(
    ("request_", "status", "code", "param"),
    [
        ({"json": {"name": "x"}}, 400, "invalid_value", "audio_sample"),
        ({"json": {"name": "x", "audio_sample": "UklGRg=="}}, 400, "invalid_value", "audio_sample"),
        ({"json": {"type": "prompt", "prompt": "calm"}}, 400, "invalid_value", "name"),
        ({"json": {"name": 7, "type": "prompt", "prompt": "calm"}}, 400, "invalid_value", "name"),
        ({"json": DESIGN | {"prompt": ["calm"]}}, 400, "invalid_value", "prompt"),
        ({"json": ["x"]}, 400, "invalid_json", None),
        (_raw(b"{"), 400, "invalid_json", None),
        (_raw(b"name=x", content_type="application/x-www-form-urlencoded"), 415, "unsupported_media_type", None),
        (_raw(b"\x81", content_type="application/msgpack"), 415, "unsupported_media_type", None),
        (_raw(b'{"name": "' + b"x" * 1_100_000 + b'"}'), 413, "request_too_large", None),
    ],
)
@SHARED_LOOP
async def test_bad_voice_in_json(
    client: httpx.AsyncClient, request_: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    """The error of wrong JSON is as that of a wrong form."""
    answer = await client.post("/v1/audio/voices", **request_)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert not [word for word in OF_PYTHON if word in error["message"]]


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        (
            b"--x\r\nContent-Disposition: form-data; name=name\r\n\r\n\xff\xfe\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
        *(
            (
                b"\r\n".join(
                    [
                        b"--x",
                        b"Content-Disposition: form-data; name=a",
                        b"Content-Type: text/plain; charset=" + charset,
                        b"",
                        b"a\\ud800",
                    ]
                )
                + b"\r\n--x--\r\n",
                "multipart/form-data; boundary=x",
            )
            for charset in (b"no", b"undefined", b"punycode")
        ),
        (b"--x\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
    ],
)
@SHARED_LOOP
async def test_broken_form(client: httpx.AsyncClient, content: bytes, content_type: str) -> None:
    """A form that is none is the client's mistake."""
    answer = await client.post("/v1/audio/voices", content=content, headers={"content-type": content_type})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "request_", "message"),
    [
        (SPEECH, {"json": {"input": 7}}, "input: must be a string, not a number."),
        (SPEECH, {"json": {"input": ""}}, "input: must not be empty."),
        (
            SPEECH,
            {"json": {"input": "x", "response_format": "midi"}},
            "response_format: must be one of mp3, opus, aac, flac, wav, pcm, ogg, ulaw, alaw, not 'midi'.",
        ),
        (SPEECH, {"json": {"input": "x", "voice": []}}, "voice: must be a string or an object, not a list."),
        (SPEECH, {"json": {"input": "x", "voice": {}}}, "voice: needs the field id."),
        (SPEECH, {"json": {"input": "x", "voice": {"id": ""}}}, "voice.id: must not be empty."),
        (SPEECH, {"json": {"input": "x", "pronunciations": {"": "y"}}}, "pronunciations (a key): must not be empty."),
        (
            SPEECH,
            {"json": {"input": "x", "pronunciations": {"x": 1}}},
            "pronunciations (a value): must be a string, not a number.",
        ),
        (SPEECH, {"json": {"input": "x", "speed": 9}}, "speed: must be at most 4."),
        (SPEECH, {"json": {"input": "x", "top_p": 0}}, "top_p: must be more than 0."),
        (SPEECH, {"json": {"input": "x", "seed": 1.5}}, "seed: must be a whole number."),
        (SPEECH, {"json": {"input": "x", "model": "m" * 201}}, "model: must have at most 200 characters."),
        (
            SPEECH,
            {"json": {"input": "x" * 4097}},
            "input: must have at most 4096 characters (TTS_MAX_INPUT_CHARS), not 4097.",
        ),
        (SPEECH, {"content": b'{"input": "x'}, "The body is not valid JSON: it ends too early."),
        (
            SPEECH,
            {"content": b"x" * 2**21, "headers": {"content-type": "application/json"}},
            "The request's body is larger than the 1 MiB that this server takes (TTS_MAX_BODY_MB).",
        ),
        (VOICES, {"files": [("name", ("n", b"x")), SOUND]}, "name: must be a string, not a file."),
        (VOICES, {"files": [("name", (None, "x")), ("audio_sample", (None, "x"))]}, "audio_sample: must be a file."),
        (
            VOICES,
            {"files": [("name", (None, "x")), ("audio_sample", (None, b"\xff\xfb\x90"))]},
            "The form contains text that is not UTF-8. A part that is a file needs a filename.",
        ),
        (
            VOICES,
            {"files": [("name", (None, "x")), ("audio_sample", ("s" * 5_000, b"x"))]},
            "The form has more than a thousand parts, or a part with more than 4 KiB or 8 lines of headers.",
        ),
        (
            VOICES,
            {"files": [("name", (None, "x")), ("type", (None, "song")), SOUND]},
            "type: must be one of audio_sample, prompt, clone, not 'song'.",
        ),
        (
            "/admin/models/espeak-ng/paint",
            {},
            "action: must be one of load, unload, pin, unpin, not 'paint'.",
        ),
        ("/admin/cleanup?trigger=perhaps", {}, "trigger: must be true or false."),
    ],
)
@SHARED_LOOP
async def test_messages(client: httpx.AsyncClient, path: str, request_: dict[str, Any], message: str) -> None:
    """A message names the field, and the choices or the limits, in plain words."""
    assert (await client.post(path, **request_)).json()["error"]["message"] == message


@pytest.mark.parametrize("chunked", [False, True])
@SHARED_LOOP
async def test_the_refusal_of_a_huge_body_arrives(client: httpx.AsyncClient, chunked: bool) -> None:  # noqa: FBT001 - pytest
    """A client that is still sending when its request is refused reads the refusal and sees no reset."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 1_000_000

    content = pieces() if chunked else b"x" * 40_000_000
    answer = await client.post(SPEECH, content=content, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.slow
@SHARED_LOOP
async def test_disconnecting_within_the_body(client: httpx.AsyncClient) -> None:
    """A client that disconnects within its body causes no error in the log, and the next client is served."""
    head = f"POST {SPEECH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    with structlog.testing.capture_logs() as logged:
        _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(head.encode())
        await writer.drain()
        assert (await client.get("/health")).status_code == 200
        writer.close()
        await writer.wait_closed()
        for _ in range(20):
            assert (await client.post(SPEECH, json={"input": "x"})).status_code == 200
    assert not [line for line in logged if line["log_level"] == "error"]


def test_the_table_is_long_enough() -> None:
    """The contract asks for sixty cases."""
    assert len(CASES) >= 60
