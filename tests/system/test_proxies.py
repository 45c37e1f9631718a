"""The service behind real proxies: the shortest nginx configuration, and the files of .github/proxies.

Pages are tested in a real browser. What the machine lacks (nginx, caddy, chromium) skips its tests.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import pytest
from websockets.sync.client import connect

from shared.pcm import seconds_of
from tests.audio import decode
from tests.ports import free_port
from tests.system.browser import CHROMIUM, Browser, running_browser
from tests.system.service import NO_TLS, ROOT, Service, eventually, running_service

NGINX: Final = shutil.which("nginx")
CADDY: Final = shutil.which("caddy")
SNIPPETS: Final = ROOT / ".github" / "proxies"
SPEECH: Final = "/v1/audio/speech"
LONG: Final = "This sentence is one of very many. " * 2000
"""Text for more audio than the connections between the service and a client that reads nothing can hold."""

BARE: Final = """
events {}
http {
  server { listen 127.0.0.1:80; location / { proxy_pass http://127.0.0.1:8000; } }
  server { listen 127.0.0.1:81; location /tts/ { proxy_pass http://127.0.0.1:8000/; } location / { return 404; } }
}
"""
"""The file of a beginner: nginx speaks HTTP/1.0 to its upstream and sends its own Host."""


@dataclass(frozen=True)
class Proxy:
    """A running proxy: the service is at `url`, and below a path at `below`."""

    url: str
    below: str


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service of all tests; some kill its processes."""
    with running_service(tmp_path_factory.mktemp("service")) as service:
        yield service


@contextlib.contextmanager
def running_proxy(command: list[str], config: str, suffix: str, directory: Path, service: Service) -> Iterator[Proxy]:
    """A proxy with that configuration, whose ports are replaced, until the end."""
    own, below = free_port(), free_port()
    for old, new in ((":8000", f":{service.port}"), ("80", str(own)), ("81", str(below))):
        config = re.sub(rf"(?<=[ :]){old}\b" if old.isdigit() else rf"{old}\b", new, config)
    file = directory / f"config{suffix}"
    file.write_text(config)
    output = (directory / "proxy.log").open("wb")
    environ = {**os.environ, "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    process = subprocess.Popen([*command, str(file)], cwd=directory, env=environ, stdout=output, stderr=output)
    proxy = Proxy(f"http://127.0.0.1:{own}", f"http://127.0.0.1:{below}/tts")

    def serves() -> bool:
        assert process.poll() is None, (directory / "proxy.log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{proxy.url}/health", trust_env=False, verify=NO_TLS).status_code == httpx.codes.OK
        return False

    try:
        eventually(serves, 60, "the proxy serves")
        yield proxy
    finally:
        process.terminate()
        process.wait(60)
        output.close()


@contextlib.contextmanager
def running_nginx(config: str, directory: Path, service: Service) -> Iterator[Proxy]:
    """An nginx with that configuration."""
    if NGINX is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    folders = "".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = config.replace("http {", f"http {{ access_log off; {folders}", 1)
    globals_ = f"daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;"
    command = [NGINX, "-p", str(directory), "-e", f"{directory}/error.log", "-g", globals_, "-c"]
    with running_proxy(command, config, ".conf", directory, service) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bare(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The shortest configuration of nginx."""
    with running_nginx(BARE, tmp_path_factory.mktemp("bare"), service) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def nginx(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The nginx.conf that the README points to."""
    config = (SNIPPETS / "nginx.conf").read_text()
    with running_nginx(config, tmp_path_factory.mktemp("nginx"), service) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def caddy(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The Caddyfile that the README points to."""
    if CADDY is None:
        pytest.skip("caddy is not installed (Debian: caddy)")
    config = "{\n\tadmin off\n}\n" + (SNIPPETS / "Caddyfile").read_text()
    command = [CADDY, "run", "--adapter", "caddyfile", "--config"]
    with running_proxy(command, config, "", tmp_path_factory.mktemp("caddy"), service) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser whose DNS leads a foreign name to this machine."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: chromium)")
    rebound = "--host-resolver-rules=MAP rebound.example 127.0.0.1"
    with running_browser(tmp_path_factory.mktemp("browser"), rebound) as browser:
        yield browser


@pytest.fixture(params=["bare", "nginx", "caddy"])
def proxy(request: pytest.FixtureRequest) -> Proxy:
    """Each proxy in turn."""
    proxy: Proxy = request.getfixturevalue(request.param)
    return proxy


def test_speech_is_streamed(proxy: Proxy) -> None:
    """The first bytes arrive long before all is said, and a short answer ends normally."""
    for base in (proxy.url, proxy.below):
        with httpx.Client(trust_env=False, timeout=30) as client:
            whole = client.post(base + SPEECH, json={"input": "Hello.", "response_format": "pcm"})
            assert (whole.status_code, len(whole.content) > 10_000) == (200, True)
            with client.stream("POST", base + SPEECH, json={"input": LONG, "response_format": "pcm"}) as answer:
                assert answer.status_code == 200
                assert "content-length" not in answer.headers
                assert len(next(answer.iter_bytes(1000))) == 1000


@pytest.mark.parametrize("name", ["nginx", "caddy"])
def test_websockets(request: pytest.FixtureRequest, name: str) -> None:
    """They speak, also below a path, and the code of the close arrives."""
    proxy: Proxy = request.getfixturevalue(name)
    for base in (proxy.url, proxy.below):
        with connect(f"{base.replace('http', 'ws', 1)}{SPEECH}/stream", proxy=None) as socket:
            socket.send('{"type": "session.config", "response_format": "pcm"}')
            for message in (
                {"type": "input.text", "text": "Hello."},
                {"type": "input.done"},
                {"type": "session.close"},
            ):
                socket.send(json.dumps(message))
            pcm = b"".join(message for message in socket if isinstance(message, bytes))
        assert (len(pcm) > 10_000, socket.close_code) == (True, 1000)


@pytest.mark.parametrize(
    ("name", "victim"),  # Caddy 2.6 ends such an answer normally
    [
        ("bare", "GPU worker"),
        ("nginx", "web worker"),
        pytest.param("bare", "web worker", marks=pytest.mark.soak),
        pytest.param("nginx", "GPU worker", marks=pytest.mark.soak),
    ],
)
def test_a_broken_answer_looks_broken_to_the_client(
    request: pytest.FixtureRequest, service: Service, name: str, victim: str
) -> None:
    """A process dies in the middle of an answer: the client's transfer fails, and is never a shorter answer."""
    proxy: Proxy = request.getfixturevalue(name)
    service.wait_ready()
    body = {"input": LONG, "response_format": "pcm"}
    with (
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream("POST", proxy.url + SPEECH, json=body) as answer,
    ):
        parts = answer.iter_bytes()
        next(parts)
        for pid in {service.worker_pid()} if victim == "GPU worker" else service.web_pids():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            for _ in parts:
                pass
    service.wait_ready()


def test_events_break_too(bare: Proxy, service: Service) -> None:
    """Server-sent events end with the error event, or with done; over HTTP/1.0 as well."""
    service.wait_ready()
    body = {"input": LONG, "response_format": "pcm", "stream_format": "sse"}
    with (
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream("POST", bare.url + SPEECH, json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        os.kill(service.worker_pid(), signal.SIGKILL)
        seen = ""
        with contextlib.suppress(httpx.TransportError):
            for line in lines:
                seen = line or seen
    assert "speech.audio.done" not in seen
    service.wait_ready()


def test_what_a_page_fetches_is_there(proxy: Proxy) -> None:
    """The pages work below a path that the service does not know."""
    with httpx.Client(trust_env=False, verify=NO_TLS) as client:
        for page in ("docs", "docs/", "redoc"):
            url = httpx.URL(f"{proxy.below}/{page}")
            text = client.get(url).raise_for_status().text
            named = re.findall(r'(?:src|href|spec-url)="(?!data:)([^"]+)"', text)
            assert named
            for name in named:
                assert client.get(url.join(name)).status_code == 200, name


def test_pages_in_a_browser(bare: Proxy, browser: Browser, tmp_path: Path) -> None:
    """Below a path, behind the shortest configuration: the pages show the API; "Try it out" speaks and saves."""
    browser.open(f"{bare.below}/redoc")
    browser.wait_for("document.body.innerText.includes('Speak a text')")
    browser.open(f"{bare.below}/docs/")
    for selector in ("#operations-Speech-createSpeech .opblock-summary-control", ".try-out__btn", ".execute"):
        browser.wait_for(f"document.querySelector('{selector}')")
        browser.evaluate(f"document.querySelector('{selector}').click()")
    assert browser.wait_for("document.querySelector('audio')?.duration") > 0.2
    browser.evaluate("document.querySelector('audio').play()")
    browser.save_downloads(tmp_path)
    browser.evaluate("document.querySelector('.speech-download').click()")
    eventually((tmp_path / "speech.mp3").is_file, 60, "the speech is saved")
    assert seconds_of(decode((tmp_path / "speech.mp3").read_bytes(), "mp3")) > 0.2


PLAYED: Final = """(async () => {
  const body = JSON.stringify({input: "Hi.", response_format: FORMAT});
  const headers = {"content-type": "application/json"};
  const answer = await fetch("SPEECH", {method: "POST", headers, body});
  const audio = new Audio();
  if (MEDIA_SOURCE) {
    const source = new MediaSource();
    audio.src = URL.createObjectURL(source);
    await new Promise(opened => { source.onsourceopen = opened; });
    const buffer = source.addSourceBuffer(answer.headers.get("content-type"));
    const reader = answer.body.getReader();
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      buffer.appendBuffer(piece.value);
      await new Promise((added, failed) => { buffer.onupdateend = added; buffer.onerror = failed; });
    }
    source.endOfStream();
  } else audio.src = URL.createObjectURL(await answer.blob());
  const played = new Promise((ended, failed) => { audio.onended = ended; audio.onerror = failed; });
  audio.playbackRate = 4;
  await audio.play();
  await played;
  return audio.currentTime;
})()"""
"""The seconds of an answer for a player that plays it to its end."""


def test_a_browser_plays_every_format(service: Service, browser: Browser) -> None:
    """An <audio> element plays each streamed format to its end, and a MediaSource those that it takes, by pieces."""
    service.wait_ready()
    browser.open(f"{service.url}/docs")
    script = PLAYED.replace("SPEECH", SPEECH)
    for media_source, formats in (("true", ("mp3", "aac")), ("false", ("mp3", "opus", "aac", "flac", "wav"))):
        for audio_format in formats:
            play = script.replace("MEDIA_SOURCE", media_source).replace("FORMAT", json.dumps(audio_format))
            assert 0.25 < browser.evaluate(play) < 1.0, (audio_format, media_source)


def test_a_rebound_page_in_a_browser(service: Service, bare: Proxy, browser: Browser) -> None:
    """A browser takes a page at a foreign name for the service's own, by its DNS; the service refuses it."""
    service.wait_ready()
    ask = f"""fetch("{SPEECH}", {{method: "POST", headers: {{"content-type": "application/json"}},
        body: '{{"input": "x"}}'}}).then(answer => answer.status)"""
    for base in (service.url, bare.url):
        browser.open(base.replace("127.0.0.1", "rebound.example") + "/health")
        assert browser.evaluate(ask) == 403
        browser.open(base + "/health")
        assert browser.evaluate(ask) == 200


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: nginx-light)")
def test_nginx_accepts_the_file(tmp_path: Path) -> None:
    """The file is valid as it is, but for the files that only root may write."""
    command = [str(NGINX), "-t", "-e", str(tmp_path / "log"), "-g", f"pid {tmp_path}/pid;", "-c"]
    subprocess.run([*command, str(SNIPPETS / "nginx.conf")], check=True, capture_output=True)
