"""`key new`: the key is printed once, its hash goes into the file, and the service takes it."""

import stat
from datetime import date
from pathlib import Path

import pytest

from server.__main__ import main
from server.http.keys import load_keyring
from shared.protocol import KeyLimits
from shared.settings import Settings


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of keys that is not there yet; TTS_KEYS_FILE names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTS_KEYS_FILE", str(tmp_path / "keys.toml"))
    return tmp_path / "keys.toml"


def test_two_keys(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is in the keyring with what the options say; only its owner can read the file, which has no key."""
    options = "--requests-per-minute 60 --characters-per-day 1000 --concurrent-requests 2 --model espeak-ng"
    assert main(["key", "new", "alice", *options.split(), "--voice", "alloy", "--expires", "2099-12-31"]) == 0
    alice, told = capfd.readouterr()
    alice = alice.strip()
    assert f"TTS_KEYS_FILE={path}" in told
    assert "Warning" not in told
    assert main(["key", "new", "the.boss", "--admin"]) == 0
    boss = capfd.readouterr().out.strip()
    assert alice.startswith("sk-tts-")
    assert len({alice, boss}) == 2
    assert not {alice, boss} & set(path.read_text().split('"'))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keyring = load_keyring(Settings(keys_file=path))
    found = keyring.find(alice)
    assert found is not None
    assert found.client == "key:alice"
    assert found.limits == KeyLimits(requests_per_minute=60, characters_per_day=1000, concurrent_requests=2)
    assert (found.models, found.voices) == ({"espeak-ng"}, {"alloy"})
    assert found.expires == date(2099, 12, 31)
    found = keyring.find(boss)
    assert found is not None
    assert found.is_admin


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["alice"], "has a key named alice"),
        (["a b"], "a name has letters"),
        (["bob", "--requests-per-minute", "0"], "requests_per_minute: must be at least 1"),
    ],
)
def test_a_mistake_adds_nothing(
    path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    """One sentence, exit code 2, and the file as before."""
    assert main(["key", "new", "alice"]) == 0
    before = path.read_text()
    capfd.readouterr()
    assert main(["key", "new", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert problem in err
    assert path.read_text() == before


@pytest.mark.parametrize("model", ["tts-1", "qwen3-tts-0.6b", "Qwen/Qwen3-TTS-12Hz-0.6B-Base"])
def test_a_model_that_is_none_here(path: Path, capfd: pytest.CaptureFixture[str], model: str) -> None:
    """The key is made, for the service may have other models; a warning names those that are known."""
    assert main(["key", "new", "alice", "--model", "Espeak-NG", "--model", model]) == 0
    _, told = capfd.readouterr()
    (warning,) = [line for line in told.splitlines() if line.startswith("Warning: ")]
    assert f"no model here has the id {model}; there are espeak-ng, qwen3-tts-0.6b-base, " in warning
    assert load_keyring(Settings(keys_file=path)).keys


def test_a_file_that_cannot_be_read(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It stays as it is."""
    path.write_text("[alice\n")
    assert main(["key", "new", "bob"]) == 2
    assert str(path) in capfd.readouterr().err
    assert path.read_text() == "[alice\n"


def test_a_folder_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The message names the file, and nothing is printed that looks like a key."""
    assert main(["key", "new", "bob", "--file", str(tmp_path / "none" / "keys.toml")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"{tmp_path}/none/keys.toml cannot be written: No such file or directory\n"


@pytest.mark.parametrize(
    ("day", "problem"),
    [("tomorrow", "'tomorrow' is no date such as 2027-12-31"), ("2020-12-31", "2020-12-31 is not in the future")],
)
def test_a_day_that_is_none(path: Path, capfd: pytest.CaptureFixture[str], day: str, problem: str) -> None:
    """The message shows how a date is written. A key that would never work is not made."""
    with pytest.raises(SystemExit):
        main(["key", "new", "bob", "--expires", day])
    assert problem in capfd.readouterr().err
    assert not path.exists()


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is guessed."""
    monkeypatch.chdir(tmp_path)
    assert main(["key", "new", "alice"]) == 2
    assert "TTS_KEYS_FILE" in capfd.readouterr().err
