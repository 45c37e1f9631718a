"""Many requests at once: each is answered with its own text or refused clearly, and none is lost."""

import asyncio
from collections import Counter
from collections.abc import Callable

import httpx
import pytest

from tests.recogniser import SENTENCES, recognise
from tests.system.service import Service

TEXTS = [f"{one} {other}" for one in SENTENCES for other in SENTENCES[:10]]


@pytest.mark.soak
@pytest.mark.parametrize(("clients", "every"), [(100, 20), (200, 1)])
async def test_many_at_once(start: Callable[..., Service], clients: int, every: int) -> None:
    """Of many requests at once, each with its own text, every answer says that text or is a 429 with Retry-After.

    The recogniser takes most of the time: the short run listens to every twentieth answer.
    """
    texts = TEXTS[:: len(TEXTS) // clients]
    service = start(WEB_WORKERS=2)
    service.wait_serving(2)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits, trust_env=False) as http:

        async def speak(text: str) -> httpx.Response:
            return await http.post("/v1/audio/speech", json={"input": text, "response_format": "pcm"})

        answers = await asyncio.gather(*(speak(text) for text in texts))
    statuses = Counter(answer.status_code for answer in answers)
    assert sum(statuses.values()) == clients
    assert set(statuses) <= {200, 429}
    # The queue holds 64 requests beside those that run.
    assert statuses[200] >= 64
    spoken = [(text, answer) for text, answer in zip(texts, answers, strict=True) if answer.is_success]
    for text, answer in spoken[::every]:
        assert recognise(answer.content, sentences=2) == text
    for answer in answers:
        if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
    stats = service.stats()
    assert (stats["running"], stats["queued"]) == (0, 0)
    assert (stats["requests"]["finished"], stats["requests"]["rejected"]) == (statuses[200], statuses[429])
