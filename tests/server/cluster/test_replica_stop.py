"""The moment at which a replica hears of its end."""

import asyncio
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray defines its own schemas in a deprecated way
    from ray.serve._private.replica import Replica

    from server.cluster import replica_stop

pytestmark = pytest.mark.slow


async def test_a_replica_that_serve_takes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hears of it before Serve waits for its requests, and once, although Serve asks again."""
    heard: list[str] = []

    async def shut_down(_serve_replica: Replica) -> None:
        await asyncio.sleep(0)
        heard.append("Serve waits")

    monkeypatch.setattr(replica_stop, "_shut_down", shut_down)
    monkeypatch.setattr(Replica, "perform_graceful_shutdown", Replica.perform_graceful_shutdown)
    replica_stop.on_stop(lambda: heard.append("it ends"))
    for _ in range(2):
        await Replica.perform_graceful_shutdown(object.__new__(Replica))
    assert heard == ["it ends", "Serve waits", "Serve waits"]
