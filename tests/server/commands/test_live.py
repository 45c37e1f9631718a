"""`say --live`: how the text is cut into utterances; tests/system/test_sockets.py hears what it says."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, serve

from server.__main__ import main
from server.commands import live
from server.commands.live import _Writer
from tests.server.commands.conftest import CannedService
from tests.system.service import eventually


class Socket:
    """A socket that keeps what is sent. `room`, once it is known, gets an utterance for each that is committed."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.room: threading.Semaphore | None = None
        self.closed = False

    def send(self, message: str) -> None:
        """Keep a message."""
        self.sent.append(json.loads(message))
        if self.room is not None and self.sent[-1]["type"] == "input.commit":
            self.room.release()

    def close(self) -> None:
        """Close."""
        self.closed = True

    @property
    def ended(self) -> bool:
        """True if the text was complete."""
        return self.closed or (bool(self.sent) and self.sent[-1]["type"] == "session.close")

    def utterances(self) -> list[str]:
        """The texts that were committed."""
        texts = [""]
        for message in self.sent:
            if message["type"] == "input.commit":
                texts.append("")
            texts[-1] += message.get("text", "")
        return texts[:-1]


def written(data: bytes, *, room: bool = True) -> tuple[Socket, _Writer]:
    """The socket of a writer that reads `data`."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe, os.fdopen(reading, "rb"):
        socket = Socket()
        writer = _Writer(socket, reading)  # type: ignore[arg-type] # it needs no more of a socket
        socket.room = writer.room if room else None
        writer.start()
        pipe.write(data)
        pipe.close()
        eventually(lambda: socket.ended or not room, 60, "the end")
    return socket, writer


@pytest.mark.parametrize(
    "text", ["Short.", "One sentence of many. " * 400, "word " * 2000, "x" * 9000, "。一二三四五" * 900]
)
def test_a_long_text_is_cut_into_utterances(text: str) -> None:
    """All of it is sent, in utterances that the service takes; they end with sentences where there are any."""
    socket, _ = written(text.encode())
    utterances = socket.utterances()
    assert "".join(utterances) == text
    assert max(map(len, utterances)) <= 4096
    if "sentence" in text:
        assert len(utterances) > 4
        assert all(utterance.rstrip().endswith(".") for utterance in utterances)


def test_what_is_no_text_is_an_error() -> None:
    """Bytes that are no UTF-8 end the speech; characters may be cut anywhere."""
    socket, writer = written(b"fine \xff")
    assert (socket.closed, "stdin is not text" in str(writer.error)) == (True, True)


@pytest.mark.parametrize("text", [b"", b" \n"])
def test_no_text_is_an_error(text: bytes) -> None:
    """A program that wrote nothing ends the speech, so that no empty file replaces an older one."""
    socket, writer = written(text)
    assert (socket.closed, str(writer.error)) == (True, "stdin has no text to speak")


def test_what_has_come_is_spoken_when_nothing_more_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause ends the utterance."""
    monkeypatch.setattr(live, "QUIET_S", 0.01)
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as pipe, os.fdopen(reading, "rb"):
        socket = Socket()
        writer = _Writer(socket, reading)  # type: ignore[arg-type] # it needs no more of a socket
        writer.start()
        pipe.write(b"Well, I")
        eventually(lambda: socket.utterances() == ["Well, I"], 60, "an utterance")
        pipe.close()
        eventually(lambda: socket.ended, 60, "the end")


def test_a_service_that_stops_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes the socket without an error. The text goes on, so no file may pass for all of it."""

    def stop(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(json.dumps({"type": "session.configured", "model": "m", "session_id": "s"}))
        socket.recv()
        socket.close(1001, "the service is shutting down")

    monkeypatch.chdir(tmp_path)
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe, os.fdopen(reading) as stdin, serve(stop, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("sys.stdin", stdin)
        pipe.write("Hello. ")
        pipe.flush()
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        assert main(["say", "--live", "-o", "a.mp3", "--url", url, "--key", "k"]) == 1
        assert "the service ended the speech: the service is shutting down" in capfd.readouterr().err
        assert not list(Path().iterdir())
        pipe.close()
        server.shutdown()


def test_wrong_arguments(
    service: CannedService, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text beside --live and a rate that the format lacks are usage errors; a service without WebSockets is named."""
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert main(["say", "hi", "--live", "-o", "a.mp3"]) == 2
        assert "stdin" in capfd.readouterr().err
        assert main(["say", "--live", "-o", "a.opus", "--sample-rate", "44100"]) == 2
        assert "opus cannot have 44100 Hz; it can have: 8000, 12000, " in capfd.readouterr().err
        assert main(["say", "--live", "-o", "a.mp3"]) == 1
        assert "HTTP 404" in capfd.readouterr().err
        assert not list(Path().iterdir())
        assert main(["say", "--live", "-o", "a.mp3", "--url", "http://127.0.0.1:9", "--key", "k"]) == 1
        assert "cannot be reached" in capfd.readouterr().err
        assert service.asked
