"""The file .env: what is read as python-dotenv reads it, and what is refused with the file's name and the line."""

import os
from pathlib import Path

import pytest

from shared.dotenv_file import read_dotenv
from shared.settings import SettingsError

READ: list[tuple[str, dict[str, str]]] = [
    ("TTS_PORT=1", {"TTS_PORT": "1"}),
    ("export TTS_PORT=1", {"TTS_PORT": "1"}),
    ("TTS_PORT = 1  ", {"TTS_PORT": "1"}),
    ("TTS_PORT=1\r\nTTS_HOST=::1\r\n", {"TTS_PORT": "1", "TTS_HOST": "::1"}),
    ("\ufeffTTS_PORT=1", {"TTS_PORT": "1"}),
    ("TTS_API_KEYS='a#b' # two", {"TTS_API_KEYS": "a#b"}),
    ('TTS_API_TITLE="My # speech"', {"TTS_API_TITLE": "My # speech"}),
    ("TTS_API_TITLE=Bob's", {"TTS_API_TITLE": "Bob's"}),
    ('TTS_API_TITLE=The "best"', {"TTS_API_TITLE": 'The "best"'}),
    ("TTS_API_TITLE=Bücherei # a comment", {"TTS_API_TITLE": "Bücherei"}),
    ("TTS_API_KEYS=${OUTER}-1", {"TTS_API_KEYS": "outer-1"}),
    ("BASE=/srv\nTTS_MODELS_DIR=${BASE}/models", {"TTS_MODELS_DIR": "/srv/models"}),
    ("TTS_API_TITLE=${NOWHERE:-Speech}", {"TTS_API_TITLE": "Speech"}),
    ("TTS_PORT=1\nTTS_PORT=1", {"TTS_PORT": "1"}),
    ('PEM="two\nlines"\nTTS_PORT=1', {"TTS_PORT": "1"}),
    ("# nothing\n\n   \nTTS_API_KEYS=\nOTHER=1", {}),
    ("tts_port=1", {"tts_port": "1"}),
    ("", {}),
]

REFUSED: list[tuple[str, str]] = [
    ("\n\nTTS_API_KEYS: hush", ".env line 3: TTS_API_KEYS cannot be read"),
    ("TTS_API_KEYS hush", ".env line 1: TTS_API_KEYS cannot be read"),
    ("TTS_PORT=1\r\n  export TTS_API_KEYS: hush\r\n", ".env line 2: TTS_API_KEYS cannot be read"),
    ("tts_api_keys: hush", ".env line 1: tts_api_keys cannot be read"),
    ("TTS_API_KEYS:hush", ".env line 1: this line has no ="),
    ("TTS_API_KEYS", ".env line 1: TTS_API_KEYS has no ="),
    ("TTS_API_KEYS=\nhush", ".env line 2: this line has no ="),
    ("=hush", ".env line 1: this line cannot be read"),
    ("TTS_API_KEYS='hush", ".env line 1: TTS_API_KEYS cannot be read"),
    ('TTS_API_KEYS="hush" more', ".env line 1: TTS_API_KEYS cannot be read"),
    ('TTS_API_KEYS=hush"', ".env line 1: TTS_API_KEYS ends with a quote"),
    ('TTS_API_TITLE="Mine\nTTS_API_KEYS=hush\nTTS_MODELS_DIR=a"', ".env line 1: TTS_API_TITLE has a line break"),
    ('OTHER="Mine\nTTS_API_KEYS=hush\nMORE="', ".env line 1: OTHER has a setting within its quotes"),
    ("TTS_API_KEYS=hush\nTTS_PORT=1\nTTS_API_KEYS=", ".env line 3: TTS_API_KEYS has another value on line 1"),
    ("TTS_API_KEYS=${NOWHERE}", ".env line 1: TTS_API_KEYS needs the variable NOWHERE"),
    ("TTS_API_KEYS=${EMPTY}", ".env line 1: TTS_API_KEYS needs the variable EMPTY"),
]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTER", "outer")
    monkeypatch.setenv("EMPTY", "")


def refusal(data: bytes) -> str:
    """The one problem of a file with this content."""
    Path(".env").write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        read_dotenv(Path(".env"))
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(("text", "found"), READ)
def test_lines_that_are_read(text: str, found: dict[str, str]) -> None:
    """Spaces, quotes, comments, `export`, CRLF, a byte order mark and ${…} mean what they mean to python-dotenv."""
    Path(".env").write_bytes(text.encode())
    assert read_dotenv(Path(".env")) == found


@pytest.mark.parametrize(("text", "problem"), REFUSED)
def test_lines_that_are_refused(text: str, problem: str) -> None:
    """A line that may have been meant as a setting and is none is an error, which does not repeat the value."""
    said = refusal(text.encode())
    assert said.startswith(problem)
    assert "hush" not in said


def test_every_wrong_line_at_once() -> None:
    """One message has all lines that are wrong."""
    Path(".env").write_text("TTS_PORT: 1\nTTS_HOST=::1\nTTS_API_KEYS: 2\n")
    with pytest.raises(SettingsError) as caught:
        read_dotenv(Path(".env"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [".env line 1", ".env line 3"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("TTS_PORT=1\nTTS_API_TITLE=Bücherei\n".encode("latin-1"), ".env line 2: this line is not UTF-8"),
        ("TTS_PORT=1\n".encode("utf-16"), ".env is not UTF-8 but UTF-16"),
        ("TTS_PORT=1\n".encode("utf-16-le"), ".env is not UTF-8 but UTF-16"),
        (b"TTS_API_TITLE=a\0b\n", ".env is not UTF-8 but UTF-16 or no text"),
    ],
)
def test_other_encodings(data: bytes, problem: str) -> None:
    """A file that is not UTF-8 is an error that names it and says how to save it."""
    said = refusal(data)
    assert said.startswith(problem)
    assert "save" in said


def test_a_folder_in_the_place_of_the_file() -> None:
    """A folder, which a container's mount of a missing file makes, is an error; a virtual environment is left alone."""
    Path(".env").mkdir()
    with pytest.raises(SettingsError, match=r"\.env is a folder"):
        read_dotenv(Path(".env"))
    Path(".env/pyvenv.cfg").touch()
    assert read_dotenv(Path(".env")) == {}


def test_a_pipe_in_the_place_of_the_file() -> None:
    """A pipe without a writer would stop a reload for ever, so it is an error; /dev/null is an empty file."""
    os.mkfifo(".env")
    with pytest.raises(SettingsError, match=r"\.env cannot be read by .*: it is a pipe or a device"):
        read_dotenv(Path(".env"))
    Path(".env").unlink()
    Path(".env").symlink_to(os.devnull)
    assert read_dotenv(Path(".env")) == {}


def test_no_file() -> None:
    """Without the file there are no variables."""
    assert read_dotenv(Path(".env")) == {}
