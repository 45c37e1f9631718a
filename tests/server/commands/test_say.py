"""`say`: the audio of a running service ends in a file or a pipe, complete or not at all."""

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
    """The file holds every chunk; its ending decides the format; stdout stays empty."""
    service.answers[SPEECH] = (200, [b"abc", b"def" * 10_000])
    assert main(["say", "Good morning.", "-o", "hello.FLAC"]) == 0
    assert Path("hello.FLAC").read_bytes() == b"abc" + b"def" * 10_000
    assert service.asked[0][3] == {"input": "Good morning.", "response_format": "flac"}
    out, err = capfd.readouterr()
    assert (out, err) == ("", "hello.FLAC\n")


def test_every_option_is_passed_on(service: CannedService) -> None:
    """What the command line says is what the service is asked; what it leaves out is left out."""
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
    [("a.mp3", "mp3"), ("a.opus", "opus"), ("a.ogg", "opus"), ("a.aac", "aac"), ("a.wav", "wav"), ("a.raw", "pcm")],
)
def test_the_ending_chooses_the_format(service: CannedService, name: str, chosen: str) -> None:
    """What a player would take the file for is what is in it."""
    service.answers[SPEECH] = (200, [b"x"])
    assert main(["say", "hi", "-o", name]) == 0
    assert service.asked[0][3]["response_format"] == chosen


@pytest.mark.parametrize("name", ["a.m4a", "a.txt", "speech"])
def test_an_ending_of_no_format_is_refused(
    service: CannedService, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """No mp3 under another's name, unless --format says that it is meant so."""
    service.answers[SPEECH] = (200, [b"x"])
    assert main(["say", "hi", "-o", name]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"{name}: ")
    assert ".opus" in err
    assert "--format" in err
    assert (service.asked, list(Path().iterdir())) == ([], [])
    assert main(["say", "hi", "-o", name, "--format", "aac"]) == 0
    assert service.asked[0][3]["response_format"] == "aac"


@pytest.mark.parametrize("arguments", [["say", "-o", "a.mp3"], ["say", "-", "-o", "a.mp3"]])
def test_text_comes_from_stdin(service: CannedService, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Without a text, or with -, it is read from stdin."""
    service.answers[SPEECH] = (200, [b"x"])
    monkeypatch.setattr("sys.stdin", io.StringIO("from a file\n"))
    assert main(arguments) == 0
    assert service.asked[0][3]["input"] == "from a file\n"


def test_piped_output_is_the_audio_alone(service: CannedService, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """With -o -, or into a pipe, stdout gets the bytes and nothing else."""
    service.answers[SPEECH] = (200, [b"\x00\xff", b"\x01"])
    assert main(["say", "hi"]) == 0
    assert main(["say", "hi", "-o", "-"]) == 0
    assert capfdbinary.readouterr() == (b"\x00\xff\x01" * 2, b"")


def test_a_broken_transfer_leaves_no_file(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """Half a speech is an error, and what was there before stays."""
    Path("old.mp3").write_bytes(b"before")
    service.answers[SPEECH] = (200, [b"half", None])
    assert main(["say", "hi", "-o", "old.mp3"]) == 1
    assert Path("old.mp3").read_bytes() == b"before"
    assert [path.name for path in Path().iterdir()] == ["old.mp3"]
    assert "incomplete" in capfd.readouterr().err


def test_a_refusal_is_its_message(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """What the service says is shown as it is, with exit code 1 and no file."""
    service.answers[SPEECH] = (400, {"error": {"message": "voice: there is no voice 'x'", "type": "t"}})
    assert main(["say", "hi", "-o", "a.mp3"]) == 1
    assert capfd.readouterr().err == "voice: there is no voice 'x' (HTTP 400)\n"
    assert list(Path().iterdir()) == []


def test_a_file_that_cannot_be_written(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong path is a message, not a traceback."""
    service.answers[SPEECH] = (200, [b"x"])
    assert main(["say", "hi", "-o", "nowhere/a.mp3"]) == 1
    assert capfd.readouterr().err == "nowhere/a.mp3 cannot be written: No such file or directory\n"


def test_a_reader_that_has_enough_is_no_error(service: CannedService) -> None:
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
