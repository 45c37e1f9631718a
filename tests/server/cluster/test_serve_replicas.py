"""The replicas over the handle of their deployment; a fake stands for the handle."""

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray defines its own schemas in a deprecated way
    from ray.serve.exceptions import RayServeException

    from server.cluster.router_base import RouterBase
    from server.cluster.serve_replicas import ServeReplicas

pytestmark = pytest.mark.slow


async def test_a_first_request_that_fails_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next look, without a traceback in the log: replicas that start may fail many times."""
    monkeypatch.setattr(RouterBase, "current", None)
    asked = 0

    async def remote() -> None:
        nonlocal asked
        asked += 1
        raise RayServeException("the deployment is gone")

    handle: Any = SimpleNamespace(name=SimpleNamespace(remote=remote))
    replicas = ServeReplicas(handle)
    for _ in range(2):
        assert not replicas.ids()
        introduction: Any = replicas._introduction
        await asyncio.wait([introduction])
        assert introduction.exception() is None
    assert asked == 2
