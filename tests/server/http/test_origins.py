"""Web pages of other sites: CORS, and the refusal of requests that CORS lets through."""

import pytest

from shared.protocol import Speak
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, Serve

pytestmark = SHARED_LOOP

FOREIGN = "https://evil.example"
GOOD = "https://good.example"


@pytest.mark.parametrize(
    ("headers", "origins", "allowed"),
    [
        ({}, [], True),
        ({"origin": FOREIGN}, [], False),
        ({"origin": "null"}, [], False),
        ({"origin": FOREIGN}, [GOOD], False),
        ({"origin": GOOD}, [GOOD], True),
        ({"origin": FOREIGN}, ["*"], True),
        ({"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}, [], True),
        ({"origin": "http://localhost:8000", "host": "localhost:8000"}, [], True),
        ({"origin": "http://[::1]:8000", "host": "[::1]:8000"}, [], True),
        ({"origin": "https://192.168.1.5", "host": "192.168.1.5"}, [], True),
        ({"origin": "http://127.0.0.1:3000", "host": "127.0.0.1:8000"}, [], False),
        ({"origin": "http://rebound.example:8000", "host": "rebound.example:8000"}, [], False),
        ({"origin": "http://localhost.example", "host": "localhost.example"}, [], False),
        ({"sec-fetch-site": "cross-site"}, [], False),
        ({"sec-fetch-site": "same-origin"}, [], True),
    ],
)
async def test_pages_of_other_sites_are_refused(
    serve: Serve, worker: FakeWorker, headers: dict[str, str], origins: list[str], *, allowed: bool
) -> None:
    """Without keys, speech and administration answer only our own pages and those of the configured origins."""
    client = await serve(cors_origins=origins)
    spoken = await client.post(SPEECH, content=b'{"input": "x"}', headers=headers)
    cleaned = await client.post("/admin/cleanup", headers=headers)
    assert (await client.get("/health", headers=headers)).status_code == 200
    for answer in (spoken, cleaned):
        assert answer.status_code == (200 if allowed else 403)
        if not allowed:
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "foreign_origin")
            assert "TTS_CORS_ORIGINS" in error["message"]
    assert len(worker.of(Speak)) == allowed


async def test_a_page_with_a_key_is_allowed(serve: Serve) -> None:
    """A page that knows a key may call from any site; without a key, open speech refuses it."""
    client = await serve(admin_keys=["boss"])
    headers = {"origin": FOREIGN, "authorization": "Bearer boss"}
    assert (await client.post("/admin/cleanup", headers=headers)).status_code == 200
    assert (await client.post(SPEECH, json={"input": "x"}, headers=headers)).status_code == 200
    assert (await client.post(SPEECH, json={"input": "x"}, headers={"origin": FOREIGN})).status_code == 403


@pytest.mark.parametrize(
    ("origins", "allowed", "credentials"),
    [([], None, None), (["*"], "*", None), ([GOOD], GOOD, "true"), ([FOREIGN], None, None)],
)
async def test_cors(serve: Serve, origins: list[str], allowed: str | None, credentials: str | None) -> None:
    """No other site may call by default; `*` never goes with credentials."""
    client = await serve(cors_origins=origins)
    answer = await client.get("/v1/models", headers={"origin": GOOD})
    preflight = await client.options(SPEECH, headers={"origin": GOOD, "access-control-request-method": "POST"})
    assert answer.headers.get("access-control-allow-origin") == allowed
    if allowed is not None:
        assert answer.headers.get("access-control-allow-credentials") == credentials
    assert preflight.headers.get("access-control-allow-origin") == allowed


async def test_a_refused_preflight_has_the_error_envelope(serve: Serve) -> None:
    """A page of a site that is not configured gets the envelope and a request id, a configured one gets 204."""
    client = await serve(cors_origins=[GOOD])
    asked = {"access-control-request-method": "POST"}
    refused = await client.options(SPEECH, headers={"origin": FOREIGN, **asked})
    allowed = await client.options(SPEECH, headers={"origin": GOOD, **asked})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
    assert refused.headers["x-request-id"]
    assert allowed.status_code == 204
