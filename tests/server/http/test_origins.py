"""Web pages of other sites: CORS, and the refusal of requests that CORS lets through."""

import socket
from typing import Any

import pytest

from shared.protocol import Call, Failed, ModelStatus, Reply, Speak
from shared.settings import load_settings
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, SPEECH, Serve

pytestmark = SHARED_LOOP

FOREIGN = "https://evil.example"
GOOD = "https://good.example"
EXTENSION = "chrome-extension://abcdefghijklmnopabcdefghijklmnop"


HOST = socket.gethostname().lower()
LOCAL = "127.0.0.1:8000"
"""The Host header that nginx sends with a bare `proxy_pass http://127.0.0.1:8000`."""

SAME = {"sec-fetch-site": "same-origin"}
NAMED = {"allowed_hosts": ["TTS.example", "box:8080"]}
ANY_NAME = {"allowed_hosts": ["*"]}
NO_PROXY = {"trusted_proxies": ["192.0.2.1"]}


@pytest.mark.parametrize(
    ("headers", "settings", "allowed"),
    [
        # No origin: programs, and the requests of old browsers.
        ({}, {}, True),
        ({"sec-fetch-site": "none"}, {}, True),
        (SAME, {}, True),
        ({"sec-fetch-site": "cross-site"}, {}, False),
        ({"sec-fetch-site": "same-site"}, {}, False),
        # Configured origins.
        ({"origin": FOREIGN}, {}, False),
        ({"origin": FOREIGN}, {"cors_origins": [GOOD]}, False),
        ({"origin": GOOD}, {"cors_origins": [GOOD]}, True),
        ({"origin": GOOD, "sec-fetch-site": "cross-site"}, {"cors_origins": [GOOD]}, True),
        ({"origin": FOREIGN}, {"cors_origins": ["*"]}, True),
        ({"origin": EXTENSION}, {"cors_origins": [EXTENSION]}, True),
        ({"origin": EXTENSION}, {}, False),
        # Origins that are no site.
        ({"origin": "null"}, {}, False),
        ({"origin": "null", **SAME}, ANY_NAME, False),
        ({"origin": "https://", "host": ""}, ANY_NAME, False),
        ({"origin": "ws://127.0.0.1:8000", "host": LOCAL}, {}, False),
        # The browser says that the page is not ours.
        ({"origin": "http://127.0.0.1:8000", "host": LOCAL, "sec-fetch-site": "cross-site"}, {}, False),
        ({"origin": "https://tts.example:3000", "host": "tts.example", "sec-fetch-site": "same-site"}, NAMED, False),
        # The browser says that the page is ours, where no rebound page has that header.
        ({"origin": "http://127.0.0.1:8081", "host": LOCAL, **SAME}, {}, True),
        ({"origin": "http://localhost:8081", "host": LOCAL, **SAME}, {}, True),
        ({"origin": "http://[::1]:8081", "host": LOCAL, **SAME}, {}, True),
        ({"origin": "https://own.example", "host": "own.example", **SAME}, {}, True),
        ({"origin": "https://own.example", "host": LOCAL, **SAME}, {}, True),
        ({"origin": "http://rebound.example:8000", "host": "rebound.example:8000", **SAME}, {}, False),
        ({"origin": "http://rebound.example", "host": LOCAL, **SAME}, {}, False),
        # Names of TTS_ALLOWED_HOSTS, whatever a proxy has made of Host.
        ({"origin": "http://tts.example", "host": "tts.example"}, {}, False),
        ({"origin": "http://tts.example", "host": "tts.example"}, NAMED, True),
        ({"origin": "http://tts.example:8082", "host": LOCAL}, NAMED, True),
        ({"origin": "http://box:8080", "host": LOCAL}, NAMED, True),
        ({"origin": "http://box:8081", "host": LOCAL}, NAMED, False),
        ({"origin": "http://tts.example.evil.example", "host": LOCAL}, NAMED, False),
        # Origin and Host agree.
        ({"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}, {}, True),
        ({"origin": "http://localhost:8000", "host": "localhost:8000"}, {}, True),
        ({"origin": "http://[::1]:8000", "host": "[::1]:8000"}, {}, True),
        ({"origin": "https://192.168.1.5", "host": "192.168.1.5"}, {}, True),
        ({"origin": f"http://{HOST}:8000", "host": f"{HOST}:8000"}, {}, True),
        ({"origin": f"http://{HOST}.local:8000", "host": f"{HOST}.local:8000"}, {}, True),
        ({"origin": "http://127.0.0.1:3000", "host": LOCAL}, {}, False),
        ({"origin": "http://rebound.example:8000", "host": "rebound.example:8000"}, {}, False),
        ({"origin": "http://localhost.example", "host": "localhost.example"}, {}, False),
        ({"origin": "http://rebound.example:8000", "host": "rebound.example:8000"}, ANY_NAME, True),
        ({"origin": FOREIGN, "host": LOCAL}, ANY_NAME, False),
        # Origin and X-Forwarded-Host agree; a rebound page can send that header too.
        ({"origin": "http://192.168.1.5", "host": "tts:8000", "x-forwarded-host": "192.168.1.5"}, {}, True),
        ({"origin": "http://192.168.1.5", "host": "tts:8000", "x-forwarded-host": "192.168.1.5"}, NO_PROXY, False),
        ({"origin": "http://rebound.example", "host": LOCAL, "x-forwarded-host": "rebound.example"}, {}, False),
        ({"origin": "http://rebound.example", "host": "rebound.example", "x-forwarded-host": "localhost"}, {}, False),
        # A proxy on this machine has changed Host.
        ({"origin": f"http://{HOST}", "host": LOCAL}, {}, True),
        ({"origin": f"http://{HOST}", "host": LOCAL}, NO_PROXY, False),
        ({"origin": f"http://{HOST}", "host": "192.168.1.5:8000"}, {}, False),
        ({"origin": "http://192.0.2.1", "host": LOCAL}, {}, False),
        ({"origin": "http://0.0.0.0:3000", "host": LOCAL}, {}, False),
        ({"origin": "http://rebound.example", "host": LOCAL}, {}, False),
    ],
)
async def test_pages_of_other_sites_are_refused(
    serve: Serve, worker: FakeWorker, headers: dict[str, str], settings: dict[str, Any], *, allowed: bool
) -> None:
    """Without keys, speech and administration answer only our own pages and those of the configured origins.

    The cases follow the table of origins.py. For administration, `*` is no configured origin.
    """
    client = await serve(**settings)
    may_administer = allowed and settings.get("cors_origins") != ["*"]
    spoken = await client.post(SPEECH, content=b'{"input": "x"}', headers=headers)
    cleaned = await client.post("/admin/cleanup", headers=headers)
    assert (await client.get("/health", headers=headers)).status_code == 200
    for answer, is_allowed in ((spoken, allowed), (cleaned, may_administer)):
        assert answer.status_code == (200 if is_allowed else 403)
        if not is_allowed:
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "foreign_origin")
            assert "TTS_CORS_ORIGINS" in error["message"]
    assert len(worker.of(Speak)) == allowed


async def test_a_page_at_an_address_of_this_machine_is_our_own(serve: Serve) -> None:
    """A bare proxy_pass of nginx has changed Host; the page's address is one of this machine's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but the loopback's")
        address = probe.getsockname()[0]
    client = await serve()
    headers = {"origin": f"http://{address}", "host": LOCAL}
    assert (await client.post(SPEECH, json={"input": "x"}, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("origin", "advice"),
    [
        ("http://tts.example", "list the name in TTS_ALLOWED_HOSTS"),
        (EXTENSION, "list their origin in TTS_CORS_ORIGINS"),
        ("null", "TTS_CORS_ORIGINS=*"),
    ],
)
async def test_the_refusal_says_which_setting_allows_the_page(serve: Serve, origin: str, advice: str) -> None:
    """The settings take the value that the message advises."""
    client = await serve()
    answer = await client.post(SPEECH, json={"input": "x"}, headers={"origin": origin})
    assert advice in answer.json()["error"]["message"]
    assert load_settings({"TTS_CORS_ORIGINS": "*" if origin == "null" else origin}).cors_origins


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "settings", "allowed"),
    [
        # Programs, and our own page, whatever its name.
        ({}, {}, True),
        ({"sec-fetch-site": "none"}, {}, True),
        (SAME, {}, True),
        ({"origin": "https://tts.example", "host": "tts.example", **SAME}, {}, True),
        ({"origin": "http://tts.example:8000", "host": "tts.example:8000"}, {}, True),
        ({"origin": "http://tts.example", "host": "tts:8000", "x-forwarded-host": "tts.example"}, {}, True),
        ({"origin": "http://127.0.0.1:8000", "host": LOCAL}, {}, True),
        ({"origin": "http://tts.example", "host": LOCAL}, NAMED, True),
        # Other pages; `*` names none.
        ({"origin": FOREIGN}, {}, False),
        ({"origin": FOREIGN, "host": LOCAL}, ANY_NAME, False),
        ({"origin": FOREIGN}, {"cors_origins": ["*"]}, False),
        ({"origin": "*"}, {"cors_origins": ["*"]}, False),
        ({"origin": "null"}, {"cors_origins": ["*"]}, False),
        ({"origin": EXTENSION}, {}, False),
        ({"origin": GOOD, "sec-fetch-site": "cross-site"}, {"cors_origins": [GOOD]}, True),
        ({"origin": EXTENSION}, {"cors_origins": [EXTENSION]}, True),
        # What the browser says counts, also where an old one sends no Origin.
        ({"sec-fetch-site": "cross-site"}, {}, False),
        ({"sec-fetch-site": "same-site"}, {}, False),
        ({"origin": "http://127.0.0.1:8000", "host": LOCAL, "sec-fetch-site": "cross-site"}, {}, False),
        ({"origin": "https://tts.example", "host": "tts.example", "sec-fetch-site": "same-site"}, {}, False),
    ],
)
async def test_a_key_does_not_let_other_pages_administer(
    serve: Serve, worker: FakeWorker, headers: dict[str, str], settings: dict[str, Any], *, allowed: bool
) -> None:
    """A proxy may have added it to what a browser sent for a page of any site (CSRF)."""
    client = await serve(admin_keys=["boss"], **settings)
    headers = {**headers, "authorization": "Bearer boss"}
    worker.on_call = lambda call, _: Reply(id=call.id, model=ModelStatus(id="espeak-ng", state="resident"))
    for method, path in (
        ("POST", "/admin/cleanup"),
        ("POST", "/admin/models/espeak-ng/unload"),
        ("DELETE", "/admin/cache/tokens"),
    ):
        answer = await client.request(method, path, headers=headers)
        assert (answer.status_code == 200) == allowed, (path, answer.text)
        if not allowed:
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert bool(worker.of(Call)) == allowed
    wrong = await client.post("/admin/cleanup", headers={**headers, "authorization": "Bearer nobody"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_a_link_to_a_figure_works(serve: Serve) -> None:
    """A click on another site's link only reads; a script of that site would send its origin."""
    client = await serve()
    clicked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert (await client.get("/admin/stats", headers=clicked)).status_code == 200
    assert (await client.get("/admin/stats", headers={**clicked, "origin": FOREIGN})).status_code == 403


async def test_a_page_with_a_key_may_speak(serve: Serve) -> None:
    """A page that knows a key may speak from any site; without a key, open speech refuses it."""
    client = await serve(admin_keys=["boss"])
    headers = {"origin": FOREIGN, "authorization": "Bearer boss"}
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


async def test_a_script_may_read_our_headers(serve: Serve, worker: FakeWorker) -> None:
    """Those of an answer, and those of an error: OpenAI's client asks two more times unless it can read one of them."""
    client = await serve(cors_origins=[GOOD])
    body = {"input": "hello", "store": True, "stream": False}
    whole = await client.post(SPEECH, json=body, headers={"origin": GOOD})
    worker.fail_with = Failed(id="", code="synthesis_failed", message="no")
    failed = await client.post(SPEECH, json={"input": "x"}, headers={"origin": GOOD})
    assert (whole.status_code, failed.status_code, failed.headers["x-should-retry"]) == (200, 500, "false")
    for answer in (whole, failed):
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert {name for name in answer.headers if name.startswith("x-")} - exposed <= {"x-accel-buffering"}


async def test_a_refused_preflight_has_the_error_envelope(serve: Serve) -> None:
    """A page of a site that is not configured gets the envelope and a request id, a configured one gets 204."""
    client = await serve(cors_origins=[GOOD])
    asked = {"access-control-request-method": "POST"}
    refused = await client.options(SPEECH, headers={"origin": FOREIGN, **asked})
    allowed = await client.options(SPEECH, headers={"origin": GOOD, **asked})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
    assert refused.headers["x-request-id"]
    assert allowed.status_code == 204
