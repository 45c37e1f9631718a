"""Fixtures of the tests that speak HTTP: one FakeWorker, and one running application for each configuration.

All of them live in the event loop of the session, so a test that uses them has the mark SHARED_LOOP.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import pytest_asyncio

from server.audio import DecoderPool
from tests.fakes import FakeWorker
from tests.server.running import Serve, Services, becomes


@pytest.fixture(scope="session")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeWorker]:
    """The FakeWorker of all tests."""
    with FakeWorker(tmp_path_factory.mktemp("worker") / "w.ipc") as fake:
        yield fake


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def services(shared_worker: FakeWorker) -> AsyncIterator[Services]:
    """The running applications of all tests."""
    async with AsyncExitStack() as stack:
        yield Services(stack, shared_worker.url)


@pytest_asyncio.fixture(loop_scope="session")
async def worker(shared_worker: FakeWorker) -> FakeWorker:
    """The shared FakeWorker, as if it had just started. It must not be stopped."""
    shared_worker.hold = False
    await becomes(lambda: not shared_worker.busy)
    shared_worker.reset()
    return shared_worker


@pytest.fixture
def serve(services: Services, worker: FakeWorker) -> Serve:
    """A coroutine function that takes settings and returns a client of the application with those settings."""
    _ = worker
    return services.client


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every recording for PCM already: a decoding process starts in 0.1 s, or in 1 s on a busy machine."""

    async def as_it_is(_pool: DecoderPool, data: Any, _param: str = "") -> bytes:
        return data if isinstance(data, bytes) else data.encode()

    monkeypatch.setattr(DecoderPool, "decode", as_it_is)
    monkeypatch.setattr(DecoderPool, "decode_ref_audio", as_it_is)


@pytest_asyncio.fixture(loop_scope="session")
async def client(serve: Serve) -> httpx.AsyncClient:
    """A client of the application with the default settings."""
    return await serve()
