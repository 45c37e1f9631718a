"""The settings in force: read anew from .env and files, all or nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.http.keys import digest_of
from server.reload.configuration import Configuration
from server.text import load_pronunciations

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes .env in the current folder, which is a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTS_MAX_QUEUE", "5")

    def write(**variables: object) -> None:
        Path(".env").write_text("".join(f"TTS_{name}={value}\n" for name, value in variables.items()))

    yield write
    load_pronunciations.cache_clear()  # it knows files of this folder by their names alone


def test_nothing_changed(write: Write) -> None:
    """A reload without a change gives no new state."""
    write(IDLE_TIMEOUT=60)
    configuration = Configuration([], [])
    outcome, state = configuration.reload()
    assert (outcome.changed, outcome.needs_restart, outcome.problems, state) == ([], [], [], None)


def test_env_and_environment(write: Write) -> None:
    """Values of .env change, and leave with their line. The environment of the process goes before them."""
    write(IDLE_TIMEOUT=60, MAX_QUEUE=6)
    configuration = Configuration([], [])
    configuration.use_worker("ipc:///run/tts/worker.ipc")
    write(STALL_TIMEOUT=7, MAX_QUEUE=8, PORT=9000)
    outcome, state = configuration.reload()
    assert (outcome.changed, outcome.needs_restart) == (["TTS_IDLE_TIMEOUT", "TTS_STALL_TIMEOUT"], ["TTS_PORT"])
    assert state is configuration.state
    settings = configuration.settings
    assert (settings.idle_timeout_s, settings.stall_timeout_s, settings.max_queue) == (300, 7, 5)
    assert (settings.port, settings.worker_url) == (8000, "ipc:///run/tts/worker.ipc")
    assert configuration.state.worker_variables == {"TTS_IDLE_TIMEOUT": "", "TTS_STALL_TIMEOUT": "7"}


def test_a_gpu_worker_that_starts_later(write: Write) -> None:
    """Its environment has what is in force, and not what needs a restart or was not read yet."""
    write(IDLE_TIMEOUT=60)
    configuration = Configuration([], [])
    configuration.use_worker("ipc:///run/tts/worker.ipc")
    write(IDLE_TIMEOUT=70, DTYPE="float32")
    configuration.reload()
    write(IDLE_TIMEOUT=80)
    environ = configuration.worker_environ()
    ours = {name: value for name, value in environ.items() if name.startswith("TTS_")}
    assert ours == {
        "TTS_MAX_QUEUE": "5",
        "TTS_IDLE_TIMEOUT": "70",
        "TTS_WORKER_URL": "ipc:///run/tts/worker.ipc",
    }
    assert "PATH" in environ


def test_files(write: Write) -> None:
    """The contents of the files of keys and pronunciations count; their variables stand for them."""
    Path("keys.toml").write_text(f'[alice]\nhash = "{digest_of("sk-a")}"\n')
    Path("words.toml").write_text('[en]\nnginx = "engine X"\n')
    write(KEYS_FILE="keys.toml", PRONUNCIATIONS="words.toml")
    configuration = Configuration([], [])
    assert configuration.state.keyring.find("sk-a")
    Path("keys.toml").write_text(f'[bob]\nhash = "{digest_of("sk-b")}"\n')
    Path("words.toml").write_text('[en]\nnginx = "engine X"\nGIF = "jif"\n')
    outcome, _ = configuration.reload()
    assert outcome.changed == ["TTS_KEYS_FILE", "TTS_PRONUNCIATIONS"]
    assert not configuration.state.keyring.find("sk-a")
    assert configuration.state.keyring.find("sk-b")
    assert load_pronunciations(Path("words.toml"))["en"].count == 2
    assert configuration.reload()[0].changed == []


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"IDLE_TIMEOUT": "soon"}, "TTS_IDLE_TIMEOUT: must be a number of seconds, not 'soon'"),
        ({"KEYS_FILE": "absent.toml"}, "absent.toml"),
        ({"PRONUNCIATIONS": "absent.toml"}, "absent.toml"),
        ({"MAX_QUEUE": "'6"}, ".env line 1"),
    ],
)
def test_a_mistake_changes_nothing(write: Write, wrong: dict[str, str], problem: str) -> None:
    """Neither the setting that is wrong, nor one beside it."""
    write(CORS_ORIGINS="http://a.example")
    configuration = Configuration([], [])
    before = configuration.state
    write(**wrong, CORS_ORIGINS="http://b.example")
    outcome, state = configuration.reload()
    assert [problem in said for said in outcome.problems] == [True]
    assert (outcome.changed, outcome.needs_restart, state) == ([], [], None)
    assert configuration.state is before


def test_a_renewed_certificate(write: Write) -> None:
    """Other contents at the same paths are a change; with another path, others were checked than are in force."""
    for name in ("cert.pem", "key.pem", "other.pem"):
        Path(name).write_text("old")
    write(TLS_CERT="cert.pem", TLS_KEY="key.pem")
    configuration = Configuration([], [])
    Path("cert.pem").write_text("new")
    assert configuration.reload()[0].changed == ["TTS_TLS_CERT"]
    assert configuration.reload()[0].changed == []
    write(TLS_CERT="cert.pem", TLS_KEY="other.pem")
    Path("cert.pem").write_text("newest")
    outcome, _ = configuration.reload()
    assert (outcome.changed, outcome.needs_restart) == ([], ["TTS_TLS_KEY"])
    write(TLS_CERT="cert.pem", TLS_KEY="key.pem")
    assert configuration.reload()[0].changed == ["TTS_TLS_CERT"]
