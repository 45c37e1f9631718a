"""The version that Serve is to run, as a replica sees it that Serve takes away."""

import asyncio
import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray defines its own schemas in a deprecated way
    from ray.serve.exceptions import RayServeException

    from server.cluster import deployed_version as module

pytestmark = pytest.mark.slow


async def test_only_another_version_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same version means that fewer replicas are wanted; and Serve may say nothing for a while."""
    answers: Iterator[str | RayServeException] = iter(["one", "one", RayServeException("gone"), "one", "two", "three"])

    def deployed_version(deployment: str, application: str) -> str:
        assert (deployment, application) == ("engine", "speech")
        answer = next(answers)
        if isinstance(answer, RayServeException):
            raise answer
        return answer

    monkeypatch.setattr(module, "deployed_version", deployed_version)
    monkeypatch.setattr(module, "_PERIOD_S", 0.001)
    await asyncio.wait_for(module.until_replaced("engine", "speech", "one"), 20)
    assert list(answers) == ["three"]
