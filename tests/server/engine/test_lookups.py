"""Lookups that routes share, on a fake engine client."""

from typing import Any

import pytest

from server.engine import cached_catalog, find_saved_voice, fresh_catalog, status_of
from server.http.errors import ApiError
from shared.catalog import load_catalog
from shared.protocol import SHARED_VOICES, FindVoice, Reply, SavedVoice, Snapshot
from tests.fakes import a_snapshot

CATALOG = load_catalog()
GRANDMA = SavedVoice(id="v1", name="Grandma", kind="clone", created_at=1, seconds=3.0, in_context=True)


class FakeEngine:
    """The parts of an EngineClient that lookups use; `error` is raised by its two coroutines."""

    def __init__(self, snapshot: Snapshot | None, *, error: ApiError | None = None) -> None:
        self.catalog = CATALOG if snapshot else []
        self.snapshot = snapshot
        self.error = error
        self.calls: list[Any] = []

    def unavailable(self) -> ApiError | None:
        """An error before the first connection."""
        return None if self.snapshot else ApiError("worker_unavailable", "no worker yet")

    async def fresh_snapshot(self, _max_age_s: float) -> Snapshot | None:
        """Replace the snapshot by a later one."""
        if self.error is not None:
            raise self.error
        self.snapshot = a_snapshot(CATALOG, uptime_s=99.0)
        return self.snapshot

    async def call(self, action: Any, **_options: Any) -> Reply:
        """Find the voice."""
        self.calls.append(action)
        if self.error is not None:
            raise self.error
        return Reply(id="c", voice=GRANDMA)


def test_before_the_first_connection() -> None:
    """Without a snapshot there is no catalogue: `worker_unavailable`, with the reason."""
    with pytest.raises(ApiError, match="no worker yet") as caught:
        cached_catalog(FakeEngine(None))  # type: ignore[arg-type]
    assert caught.value.code == "worker_unavailable"


async def test_a_fresh_snapshot_or_the_latest() -> None:
    """A worker that does not answer leaves the latest snapshot."""
    _, snapshot = await fresh_catalog(FakeEngine(a_snapshot(CATALOG)))  # type: ignore[arg-type]
    assert snapshot.uptime_s == 99.0
    silent = FakeEngine(a_snapshot(CATALOG), error=ApiError("worker_unavailable", "silent"))
    _, snapshot = await fresh_catalog(silent)  # type: ignore[arg-type]
    assert snapshot.uptime_s == 12.5


def test_a_model_that_the_snapshot_lacks_is_absent() -> None:
    """The catalogue may have models that the worker has not reported."""
    assert status_of(CATALOG[0], a_snapshot(CATALOG)).state == "resident"
    assert status_of(CATALOG[0], a_snapshot(CATALOG, models=[])).state == "absent"


@pytest.mark.parametrize("name", ["v1", "GRANDMA"])
async def test_a_saved_voice_in_the_snapshot_needs_no_call(name: str) -> None:
    """The id and the name find it, in any case."""
    engine = FakeEngine(a_snapshot(CATALOG, voices=[GRANDMA]))
    assert await find_saved_voice(name, engine, "client", SHARED_VOICES) == GRANDMA  # type: ignore[arg-type]
    assert not engine.calls


async def test_other_saved_voices_are_looked_up() -> None:
    """The worker is asked once; None if it knows no such voice, and its other errors are raised."""
    engine = FakeEngine(a_snapshot(CATALOG))
    assert await find_saved_voice("Grandma", engine, "client", SHARED_VOICES) == GRANDMA  # type: ignore[arg-type]
    assert engine.calls == [FindVoice(name="Grandma")]
    engine.error = ApiError("voice_not_found", "no")
    assert await find_saved_voice("Grandma", engine, "client", SHARED_VOICES) is None  # type: ignore[arg-type]
    engine.error = ApiError("worker_unavailable", "gone")
    with pytest.raises(ApiError, match="gone"):
        await find_saved_voice("Grandma", engine, "client", SHARED_VOICES)  # type: ignore[arg-type]
