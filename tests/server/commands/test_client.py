"""The commands' HTTP client: it finds the service and its key, and reports each failure as one message."""

import argparse
import io
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import main
from server.commands.client import Client, ClientError, add_service_arguments, client_of
from tests.server.commands.conftest import CannedService


def arguments(**given: str) -> argparse.Namespace:
    """The parsed arguments --url and --key."""
    return argparse.Namespace(**({"url": None, "key": None} | given))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:4711"),
        ("0.0.0.0", "http://127.0.0.1:4711"),  # noqa: S104 - nothing is bound
        ("::", "http://[::1]:4711"),
        ("*", "http://127.0.0.1:4711"),
        ("localhost", "http://localhost:4711"),
        ("speech.lan", "http://speech.lan:4711"),
    ],
)
def test_the_service_is_found_by_its_settings(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    """The client uses the address that the service listens on."""
    monkeypatch.setenv("TTS_HOST", host)
    monkeypatch.setenv("TTS_PORT", "4711")
    assert client_of(arguments()).url == url


def test_keys_come_from_the_settings(service: CannedService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speech uses an API key and admin commands an admin key; --key replaces both."""
    service.answers["/x"] = (200, {})
    monkeypatch.setenv("TTS_API_KEYS", "speak,other")
    monkeypatch.setenv("TTS_ADMIN_KEYS", "rule")
    client_of(arguments()).get("/x")
    client_of(arguments(), admin=True).get("/x")
    client_of(arguments(key="mine")).get("/x")
    assert [headers["Authorization"] for _, _, headers, _ in service.asked] == [
        "Bearer speak",
        "Bearer rule",
        "Bearer mine",
    ]


def test_a_key_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stands in no list of processes; a file that cannot be read is named."""
    (tmp_path / "key").write_text("mine\n")
    parser = argparse.ArgumentParser()
    add_service_arguments(parser)
    assert parser.parse_args(["--key", f"@{tmp_path}/key"]).key == "mine"
    assert parser.parse_args(["--key", "plain"]).key == "plain"
    with pytest.raises(SystemExit):
        parser.parse_args(["--key", f"@{tmp_path}/none"])
    assert "none cannot be read" in capsys.readouterr().err


def test_keys_are_for_this_machine_alone(service: CannedService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service on another machine does not get the keys of the service on this one."""
    monkeypatch.setenv("TTS_API_KEYS", "speak")
    assert client_of(arguments(url="http://elsewhere.test:8000")).authorization is None
    assert client_of(arguments(url=service.url)).authorization == "Bearer speak"


def test_a_proxy_is_not_used_for_this_machine(service: CannedService, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client ignores http_proxy for the loopback."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    service.answers["/x"] = (200, {"y": 1})
    assert Client(service.url + "/").get("/x") == {"y": 1}


def test_a_redirect_does_not_carry_the_key(service: CannedService) -> None:
    """After a redirect the request has no Authorization header."""
    service.answers |= {"/v1/models": (302, f"{service.url}/elsewhere"), "/elsewhere": (200, {"data": []})}
    assert Client(service.url, "secret").get("/v1/models") == {"data": []}
    asked = [(path, headers.get("Authorization")) for _, path, headers, _ in service.asked]
    assert asked == [("/v1/models", "Bearer secret"), ("/elsewhere", None)]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_urls_with_v1_work(service: CannedService, ending: str) -> None:
    """--url may be the base URL of OpenAI's clients, with /v1 at its end."""
    service.answers["/v1/models"] = (200, {"data": []})
    assert main(["models", "--url", service.url + ending]) == 0
    assert Client(f"{service.url}/speech{ending}").url == f"{service.url}/speech"


def test_no_service(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a service, the error is one line with a hint."""
    monkeypatch.setenv("TTS_PORT", "1")
    assert main(["models"]) == 1
    err = capfd.readouterr().err
    assert "http://127.0.0.1:1 cannot be reached" in err
    assert "python -m server" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("url", ["http://a:b/", "http://[::1/", "http://a:99999"])
@pytest.mark.parametrize("command", [["voices"], ["say", "--live", "-o", "a.mp3"]], ids=["voices", "live"])
def test_wrong_urls(url: str, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong --url gives a message."""
    assert main([*command, "--url", url, "--key", "k"]) == 1
    assert capfd.readouterr().err.startswith(f"{url.rstrip('/')}: ")


@pytest.mark.parametrize("url", ["ftp://a/", "nonsense", "127.0.0.1:8000", "localhost:8000"])
@pytest.mark.parametrize("command", [["voices"], ["say", "--live", "-o", "a.mp3"]], ids=["voices", "live"])
def test_urls_without_http(url: str, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """A --url with another scheme or without one is told which schemes there are."""
    assert main([*command, "--url", url, "--key", "k"]) == 1
    assert "must begin with http:// or https://" in capfd.readouterr().err


@pytest.mark.parametrize("body", [b"<html>", b"\xff"])
def test_another_server(service: CannedService, body: bytes) -> None:
    """An answer that is not JSON is reported as the wrong server."""
    service.answers["/x"] = (200, body)
    with pytest.raises(ClientError, match="is it this server"):
        Client(service.url).get("/x")


def test_a_service_of_https() -> None:
    """What a service of https answers to http is no HTTP: the message asks for the scheme, and has no bytes in it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"\x15\x03\x03\x00\x02\x02F")  # a TLS alert

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(ClientError, match=r"does not answer with HTTP; does its URL begin with https://\?$"):
            Client(f"http://127.0.0.1:{server.getsockname()[1]}").get("/x")
        thread.join(60)


def test_a_body_that_stalls() -> None:
    """A service that stops in the middle of an answer gives a message, not a traceback."""

    class Stalled(io.BytesIO):
        def read(self, _size: int | None = -1) -> bytes:
            raise TimeoutError("timed out")

    class StalledClient(Client):
        def open(self, *_arguments: object, **_named: object) -> Any:
            return Stalled()

    with pytest.raises(ClientError, match="broke off its answer: timed out"):
        StalledClient("http://127.0.0.1:1").get("/x")


def test_errors_without_an_envelope(service: CannedService) -> None:
    """The error page of a proxy is shortened."""
    service.answers["/x"] = (502, b"<h1>Bad gateway</h1>" + b"!" * 1000)
    with pytest.raises(ClientError, match=r"<h1>Bad gateway</h1>!+ \(HTTP 502\)") as caught:
        Client(service.url).get("/x")
    assert len(str(caught.value)) < 300


def test_wrong_settings_are_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong TTS_* variable is an error in each command, with the exit code of `serve`."""
    monkeypatch.setenv("TTS_PORT", "many")
    assert main(["models"]) == 2
    assert "TTS_PORT" in capfd.readouterr().err


@pytest.mark.parametrize(
    "answer", ["speech", {"error": "none"}, {"data": 3, "voices": 3}, {"data": ["a"], "voices": ["a"]}]
)
@pytest.mark.parametrize("command", ["models", "voices"])
def test_another_service_answers(
    service: CannedService, capfd: pytest.CaptureFixture[str], command: str, answer: Any
) -> None:
    """JSON of another service is one sentence."""
    service.answers["/v1/models"] = service.answers["/v1/audio/voices"] = (200, answer)
    assert main([command]) == 1
    assert "answers with something else; is it this server?" in capfd.readouterr().err


def test_unknown_arguments(capfd: pytest.CaptureFixture[str]) -> None:
    """The usage beside a mistyped option is that of its command."""
    with pytest.raises(SystemExit) as ended:
        main(["voices", "--modle", "espeak-ng"])
    problem = capfd.readouterr().err
    assert ended.value.code == 2
    assert "--model MODEL" in problem
    assert "unrecognized arguments: --modle espeak-ng" in problem
