"""`say`: it writes the audio of a running service into a file or a pipe; an incomplete file is never left."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.__main__ import main
from tests.server.commands.conftest import CannedService

SPEECH = "/v1/audio/speech"


def test_speech_goes_into_a_file(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """The file has every chunk; its ending decides the format; stdout stays empty."""
    service.answers[SPEECH] = (200, [b"abc", b"def" * 10_000])
    assert main(["say", "Good morning.", "-o", "hello.FLAC"]) == 0
    assert Path("hello.FLAC").read_bytes() == b"abc" + b"def" * 10_000
    assert service.asked[0][3] == {"input": "Good morning.", "response_format": "flac"}
    out, err = capfd.readouterr()
    assert (out, err) == ("", "hello.FLAC\n")


def test_every_option_is_passed_on(service: CannedService) -> None:
    """The request has a field for each option that was given, and no others."""
    service.answers[SPEECH] = (200, [b"x"])
    options = "--model tts-1 --voice coral --language en --instructions calm --speed 1.5 --seed 7 --format opus"
    assert main(["say", "hi", "-o", "a.bin", *options.split()]) == 0
    assert service.asked[0][3] == {
        "input": "hi",
        "response_format": "opus",
        "model": "tts-1",
        "voice": "coral",
        "language": "en",
        "instructions": "calm",
        "speed": 1.5,
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("a.mp3", "mp3"), ("a.opus", "opus"), ("a.ogg", "ogg"), ("a.aac", "aac"), ("a.wav", "wav"), ("a.raw", "pcm")],
)
def test_the_ending_chooses_the_format(service: CannedService, name: str, chosen: str) -> None:
    """The format is the one that players expect of the ending."""
    service.answers[SPEECH] = (200, [b"x"])
    assert main(["say", "hi", "-o", name]) == 0
    assert service.asked[0][3]["response_format"] == chosen


@pytest.mark.parametrize("name", ["a.m4a", "a.txt", "speech"])
def test_an_unknown_ending_is_refused(service: CannedService, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """An ending of no known format is refused unless --format chooses the format."""
    service.answers[SPEECH] = (200, [b"x"])
    assert main(["say", "hi", "-o", name]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"{name}: ")
    assert ".opus" in err
    assert "--format" in err
    assert (service.asked, list(Path().iterdir())) == ([], [])
    assert main(["say", "hi", "-o", name, "--format", "aac"]) == 0
    assert service.asked[0][3]["response_format"] == "aac"


@pytest.mark.parametrize("speed", ["nan", "inf", "1e999", "fast"])
def test_a_speed_that_is_no_number(capfd: pytest.CaptureFixture[str], speed: str) -> None:
    """The option is named: JSON has no such number, and the service would speak of broken JSON."""
    with pytest.raises(SystemExit):
        main(["say", "hi", "-o", "a.mp3", "--speed", speed])
    assert f"argument --speed: must be a number, not '{speed}'" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["say", "-o", "a.mp3"], ["say", "-", "-o", "a.mp3"]])
def test_text_comes_from_stdin(service: CannedService, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Without a text, or with -, `say` reads stdin."""
    service.answers[SPEECH] = (200, [b"x"])
    monkeypatch.setattr("sys.stdin", io.StringIO("from a file\n"))
    assert main(arguments) == 0
    assert service.asked[0][3]["input"] == "from a file\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_stdin_that_is_no_text(
    service: CannedService, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], errors: str
) -> None:
    """Bytes that are no UTF-8 are refused, also in the locale C, where Python reads all bytes."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode("latin-1")), "utf-8", errors))
    assert main(["say", "-o", "a.mp3"]) == 1
    assert "stdin is not text, or in another encoding" in capfd.readouterr().err
    assert not service.asked


def test_piped_output_is_the_audio_alone(service: CannedService, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """With -o -, or into a pipe, stdout gets the audio bytes alone."""
    service.answers[SPEECH] = (200, [b"\x00\xff", b"\x01"])
    assert main(["say", "hi"]) == 0
    assert main(["say", "hi", "-o", "-"]) == 0
    assert capfdbinary.readouterr() == (b"\x00\xff\x01" * 2, b"")


def test_a_broken_transfer_leaves_no_file(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """A transfer that breaks off is an error, and the file that was there before stays."""
    Path("old.mp3").write_bytes(b"before")
    service.answers[SPEECH] = (200, [b"half", None])
    assert main(["say", "hi", "-o", "old.mp3"]) == 1
    assert Path("old.mp3").read_bytes() == b"before"
    assert [path.name for path in Path().iterdir()] == ["old.mp3"]
    assert "incomplete" in capfd.readouterr().err


def test_a_refusal_is_its_message(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """The message of the service is printed unchanged; the exit code is 1 and no file is left."""
    service.answers[SPEECH] = (400, {"error": {"message": "voice: there is no voice 'x'", "type": "t"}})
    assert main(["say", "hi", "-o", "a.mp3"]) == 1
    assert capfd.readouterr().err == "voice: there is no voice 'x' (HTTP 400)\n"
    assert list(Path().iterdir()) == []


def test_a_file_that_cannot_be_written(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """A path that cannot be written gives a message, not a traceback."""
    service.answers[SPEECH] = (200, [b"x"])
    assert main(["say", "hi", "-o", "nowhere/a.mp3"]) == 1
    assert capfd.readouterr().err == "nowhere/a.mp3 cannot be written: No such file or directory\n"


def test_a_closed_pipe_is_no_traceback(service: CannedService) -> None:
    """`say … | head -c 3` ends without a traceback."""
    service.answers[SPEECH] = (200, [b"x" * 100_000] * 20)
    root = str(Path(__file__).parents[3])
    environ = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-m", "server", "say", "hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(3) == b"xxx"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
