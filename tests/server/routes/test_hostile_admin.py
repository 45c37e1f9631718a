"""Hostile requests to /admin: each is refused with the envelope, and none reaches the GPU worker."""

from typing import Any, Final

import httpx
import pytest

from shared.protocol import Call, Failed, Reply
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, Serve

pytestmark = SHARED_LOOP

LONG: Final = "a" * 5_000
LOAD: Final = "/admin/models/espeak-ng/load"

REFUSED: Final[list[tuple[str, str, int]]] = [
    # Names that are no names, and paths that want to be others.
    *[
        ("POST", f"/admin/models/{name}/load", 404)
        for name in ("%00", "%ff%fe", "%0d%0aX:1", LONG, "%F0%9F%98%80", "..")
    ],
    ("POST", "/admin/models/..%2f..%2fetc%2fpasswd/load", 404),
    ("POST", "/admin/models/a/b/c/d/load", 404),
    ("POST", "/admin/models/%2e%2e/%2e%2e/load", 404),
    ("POST", "/admin/models//load", 404),
    ("POST", "/admin/../admin/stats", 405),
    ("POST", f"/admin/models/espeak-ng/{LONG}", 400),
    ("POST", "/admin/models/espeak-ng/load%00", 400),
    ("POST", "/admin/models/espeak-ng/LOAD%0a", 400),
    *[("DELETE", f"/admin/cache/{name}", 400) for name in ("%00", "all", "*", "tokens%00", LONG)],
    # Values that are none.
    *[
        ("POST", f"{LOAD}?keep_alive={value}", 400)
        for value in ("nan", "inf", "1e999", "9" * 400, "5y", "%00", "1h-30m", LONG, "0x10", "%D9%A3s")
    ],
    *[("POST", f"/admin/cleanup?trigger={value}", 400) for value in ("2", "%00", "truetrue", "[]", LONG)],
    *[
        ("GET", f"/admin/usage?from={value}", 400)
        for value in ("0000-00-00", "10000-01-01", "2026-13-01", "now", "%00", "'%20OR%201=1--", "-1", LONG, "9" * 40)
    ],
    ("GET", "/admin/usage?from=2026-02-01&to=2026-01-01", 400),
    ("GET", "/admin/events?once=perhaps", 400),
    # Methods that change what only reads, and read what only changes.
    *[
        ("POST", f"/admin/{path}", 405)
        for path in ("config", "stats", "vram", "usage", "cache", "events", "performance")
    ],
    *[("DELETE", f"/admin/{path}", 405) for path in ("config", "cleanup", "models/espeak-ng/load")],
    ("GET", "/admin/cleanup", 405),
    ("GET", LOAD, 405),
    ("PUT", "/admin/cache/tokens", 405),
]


@pytest.mark.slow
@pytest.mark.parametrize("asked", REFUSED, ids=lambda asked: f"{asked[0]} {asked[1][:60]}")
async def test_refused(client: httpx.AsyncClient, worker: FakeWorker, asked: tuple[str, str, int]) -> None:
    """A 4xx with the envelope, a request id and a short message; the GPU worker hears nothing of it."""
    method, path, status = asked
    url = client.base_url.copy_with(raw_path=path.encode())
    answer = await client.request(method, url)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"]
    assert len(error["message"]) < 500
    assert answer.headers["x-request-id"]
    assert worker.of(Call) == []


@pytest.mark.parametrize(
    "sent",
    [
        {"headers": {"content-type": "x" * 3000}},
        {"headers": {"accept": ",;q=" * 1000, "accept-language": b"\xff" * 100}},
        {"headers": {"x-forwarded-for": "a, b, ::1, %00", "x-forwarded-host": "@" * 2000, "x-request-id": "x" * 5000}},
        {"params": [("trigger", "false")] * 500 + [("a[b][c]", "d")] * 500},
    ],
    ids=["type", "accept", "forwarded", "repeated"],
)
async def test_what_is_not_asked_for_means_nothing(
    client: httpx.AsyncClient, worker: FakeWorker, sent: dict[str, Any]
) -> None:
    """Headers and parameters that no route of /admin takes change no answer."""
    worker.on_call = lambda call, _: Reply(id=call.id)
    for method, path in (("GET", "/admin/stats"), ("GET", "/admin/usage"), ("POST", "/admin/cleanup")):
        answer = await client.request(method, path, **sent)
        assert answer.status_code == httpx.codes.OK, (path, answer.text)


async def test_the_worker_s_words_stay_json(serve: Serve, worker: FakeWorker) -> None:
    """A failure of the GPU worker with hostile words in it is one error, whatever the words are."""
    client = await serve()
    words = 'no\r\nX-Injected: 1\r\n\r\n<script>alert(1)</script>\u2028"}'
    worker.on_call = lambda call, _: Failed(id=call.id, code="model_busy", message=words, param="model")
    answer = await client.post(LOAD)
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, words)
    assert "x-injected" not in answer.headers
    assert answer.headers["content-type"] == "application/json"
