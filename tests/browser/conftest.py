"""The page in Debian's Chromium, driven by Playwright, against real services that speak with espeak-ng."""

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Request,
    ViewportSize,
    expect,
    sync_playwright,
)

from server.http.keys import digest_of
from tests.system.browser import CHROMIUM
from tests.system.service import Service, running_service

KEY: Final = "api-key-of-the-test"
ADMIN_KEY: Final = "admin-key-of-the-test"
NAMED_KEY: Final = "named-key-of-the-test"
"""The key of maria, in the file of keys."""

VIEWPORT: Final[ViewportSize] = {"width": 1280, "height": 720}

TIMEOUT_MS: Final = 45_000
"""A busy machine takes seconds for what takes milliseconds."""

_OPTIONS: Final = (
    *("--mute-audio", "--disable-gpu", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)
_WATCH: Final = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
    event => violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


@pytest.fixture(scope="package")
def open_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service without keys."""
    with running_service(tmp_path_factory.mktemp("open")) as service:
        yield service


@pytest.fixture(scope="package")
def keyed_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with keys of all kinds, which wants a consent with every clone."""
    directory = tmp_path_factory.mktemp("keyed")
    keys_file = directory / "keys.toml"
    keys_file.write_text(f'[maria]\nhash = "{digest_of(NAMED_KEY)}"\n')
    keys = {"API_KEYS": KEY, "ADMIN_KEYS": ADMIN_KEY, "KEYS_FILE": keys_file, "REQUIRE_CONSENT": "true"}
    with running_service(directory, **keys) as service:
        yield service


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this folder.

    Playwright's event loop runs all the while, and no other may run beside it: tests elsewhere have loops of their own.
    """
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: chromium)")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*_OPTIONS])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def shared_page(browser: Browser) -> Iterator[Callable[[], Page]]:
    """Return a page that the tests have one after the other: the process of a new one takes 0.8 s of CPU time.

    There is a new one after a page that was closed.
    """
    pages: list[Page] = []

    def page() -> Page:
        if not pages or pages[-1].is_closed():
            pages.append(new_context(browser).new_page())
        return pages[-1]

    yield page
    if pages:
        pages[-1].context.close()


def new_context(browser: Browser, **options: Any) -> BrowserContext:
    """A new profile, which takes microphone and downloads, and counts violations of the policy."""
    context = browser.new_context(permissions=["microphone"], accept_downloads=True, **options)
    context.set_default_timeout(TIMEOUT_MS)
    context.add_init_script(_WATCH)
    return context


class Tab:
    """A page, and everything in it that no page should do. At first its profile keeps nothing for it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.context = page.context
        self.url = url
        self.errors: list[str] = []
        self.requested: list[str] = []
        session = self.context.new_cdp_session(page)
        origin = {"origin": url.partition("/tts/")[0].rstrip("/"), "storageTypes": "all"}
        session.send("Storage.clearDataForOrigin", origin)
        session.detach()
        page.on("pageerror", self._note_error)
        page.on("console", self._note)
        page.on("request", self._note_request)

    def _note_error(self, error: Error) -> None:
        self.errors.append(str(error))

    def _note_request(self, request: Request) -> None:
        self.requested.append(request.url)

    def _note(self, message: ConsoleMessage) -> None:
        # The browser itself reports every refusal of the API, which a test may provoke.
        if message.type in {"error", "warning"} and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def open(self, view: str = "speak") -> Page:
        """Show a view, once the lists have come."""
        self.page.goto(f"{self.url}#/{view}")
        self.page.locator("select[name=model], main h1 + .actions").first.wait_for()
        return self.page

    def check(self) -> None:
        """Nothing was wrong: no violation of the policy, no error, no request to another host."""
        assert self.page.evaluate("violations") == []
        assert self.errors == []
        assert [url for url in self.requested if not url.startswith((self.url, "blob:" + self.url, "data:"))] == []

    def leave(self) -> None:
        """Leave the page as it was before; what its `add_init_script` has set stays. A broken page is closed."""
        self.page.remove_listener("pageerror", self._note_error)
        self.page.remove_listener("console", self._note)
        self.page.remove_listener("request", self._note_request)
        try:
            self.page.goto("about:blank")
            self.page.unroute_all(behavior="ignoreErrors")
            self.page.emulate_media(color_scheme="null", reduced_motion="null")
            self.page.set_viewport_size(VIEWPORT)
        except Error:
            self.context.close()
            raise


OpenTab = Callable[..., Tab]


@pytest.fixture
def tab(open_service: Service, browser: Browser, shared_page: Callable[[], Page]) -> Iterator[OpenTab]:
    """Open a tab; at the end each is checked. `own` options are those of a page in a profile of its own."""
    tabs: list[Tab] = []
    contexts = contextlib.ExitStack()

    def opened(url: str | None = None, *, own: dict[str, Any] | None = None) -> Tab:
        if own is None:
            tabs.append(Tab(shared_page(), url or open_service.url + "/"))
            contexts.callback(tabs[-1].leave)
        else:
            context = contexts.enter_context(new_context(browser, **own))
            tabs.append(Tab(context.new_page(), url or open_service.url + "/"))
        return tabs[-1]

    with contexts:
        yield opened
        for each in tabs:
            each.check()


class _Forwarding(BaseHTTPRequestHandler):
    """Passes everything below /tts on to the service, as a stream, and refuses the rest. It adds no header."""

    port: int
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        if not self.path.startswith("/tts/"):
            self.send_error(404)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        upstream.request(self.command, self.path.removeprefix("/tts"), body or None, dict(self.headers))
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"transfer-encoding", "connection", "date", "server"}:
                self.send_header(name, value)
        self.send_header("connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):  # the browser has left
            while piece := answer.read1(65_536):
                self.wfile.write(piece)
        upstream.close()
        self.close_connection = True

    do_GET = do_POST = do_DELETE = _forward  # noqa: N815 -- the names of the standard library

    def log_message(self, *_arguments: object) -> None:
        """Nothing."""


@pytest.fixture(scope="package")
def below_a_path(keyed_service: Service) -> Iterator[str]:
    """The URL of the service with keys behind a small proxy that shows it below /tts/."""
    handler = type("Forwarding", (_Forwarding,), {"port": keyed_service.port})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}/tts/"
        proxy.shutdown()
        thread.join()


@pytest.fixture(scope="package")
def recording(open_service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of a few seconds, as a WAV file."""
    file = tmp_path_factory.mktemp("recording") / "grandma.wav"
    text = "This is my grandmother, who tells a story about the sea and about the winter."
    file.write_bytes(open_service.speech(text, response_format="wav", stream=False).content)
    return file
