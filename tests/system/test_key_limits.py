"""Limits and usage of keys in the real processes: two web workers, one count."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.keys import digest_of
from tests.system.service import Service, eventually

KEYS = 20
TEXT = "Yes."
ROOT = {"authorization": "Bearer root"}


def limits_of(number: int) -> dict[str, int | str]:
    """Every fourth key is limited by the minute, by the day, in its requests at once, or not at all; half are batch."""
    kinds: list[dict[str, int | str]] = [
        {"requests_per_minute": 3 + number},
        {"characters_per_day": len(TEXT) * (5 + number)},
        {"concurrent_requests": 1 + number % 3},
        {},
    ]
    return kinds[number % 4] | {"priority": ("interactive", "batch")[number % 2]}


def write_keys(path: Path) -> None:
    """The file of keys."""
    with path.open("w") as file:
        for number in range(KEYS):
            file.write(f'[k{number}]\nhash = "{digest_of(f"sk-{number}")}"\n')
            for name, value in limits_of(number).items():
                file.write(f"{name} = {value!r}\n".replace("'", '"'))


def usage(service: Service) -> dict[str, dict[str, Any]]:
    """The rows of /admin/usage, by key."""
    rows = service.http.get("/admin/usage", headers=ROOT).json()["data"]
    return {row["key"]: row for row in rows}


def saved(path: Path) -> tuple[int, int]:
    """The requests and the characters in the file of usage. /admin/usage would have the GPU worker write it first."""
    found: tuple[int, int] = (0, 0)
    with (
        contextlib.suppress(sqlite3.OperationalError),  # the table is not there yet
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as file,
    ):
        found = file.execute("SELECT sum(requests), sum(characters) FROM usage").fetchone()
    return found


@pytest.mark.soak
@pytest.mark.parametrize("requests", [300, 2000])
async def test_twenty_keys_and_two_web_workers(tmp_path: Path, start: Callable[..., Service], requests: int) -> None:
    """Each key's count in /admin/usage is exactly what its client counted, and none gets more than its limit."""
    write_keys(tmp_path / "keys.toml")
    service = start(WEB_WORKERS=2, KEYS_FILE=tmp_path / "keys.toml", ADMIN_KEYS="root", MAX_QUEUE=1000)
    taken: Counter[int] = Counter()
    refused: Counter[int] = Counter()
    began = time.monotonic()
    gate = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as http:

        async def ask(number: int) -> None:
            headers = {"authorization": f"Bearer sk-{number}", "connection": "close"}
            body = {"input": TEXT, "response_format": "pcm"}
            async with gate, http.stream("POST", "/v1/audio/speech", json=body, headers=headers) as answer:
                if answer.status_code == httpx.codes.OK:
                    taken[number] += 1
                    await answer.aread()
                    return
                assert answer.status_code == httpx.codes.TOO_MANY_REQUESTS
                await answer.aread()
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
                refused[number] += 1

        await asyncio.gather(*(ask(number % KEYS) for number in range(requests)))
    minutes = (time.monotonic() - began) / 60
    rows = usage(service)
    for number in range(KEYS):
        row, limits, each = rows[f"k{number}"], limits_of(number), requests // KEYS
        assert (row["requests"], row["refusals"]) == (taken[number], refused[number])
        assert row["characters"] == len(TEXT) * taken[number]
        assert taken[number] + refused[number] == each
        match limits:
            case {"requests_per_minute": int(limit)}:
                assert min(each, limit) <= taken[number] <= limit * (1 + minutes) + 1
            case {"characters_per_day": int(limit)}:
                assert taken[number] == min(each, limit // len(TEXT))
            case {"concurrent_requests": int()}:  # a client cannot see when exactly a request of its own has ended
                assert taken[number] > 0
            case _:
                assert taken[number] == each


def test_usage_outlives_a_killed_gpu_worker(tmp_path: Path, start: Callable[..., Service]) -> None:
    """The usage is in the file soon after each request, so limits by the day go on from there after a kill -9."""
    write_keys(tmp_path / "keys.toml")
    service = start(KEYS_FILE=tmp_path / "keys.toml", ADMIN_KEYS="root")
    by_the_day = {"authorization": "Bearer sk-1"}
    assert limits_of(1)["characters_per_day"] == 6 * len(TEXT)

    def speak() -> int:
        body = {"input": TEXT, "response_format": "pcm"}
        return service.http.post("/v1/audio/speech", json=body, headers=by_the_day).status_code

    assert [speak() for _ in range(4)] == [200] * 4
    eventually(lambda: saved(tmp_path / "usage.sqlite") == (4, 4 * len(TEXT)), 60, "the usage in the file")
    stats = service.http.get("/admin/stats", headers=ROOT).json()
    os.kill(stats["worker"]["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = service.http.get("/admin/stats", headers=ROOT)
        return now.is_success and now.json()["worker"]["pid"] != stats["worker"]["pid"] and service.is_ready()

    eventually(is_back, 90, "a new GPU worker")
    assert [speak() for _ in range(3)] == [200, 200, 429]
    row = usage(service)["k1"]
    assert (row["requests"], row["characters"], row["refusals"]) == (6, 6 * len(TEXT), 1)
