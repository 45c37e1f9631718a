"""The start of an engine replica that fails halfway."""

import asyncio
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from server.cluster.node_settings import settings_for_nodes
from shared.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray defines its own schemas in a deprecated way
    from server.cluster import replica
    from server.cluster.replica import EngineReplica

pytestmark = pytest.mark.slow

End = Callable[[EngineReplica], Awaitable[None]]


class FakeReplicaParts:
    """The supervisor and the client of a replica. Each of `events` says whether the folder was still there."""

    def __init__(self, folder: Path) -> None:
        self.events: list[tuple[str, bool]] = []
        self.exit_code: int | None = 2
        self._folder = folder

    def happens(self, event: str) -> None:
        """Note an event."""
        self.events.append((event, bool(self.opened_folders())))

    def opened_folders(self) -> list[Path]:
        """The folders that the replica has made."""
        return list(self._folder.iterdir())

    # The supervisor:

    def start(self) -> None:
        self.happens("worker starts")

    def stop(self) -> None:
        self.happens("worker stops")

    # The engine client:

    async def __aenter__(self) -> Self:
        self.happens("client opens")
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.happens("client closes")

    def unavailable(self) -> object:
        return "no worker yet"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeReplicaParts:
    """In the places of Ray, Serve, the supervisor and the engine client."""
    parts = FakeReplicaParts(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deployment = SimpleNamespace(deployment="engine", app_name="tts", replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: deployment)
    accelerators = SimpleNamespace(get_accelerator_ids=dict)
    monkeypatch.setattr(replica.ray, "get_runtime_context", lambda: accelerators)
    monkeypatch.setattr(replica.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for name in ("hide_port", "on_stop", "set_up_logging", "deployed_version"):
        monkeypatch.setattr(replica, name, lambda *_: None)
    monkeypatch.setattr(replica, "_supervisor", lambda *_: parts)
    monkeypatch.setattr(replica, "ZmqEngineClient", lambda *_, **_options: parts)
    return parts


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> Iterator[End]:
    """Serve's call after a start, also after one that failed. Python would call it, too, and not await it."""
    end: Any = EngineReplica.__del__
    with monkeypatch.context() as patch:
        patch.delattr(EngineReplica, "__del__")
        yield end


async def fail_to_start(end: End, error: type[Exception]) -> None:
    """Start a replica and end it, as Serve does."""
    started = object.__new__(EngineReplica)
    tasks = asyncio.all_tasks()
    with pytest.raises(error):
        await started.__init__(settings_for_nodes(Settings()))  # type: ignore[misc]
    await end(started)
    left = asyncio.all_tasks() - tasks
    await asyncio.gather(*left, return_exceptions=True)
    assert all(task.cancelled() for task in left)


async def test_its_worker_cannot_run(parts: FakeReplicaParts, end: End) -> None:
    """All that was opened is closed, the last first: the client, the worker, and the folder of their socket."""
    await fail_to_start(end, RuntimeError)
    names = ["client opens", "worker starts", "client closes", "worker stops"]
    assert parts.events == [(name, True) for name in names]
    assert parts.opened_folders() == []


async def test_ray_is_gone(parts: FakeReplicaParts, end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the client is open: it is not closed, and what was there before it is."""
    monkeypatch.delattr(replica.ray.util, "get_node_ip_address")
    await fail_to_start(end, AttributeError)
    assert parts.events == [("worker stops", True)]
    assert parts.opened_folders() == []


async def test_serve_is_gone(parts: FakeReplicaParts, end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is open, nothing is to be closed, and the end hides no error."""
    monkeypatch.delattr(replica.serve, "get_replica_context")
    await fail_to_start(end, AttributeError)
    assert parts.events == []
    assert parts.opened_folders() == []
