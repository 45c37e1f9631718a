"""Twenty keys with mixed limits, and clients that send requests with them, with wrong keys and without one."""

import asyncio
import itertools
from collections import Counter
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec

from server.http.keys import KeyEntry, digest_of
from tests.system.service import Service

KEYS: Final = {f"key{number:02}": f"sk-tts-{number:02}-of-the-keyed-load" for number in range(20)}
"""By name; the first one is an admin's."""

ADMIN: Final = {"authorization": f"Bearer {KEYS['key00']}"}
WRONG_EACH: Final = 50
"""One request in so many has a wrong key."""

_LIMITS: Final[list[dict[str, Any]]] = [
    {"requests_per_minute": 1_000_000, "characters_per_day": 1_000_000_000},
    {"requests_per_minute": 30},
    {"concurrent_requests": 1},
    {"characters_per_day": 600, "priority": "batch"},
]
"""In turns; the second and the last soon refuse."""


def write_keys(path: Path, *, limited: bool = True) -> Path:
    """The file of the keys; unless they are `limited`, every limit is too high to refuse anything."""
    limits = _LIMITS if limited else _LIMITS[:1]
    entries = {
        name: KeyEntry(hash=digest_of(key), role="admin" if name == "key00" else "user", **limits[number % len(limits)])
        for number, (name, key) in enumerate(KEYS.items())
    }
    path.write_bytes(msgspec.toml.encode(entries))
    return path


class KeyedLoad:
    """Clients of all keys in turns. `statuses` counts the answers by key and status."""

    def __init__(self, service: Service, *, at_once: int = 8, text: str = "Good morning.") -> None:
        self._service = service
        self._at_once = at_once
        self._body = {"input": text, "response_format": "pcm"}
        self._names = itertools.cycle(KEYS)
        self._number = itertools.count()
        self.statuses: Counter[tuple[str, int]] = Counter()

    def run(self, requests: int) -> None:
        """Send so many requests, and wait for all answers."""
        asyncio.run(self._run(requests))

    async def _run(self, requests: int) -> None:
        left = iter(range(requests))

        async def client(http: httpx.AsyncClient) -> None:
            for _ in left:
                name = next(self._names)
                is_wrong = next(self._number) % WRONG_EACH == WRONG_EACH - 1
                headers = {"authorization": f"Bearer {'sk-tts-nonsense' if is_wrong else KEYS[name]}"}
                answer = await http.post("/v1/audio/speech", json=self._body, headers=headers)
                self.statuses["wrong" if is_wrong else name, answer.status_code] += 1

        async with httpx.AsyncClient(base_url=self._service.url, timeout=120, trust_env=False) as http:
            await asyncio.gather(*(client(http) for _ in range(self._at_once)))
