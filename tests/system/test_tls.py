"""https: a service with a certificate of its own speaks over HTTP/1.1, HTTP/2 and a secure WebSocket."""

import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import trustme
from websockets.sync.client import connect

from server.__main__ import main
from tests.system.service import Service, environment, eventually


class Secure(NamedTuple):
    """A service with https, how to trust it, its files, and systemd's end of its socket."""

    service: Service
    context: ssl.SSLContext
    cert: Path
    key: Path
    systemd: socket.socket


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """The service of this file, started as systemd starts one."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    cert, key = folder / "cert.pem", folder / "key.pem"
    for pem in issued.cert_chain_pems:
        pem.write_to_path(cert, append=True)
    issued.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, pytest.MonkeyPatch.context() as patch:
        systemd.bind(str(folder / "notify"))
        systemd.settimeout(90)
        patch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        service = Service(folder, TLS_CERT=cert, TLS_KEY=key)
        service.url = service.url.replace("http:", "https:")
        service.http = httpx.Client(base_url=service.url, timeout=60, trust_env=False, verify=context)
        try:
            yield Secure(service.wait_ready(), context, cert, key, systemd)
        finally:
            service.kill()


def test_systemd_learns_that_it_serves(secure: Secure) -> None:
    """READY=1 is the first that it hears."""
    assert secure.systemd.recv(100) == b"READY=1"
    assert secure.service.http.get("/health").status_code == httpx.codes.OK


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
def test_speech(secure: Secure, version: str) -> None:
    """The certificate is right for its names, and the application knows that it is https."""
    http2 = version == "HTTP/2"
    with httpx.Client(http1=not http2, http2=http2, verify=secure.context, trust_env=False) as client:
        url = f"https://localhost:{secure.service.port}"
        answer = client.post(f"{url}/v1/audio/speech", json={"input": "Good morning."}, headers={"origin": url})
    assert answer.http_version == version
    assert answer.status_code == httpx.codes.OK
    assert len(answer.content) > 1_000


def test_a_secure_websocket(secure: Secure) -> None:
    """wss: text in, audio out."""
    url = f"wss://127.0.0.1:{secure.service.port}/v1/audio/speech/stream"
    with connect(url, ssl=secure.context, proxy=None) as ws:
        for message in ({"type": "session.config", "response_format": "pcm"}, {"type": "input.text", "text": "Hi."}):
            ws.send(json.dumps(message))
        ws.send('{"type": "input.done"}')
        kinds = [type(ws.recv()) for _ in range(4)]
    assert bytes in kinds


def test_plain_http_is_not_served(secure: Secure) -> None:
    """No key can go over the wire in the clear by mistake."""
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{secure.service.port}/health", trust_env=False)


def test_the_commands_trust_the_certificate_of_the_settings(secure: Secure, tmp_path: Path) -> None:
    """`say` finds the service by the settings, and `say --live` too, though no authority of the system signed it."""
    variables = environment(PORT=secure.service.port, TLS_CERT=secure.cert, TLS_KEY=secure.key)
    for more in (["Good morning."], ["--stdin", "--live"]):
        command = [sys.executable, "-m", "server", "say", *more, "-o", "out.wav"]
        said = subprocess.run(
            command, cwd=tmp_path, env=variables, input="Good morning.", text=True, capture_output=True, check=False
        )
        assert (said.returncode, said.stdout) == (0, ""), said.stderr
        assert (tmp_path / "out.wav").stat().st_size > 10_000
        (tmp_path / "out.wav").unlink()


@pytest.mark.parametrize("more", [["Good morning."], ["--live"]], ids=["say", "live"])
def test_a_certificate_that_is_not_trusted(
    secure: Secure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """A service that the settings do not name: the commands say how to trust it."""
    monkeypatch.chdir(tmp_path)
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert main(["say", *more, "-o", "out.wav", "--url", secure.service.url, "--key", "k"]) == 1
    error = capfd.readouterr().err
    assert "its certificate is not trusted here" in error
    assert "SSL_CERT_FILE" in error


def test_systemd_learns_that_it_stops(secure: Secure) -> None:
    """STOPPING=1, and then the process ends."""
    secure.service.process.terminate()
    assert secure.systemd.recv(100) == b"STOPPING=1"
    eventually(lambda: secure.service.process.poll() is not None, 60, "the end")
