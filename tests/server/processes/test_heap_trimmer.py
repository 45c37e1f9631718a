"""A web worker gives the memory of its requests back to the kernel."""

import pytest

from server.http.open_requests import OpenRequests
from server.processes.heap_trimmer import MANY, HeapTrimmer

SCOPE = {"client": ("127.0.0.1", 4711)}


async def test_the_heap_is_trimmed_after_each_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each time that most of many requests have ended, not while they last, and never for a few."""
    trims: list[None] = []
    monkeypatch.setattr("server.processes.heap_trimmer.trim_heap", lambda: trims.append(None))
    requests = OpenRequests()
    trimmer = HeapTrimmer(requests)
    for number, expected in ((MANY - 1, 0), (MANY, 1), (10 * MANY, 2)):
        opened = [requests.begin(SCOPE, has_body=False) for _ in range(number)]
        await trimmer.check()
        for request in opened[number // 4 :]:
            await trimmer.check()
            requests.end(request)
        await trimmer.check()
        await trimmer.check()
        assert len(trims) == expected
        for request in opened[: number // 4]:
            requests.end(request)
