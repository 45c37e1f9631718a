"""WebSockets of the real service: what they hear of a killed GPU worker and of a stop, and what hostile ones leave."""

import contextlib
import json
import os
import random
import socket as tcp
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.sync.client import ClientConnection, connect

from tests.audio import decode, tags_of
from tests.recogniser import SENTENCES
from tests.system.service import Service, environment, eventually, in_time, resident_bytes, running_service

STREAM = "/v1/audio/speech/stream"
PCM = {"type": "session.config", "response_format": "pcm"}
LONG = "The old clock struck midnight, and nobody was there to hear it. " * 50
"""Minutes of speech: more than the buffers between service and client hold."""


def open_socket(stack: ExitStack, service: Service, path: str = STREAM, **options: Any) -> ClientConnection:
    """A socket to the service, which is closed with `stack`."""
    return stack.enter_context(
        connect(f"ws://127.0.0.1:{service.port}{path}", proxy=None, max_size=None, close_timeout=5, **options)
    )


def say(socket: ClientConnection, *messages: Any) -> None:
    """Send JSON."""
    for message in messages:
        socket.send(json.dumps(message))


def begin(stack: ExitStack, service: Service, text: str, *more: dict[str, str]) -> ClientConnection:
    """A socket whose first audio has come."""
    socket = open_socket(stack, service)
    say(socket, PCM, {"type": "input.text", "text": text}, *more)
    while not isinstance(socket.recv(60), bytes):
        pass
    return socket


def rest_of(socket: ClientConnection) -> tuple[list[Any], int]:
    """The JSON that still comes, and the code of the close."""
    heard = []
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            message = socket.recv(60)
            if isinstance(message, str):
                heard.append(json.loads(message))
    return heard, socket.close_code or 0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes the sockets of a test."""
    with ExitStack() as sockets:
        yield sockets


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running service."""
    with running_service(tmp_path_factory.mktemp("sockets"), WEB_WORKERS=1) as running:
        yield running


def test_a_killed_worker_ends_every_socket(service: Service, stack: ExitStack) -> None:
    """Within a second: one that speaks, one that waits for text, one that is idle and one that is not configured."""
    speaking = begin(stack, service, LONG, {"type": "input.done"})
    writing = begin(stack, service, "One sentence. And the next ")
    idle, fresh = open_socket(stack, service), open_socket(stack, service)
    say(idle, PCM)
    assert json.loads(idle.recv(60))["type"] == "session.configured"
    os.kill(service.worker_pid(), 9)
    began = time.monotonic()
    for one in (fresh, idle, writing):
        eventually(lambda one=one: one.close_code is not None, 60, "closed")  # type: ignore[misc]
    assert in_time(time.monotonic() - began, 1.0)
    for one in (fresh, idle, writing, speaking):
        heard, code = rest_of(one)
        assert (next(message["code"] for message in heard if message["type"] == "error"), code) == (
            "worker_unavailable",
            1011,
        )
    service.wait_ready()


def test_a_client_that_goes_on_sending_hears_why_its_socket_ends(service: Service) -> None:
    """The service reads all that it sends meanwhile: unread bytes would make a reset of the close."""
    handshake = f"GET {STREAM} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    handshake += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    frame = b"\x81\xfe\x03\xe8" + bytes(4) + b"{" * 1000  # its mask is zeros
    with tcp.create_connection(("127.0.0.1", service.port), timeout=60) as client:
        client.sendall(handshake.encode() + frame * 300)
        client.shutdown(tcp.SHUT_WR)
        heard = b"".join(iter(lambda: client.recv(65536), b""))  # a reset would raise
    assert b"invalid_json" in heard
    assert (1008).to_bytes(2, "big") in heard


def test_say_live(service: Service, tmp_path: Path) -> None:
    """A text that is piped in is spoken before its end comes, into a player or a file, as one stream of its format."""
    command = [sys.executable, "-m", "server", "say", "--stdin", "--live", "--url", service.url, "--key", "none"]
    with subprocess.Popen(
        [*command, "--format", "pcm"], cwd=tmp_path, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as player:
        assert player.stdin is not None
        assert player.stdout is not None
        player.stdin.write(f"{SENTENCES[0]} And".encode())
        player.stdin.flush()
        heard = player.stdout.read(4800)
        player.stdin.close()
        heard += player.stdout.read()
    assert player.returncode == 0
    assert len(heard) > 2 * 48_000
    said = subprocess.run([*command, "-o", "a.mp3"], cwd=tmp_path, env=environment(), input=b"One. Two.", check=False)
    assert said.returncode == 0
    assert len(decode((tmp_path / "a.mp3").read_bytes(), "mp3")) > 24_000
    assert "Synthetic speech, artificially generated. Model: " in tags_of((tmp_path / "a.mp3").read_bytes())["comment"]


def hostile(service: Service, count: int, seed: int) -> None:
    """Sockets with wrong messages: `count` of them in all."""
    choose = random.Random(seed)  # noqa: S311 - nothing is secret
    words = {"type": "input.text", "text": "Hello. "}
    valid = [PCM, PCM | {"split_granularity": "sentence"}, words, {"type": "input.done"}, {"type": "input.cancel"}]
    messages: list[Any] = [
        *(json.dumps(message) for message in valid * 3),
        *("{", "[]", "null", "", '"text"', '{"type": null}', '{"type": "input.text", "text": {}}', "[" * 100_000),
        *(b"", b"\x00" * 1000, json.dumps(words).encode()),
        *(json.dumps(words | {"text": text}) for text in ("\0", "x" * 200_000, "\ud800", "<speak>", "[pause:9s]" * 99)),
        json.dumps({"type": "session.close"}),
        "x" * 5_000_000,
    ]
    broken = [
        b"\x81\x82\0\0\0\0\xff\xfe",
        b"\x81\xfe\x10\x10\0\0\0\0half",
        b"\x81\x02no",
        b"\xff" * 64,
        b"\x88\x80\0\0\0\0",
    ]
    sent = 0
    while sent < count:
        paths = [STREAM, "/v1/audio/speech/ws", "/v1/text-to-speech/alloy/stream-input"]
        with ExitStack() as stack, contextlib.suppress(websockets.ConnectionClosed, OSError):
            socket = open_socket(stack, service, choose.choice([STREAM, *paths]), subprotocols=["nari.speech.v1"])
            for _ in range(choose.randint(1, 20)):
                socket.send(choose.choice(messages))
                sent += 1
            if choose.random() < 0.5:
                socket.socket.sendall(choose.choice(broken))
                sent += 1
            if choose.random() < 0.5:
                socket.socket.shutdown(tcp.SHUT_RDWR)


def check_nothing_is_left(service: Service) -> None:
    """No request and no socket, and the service speaks."""
    eventually(lambda: service.open_requests() == 0, 60, "no request")
    eventually(lambda: metric(service, "tts_websockets") == 0, 60, "no socket")
    assert service.speech("Hello.").status_code == 200


def metric(service: Service, name: str) -> float:
    """The value of a metric without labels."""
    lines = service.http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def test_hostile_sockets_leave_nothing(service: Service) -> None:
    """A hundred and fifty wrong messages, in the wrong order, too large, no text, cut off."""
    hostile(service, 150, seed=1)
    check_nothing_is_left(service)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_thousand_hostile_messages_and_a_thousand_idle_sockets(tmp_path: Path) -> None:
    """No slot, no task and no memory is left behind: a second round takes no more than the first."""
    with running_service(tmp_path, WEB_WORKERS=1, MAX_CONNECTIONS_PER_ADDRESS=2000) as service:
        (web,) = service.web_pids()

        def round_of(seed: int) -> int:
            hostile(service, 5_000, seed)
            with ExitStack() as stack:
                for _ in range(1000):
                    idle = open_socket(stack, service)
                    say(idle, PCM)
                    idle.recv(60)
                eventually(lambda: metric(service, "tts_websockets") == 1000, 60, "a thousand sockets")
                assert service.speech("Hello.").status_code == 200
            check_nothing_is_left(service)
            return resident_bytes(web)

        first, second, third = (round_of(seed) for seed in (1, 2, 3))
        assert third - second < 16 * 2**20, (first, second, third)


def test_a_stop_lets_speech_end(tmp_path: Path, stack: ExitStack) -> None:
    """An idle socket closes at once with 1001. One that speaks is heard to its end first; new requests are refused."""
    with running_service(tmp_path, WEB_WORKERS=1, DRAIN_TIMEOUT=60) as service:
        speaking = begin(stack, service, LONG, {"type": "input.done"})
        idle = open_socket(stack, service)
        say(idle, PCM)
        idle.recv(60)
        service.process.terminate()
        assert rest_of(idle) == ([], 1001)
        refused = service.speech("Hello.")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        with pytest.raises(websockets.InvalidStatus):
            open_socket(stack, service)
        heard, code = rest_of(speaking)
        assert ([message["type"] for message in heard], code) == (["audio.done", "session.done"], 1001)
        assert heard[0]["finish_reason"] == "stop"
        assert "streams_may_take_s=60" in service.log.read_text()  # else the service seems to hang
