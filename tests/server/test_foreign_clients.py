"""Requests byte for byte as Open WebUI and SillyTavern make them, and what they read in the answers.

Neither is a package that a test could import. These facts are from their sources:

- Open WebUI 0.7.0 (`backend/open_webui/routers/audio.py`): the browser's `input` and `voice`, and the `model` of the
  settings behind them, in a `json.dumps` with ASCII alone. aiohttp sends it. A key that is not set leaves an empty
  one behind `Bearer`. The lists of voices and models are read without a key, as `voices[].id`, `voices[].name` and
  `models[].id`. A failed answer is read for `error`.
- SillyTavern 1.13.0 (`src/endpoints/openai.js`, `generate-voice` and `custom/generate-voice`): a `JSON.stringify` of
  `input`, `response_format`, `voice`, `speed` and `model`, in UTF-8, where half of a surrogate pair is written
  as an escape. node-fetch sends it. Any answer of status 200 is taken for MP3.
"""

import json
from typing import Any, Final

import httpx
import pytest

from shared.protocol import Segment, Speak
from tests.audio import decode
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, exchange

pytestmark = SHARED_LOOP

OPEN_WEBUI: Final = {
    "Host": "{host}",
    "Content-Type": "application/json",
    "Authorization": "Bearer ",
    "X-OpenWebUI-User-Name": "Ren%C3%A9e",
    "X-OpenWebUI-User-Id": "9d2b1f4e-1f6a-4c6c-8a3e-0c5b3a0f7f11",
    "X-OpenWebUI-User-Email": "renee@example.com",
    "X-OpenWebUI-User-Role": "admin",
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate",
    "User-Agent": "Python/3.11 aiohttp/3.12.15",
}
SILLY_TAVERN: Final = {
    "Content-Type": "application/json",
    "Authorization": "Bearer ",
    "User-Agent": "node-fetch",
    "Accept-Encoding": "gzip, deflate, br",
    "Accept": "*/*",
    "Connection": "keep-alive",
    "Host": "{host}",
}

CASES: Final = {
    "Open WebUI, a sentence": (
        OPEN_WEBUI,
        b'{"input": "Good morning, Ren\\u00e9e \\u2014 it\'s 7 a.m.", "voice": "alloy", "model": "tts-1"}',
        "Good morning, Ren\xe9e \u2014 it's 7 a.m.",
    ),
    "Open WebUI, an emoji": (
        OPEN_WEBUI,
        b'{"input": "Hi \\ud83d\\ude0a", "voice": "Alloy", "model": "tts-1-hd"}',
        "Hi \U0001f60a",
    ),
    "Open WebUI, half an emoji": (
        OPEN_WEBUI,
        b'{"input": "Hi \\ud83d", "voice": "alloy", "model": "tts-1"}',
        "Hi \ufffd",
    ),
    "Open WebUI, nothing set": (OPEN_WEBUI, b'{"input": "Hello.", "voice": "", "model": ""}', "Hello."),
    "Open WebUI, parameters of its own": (
        OPEN_WEBUI,
        b'{"input": "Hello.", "voice": "alloy", "model": "tts-1", "speed": "1.0", "response_format": "MP3"}',
        "Hello.",
    ),
    "SillyTavern, OpenAI": (
        SILLY_TAVERN,
        '{"input":"\u201cA Caf\xe9?\u201d","response_format":"mp3","voice":"nova","speed":1,"model":"tts-1"}'.encode(),
        "\u201cA Caf\xe9?\u201d",
    ),
    "SillyTavern, a snapshot's speed": (
        SILLY_TAVERN,
        b'{"input":"Hello.","response_format":"mp3","voice":" shimmer","speed":1.05,"model":"tts-1"}',
        "Hello.",
    ),
    "SillyTavern, half an emoji": (
        SILLY_TAVERN,
        b'{"input":"Hi \\ud83d","response_format":"mp3","voice":"alloy","speed":1,"model":"tts-1"}',
        "Hi \ufffd",
    ),
}


async def sent(client: httpx.AsyncClient, head: dict[str, str], body: bytes) -> httpx.Response:
    """The answer to exactly these bytes."""
    url = client.base_url
    host = f"{url.host}:{url.port}"
    lines = ["POST /v1/audio/speech HTTP/1.1", *(f"{name}: {value}".format(host=host) for name, value in head.items())]
    request = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
    status, headers, pieces = await exchange(client, request)
    # The framing is read already.
    kept = [(name, value) for name, value in headers.items() if name != "transfer-encoding"]
    return httpx.Response(status, headers=kept, content=b"".join(pieces))


@pytest.mark.parametrize(("head", "body", "text"), CASES.values(), ids=CASES)
async def test_a_request_is_spoken(
    client: httpx.AsyncClient, worker: FakeWorker, head: dict[str, str], body: bytes, text: str
) -> None:
    """The answer is MP3, and the GPU worker got the text."""
    answer = await sent(client, head, body)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/mpeg"), answer.text
    assert decode(answer.content, "mp3")
    [speak] = worker.of(Speak)
    assert speak.segments == [Segment(text=text)]


@pytest.mark.parametrize("text", ["---", "*", "\u2026", "```"])
async def test_a_piece_without_words_is_silence(client: httpx.AsyncClient, worker: FakeWorker, text: str) -> None:
    """Both split an answer into pieces, some of punctuation alone. One that is refused would end the playing."""
    for head in (OPEN_WEBUI, SILLY_TAVERN):
        answer = await sent(client, head, json.dumps({"input": text, "voice": "alloy", "model": "tts-1"}).encode())
        assert answer.status_code == 200
        assert decode(answer.content, "mp3")
    assert worker.of(Speak) == []


async def test_a_refusal_has_words_for_open_webui(client: httpx.AsyncClient) -> None:
    """Open WebUI shows the value of `error` to its user."""
    answer = await sent(client, OPEN_WEBUI, b'{"input": "Hello.", "voice": "nobody", "model": "tts-1"}')
    assert answer.status_code == 400
    assert "nobody" in answer.json()["error"]["message"]


async def test_the_lists_of_open_webui(client: httpx.AsyncClient) -> None:
    """Each voice has `id` and `name`, each model an `id`; both can be asked for right away."""
    voices: list[Any] = (await client.get("/v1/audio/voices")).json()["voices"]
    models: list[Any] = (await client.get("/v1/audio/models")).json()["models"]
    assert len({voice["id"]: voice["name"] for voice in voices}) == len(voices) > 13
    assert "espeak-ng" in {model["id"] for model in models}
    body = json.dumps({"input": "Hello.", "voice": voices[-1]["id"], "model": "tts-1"}).encode()
    assert (await sent(client, OPEN_WEBUI, body)).status_code == 200
