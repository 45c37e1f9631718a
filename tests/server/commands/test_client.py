"""How the commands find a service, and what they say when there is none."""

import argparse
import io
from typing import Any

import pytest

from server.__main__ import main
from server.commands.client import Client, ClientError, client_of
from tests.server.commands.conftest import CannedService


def arguments(**given: str) -> argparse.Namespace:
    """What argparse makes of --url and --key."""
    return argparse.Namespace(**({"url": None, "key": None} | given))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:4711"),
        ("0.0.0.0", "http://127.0.0.1:4711"),  # noqa: S104 - nothing is bound
        ("::", "http://[::1]:4711"),
        ("speech.lan", "http://speech.lan:4711"),
    ],
)
def test_the_service_is_found_by_its_settings(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    """Where the service would listen is where it is looked for."""
    monkeypatch.setenv("TTS_HOST", host)
    monkeypatch.setenv("TTS_PORT", "4711")
    assert client_of(arguments()).url == url


def test_keys_come_from_the_settings(service: CannedService, monkeypatch: pytest.MonkeyPatch) -> None:
    """An API key for speech, an admin key for the admin's commands; --key wins."""
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


def test_keys_stay_at_home(service: CannedService, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of this machine's service are not sent to another one."""
    monkeypatch.setenv("TTS_API_KEYS", "speak")
    assert client_of(arguments(url="http://elsewhere.test:8000")).authorization is None
    assert client_of(arguments(url=service.url)).authorization == "Bearer speak"


def test_a_proxy_is_not_asked_for_this_machine(service: CannedService, monkeypatch: pytest.MonkeyPatch) -> None:
    """http_proxy in the environment does not come between us and the loopback."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    service.answers["/x"] = (200, {"y": 1})
    assert Client(service.url + "/").get("/x") == {"y": 1}


def test_a_key_is_not_passed_on(service: CannedService) -> None:
    """A service that sends its client elsewhere does not send the key along."""
    service.answers |= {"/v1/models": (302, f"{service.url}/elsewhere"), "/elsewhere": (200, {"data": []})}
    assert Client(service.url, "secret").get("/v1/models") == {"data": []}
    asked = [(path, headers.get("Authorization")) for _, path, headers, _ in service.asked]
    assert asked == [("/v1/models", "Bearer secret"), ("/elsewhere", None)]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_habitual_base_url(service: CannedService, ending: str) -> None:
    """--url may be what OpenAI's clients call the base URL."""
    service.answers["/v1/models"] = (200, {"data": []})
    assert main(["models", "--url", service.url + ending]) == 0
    assert Client(f"{service.url}/speech{ending}").url == f"{service.url}/speech"


def test_nobody_there(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not run is one line that says what to do."""
    monkeypatch.setenv("TTS_PORT", "1")
    assert main(["models"]) == 1
    err = capfd.readouterr().err
    assert "http://127.0.0.1:1 cannot be reached" in err
    assert "python -m server" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("url", ["ftp://a/", "nonsense", "http://a:b/", "http://[::1/"])
def test_what_is_no_url(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong --url is a message."""
    assert main(["voices", "--url", url]) == 1
    assert capfd.readouterr().err


@pytest.mark.parametrize("body", [b"<html>", b"\xff"])
def test_another_server(service: CannedService, body: bytes) -> None:
    """Something else that listens there is recognised as such."""
    service.answers["/x"] = (200, body)
    with pytest.raises(ClientError, match="is it this server"):
        Client(service.url).get("/x")


def test_a_body_that_stalls() -> None:
    """A service that stops sending in the middle of an answer is a message, not a traceback."""

    class Stalled(io.BytesIO):
        def read(self, _size: int | None = -1) -> bytes:
            raise TimeoutError("timed out")

    class StalledClient(Client):
        def open(self, *_arguments: object, **_named: object) -> Any:
            return Stalled()

    with pytest.raises(ClientError, match="broke off its answer: timed out"):
        StalledClient("http://127.0.0.1:1").get("/x")


def test_errors_without_an_envelope(service: CannedService) -> None:
    """A proxy's error page is shown shortened."""
    service.answers["/x"] = (502, b"<h1>Bad gateway</h1>" + b"!" * 1000)
    with pytest.raises(ClientError, match=r"<h1>Bad gateway</h1>!+ \(HTTP 502\)") as caught:
        Client(service.url).get("/x")
    assert len(str(caught.value)) < 300


def test_wrong_settings_are_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The commands are as strict about TTS_* as the service, with the same exit code."""
    monkeypatch.setenv("TTS_PORT", "many")
    assert main(["models"]) == 2
    assert "TTS_PORT" in capfd.readouterr().err
