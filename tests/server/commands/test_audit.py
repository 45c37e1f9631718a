"""`python -m server audit verify`: exit codes, and what it prints."""

from pathlib import Path

import pytest

from server.__main__ import main
from shared.audit import AuditEntry, AuditLog, default_key_file, head_file


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of three lines, which TTS_AUDIT_LOG names."""
    path = tmp_path / "audit.jsonl"
    entries = [AuditEntry(event="voice.deleted", by="key:alice", id=f"v{n}", name="a\x1b[31m") for n in range(3)]
    AuditLog(path).append(entries)
    monkeypatch.setenv("TTS_AUDIT_LOG", str(path))
    return path


def test_an_unbroken_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, and the MAC of the last line, which a later check may ask for."""
    assert main(["audit", "verify"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{log}: 3 lines, unbroken")
    assert main(["audit", "verify", str(log), "--key", str(default_key_file(log)), "--mac", shown.split()[-1]]) == 0
    assert main(["audit", "verify", "--mac", "0" * 64]) == 1


def test_the_first_broken_line(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1; its number, what is wrong, and the line, without what steers a terminal."""
    content = log.read_bytes().replace(b"v1", b"v\x1b").replace(b"v2", b"v9")
    log.write_bytes(content)
    assert main(["audit", "verify"]) == 1
    place, line = capsys.readouterr().out.splitlines()
    assert place.startswith(f"{log}:2: it was changed")
    assert '"id":"v\\x1b"' in line
    assert "\x1b" not in line


def test_no_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log or a key that is gone is a failure, in one sentence."""
    log.unlink()
    assert main(["audit", "verify"]) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err
    default_key_file(log).unlink()
    assert main(["audit", "verify"]) == 1
    assert "the key of the audit log" in capsys.readouterr().err


def test_before_the_first_voice(log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A service without saved voices has no log, which is no failure. A log that is asked for by name or MAC is."""
    voices = log.parent / "voices"
    monkeypatch.setenv("TTS_VOICES_DIR", str(voices))
    for file in (log, default_key_file(log), head_file(log)):
        file.unlink()
    assert main(["audit", "verify"]) == 0
    assert capsys.readouterr().out.startswith(f"{log}: there is no audit log yet")
    assert main(["audit", "verify", str(log)]) == 1
    assert main(["audit", "verify", "--mac", "0" * 64]) == 1
    capsys.readouterr()
    (voices / "consents").mkdir(parents=True)
    (voices / "consents" / "cons_1.json").touch()
    assert main(["audit", "verify"]) == 1
    assert capsys.readouterr().err.startswith(f"{log}: there is no audit log, but there are saved voices in {voices}")
