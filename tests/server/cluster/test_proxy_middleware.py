"""The middleware of Serve's proxy; tests/cluster has it within a real one."""

from typing import Any

import pytest

from server.cluster.proxy_middleware import middlewares

KEY = "sk-tts-" + "A1b2C3d4" * 5


async def ids_behind_it(*ids: bytes) -> list[bytes]:
    """The ids that Serve sees of a request with these ids."""
    seen: list[bytes] = []

    async def serve(scope: Any, _receive: Any, _send: Any) -> None:
        seen.extend(value for name, value in scope.get("headers", []) if name == b"x-request-id")

    (middleware,) = middlewares()
    proxy = middleware.cls(serve, *middleware.args, **middleware.kwargs)
    await proxy({"type": "http", "headers": [(b"x-request-id", given) for given in ids]}, None, None)
    return seen


async def test_a_sane_id_is_kept() -> None:
    """Serve has the client's own id."""
    assert await ids_behind_it(b"mine-1") == [b"mine-1"]


@pytest.mark.parametrize("given", [b"x" * 4000, b"a b", b"\xff", KEY.encode()])
async def test_another_id_is_replaced(given: bytes) -> None:
    """Too long, unprintable, or a key: Serve has a new one."""
    (seen,) = await ids_behind_it(given)
    assert len(seen) == 32


@pytest.mark.parametrize("given", [[], [b"one", b"two"]])
async def test_a_request_has_one_id(given: list[bytes]) -> None:
    """A request without an id gets one, and one with several keeps one."""
    assert len(await ids_behind_it(*given)) == 1
