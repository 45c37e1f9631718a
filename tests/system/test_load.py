"""Many at once: every request is answered right or refused clearly, none is lost and none is mixed up with another."""

import asyncio
from collections import Counter
from collections.abc import Callable

import httpx

from tests.recogniser import SENTENCES, recognise
from tests.system.service import Service

CLIENTS = 200
TEXTS = [f"{one} {other}" for one in SENTENCES for other in SENTENCES[:10]]


async def test_two_hundred_at_once(start: Callable[..., Service]) -> None:
    """Of 200 requests at once, each with its own text, every answer says that text or is a 429 with its time."""
    service = start(WEB_WORKERS=2)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits, trust_env=False) as http:

        async def speak(text: str) -> httpx.Response:
            return await http.post("/v1/audio/speech", json={"input": text, "response_format": "pcm"})

        answers = await asyncio.gather(*(speak(text) for text in TEXTS))
    statuses = Counter(answer.status_code for answer in answers)
    assert sum(statuses.values()) == CLIENTS
    assert set(statuses) <= {200, 429}
    # The queue takes 64 beside those that speak.
    assert statuses[200] >= 64
    for text, answer in zip(TEXTS, answers, strict=True):
        if answer.status_code == httpx.codes.OK:
            assert recognise(answer.content, sentences=2) == text
        else:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
    stats = service.stats()
    assert (stats["running"], stats["queued"]) == (0, 0)
    assert (stats["requests"]["finished"], stats["requests"]["rejected"]) == (statuses[200], statuses[429])
