"""The audit log: what its chain shows, and what a writer does with a log that is not as it left it."""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from shared.audit import (
    MAX_LINE,
    AuditEntry,
    AuditError,
    AuditLog,
    Verdict,
    default_key_file,
    head_file,
    read_key,
    verify,
)


def entry(name: str = "Ada", **fields: str) -> AuditEntry:
    """A clone by alice."""
    return msgspec.structs.replace(
        AuditEntry(event="voice.cloned", by="key:alice", id="voice_1", name=name, owner="alice", consent="cons_1"),
        **fields,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log in a folder that is not there yet."""
    return tmp_path / "audit" / "audit.jsonl"


@pytest.fixture
def log(path: Path) -> AuditLog:
    """A log of five lines."""
    log = AuditLog(path, wall=lambda: 1_000_000_000.5)
    for number in range(5):
        log.append([entry(f"voice {number}")])
    return log


def checked(path: Path, known_mac: str = "") -> Verdict:
    """The verdict, with the key beside the log."""
    return verify(path, read_key(default_key_file(path)), known_mac)


def lines_of(path: Path) -> list[bytes]:
    """The lines with their ends."""
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.usefixtures("log")
class TestChain:
    """`verify` names the first line that is not as it was written."""

    def test_an_unbroken_log(self, path: Path) -> None:
        """Each line is a JSON object with what happened; the files are for the service alone."""
        assert checked(path).problem == ""
        first, *_, last = (msgspec.json.decode(line) for line in lines_of(path))
        mac = first.pop("mac")
        assert first == {
            "line": 1,
            "at": "2001-09-09T01:46:40.500Z",
            "event": "voice.cloned",
            "by": "key:alice",
            "id": "voice_1",
            "name": "voice 0",
            "owner": "alice",
            "consent": "cons_1",
        }
        assert (checked(path).end.line, checked(path).end.mac) == (5, last["mac"])
        assert checked(path, known_mac=mac).problem == ""
        for file in (path, default_key_file(path), head_file(path)):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600

    @pytest.mark.parametrize(
        ("change", "broken"),
        [
            (lambda lines: [*lines[:2], lines[2].replace(b"voice 2", b"voice 9"), *lines[3:]], 3),
            (lambda lines: [*lines[:2], lines[2].replace(b'"line":3', b'"line":4'), *lines[3:]], 3),
            (lambda lines: lines[1:], 1),
            (lambda lines: [*lines[:2], *lines[3:]], 3),
            (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),
            (lambda lines: [*lines, lines[4]], 6),
            (lambda lines: [*lines[:3], b"\n", *lines[3:]], 4),
            (lambda lines: [*lines[:3], b"x" * (MAX_LINE + 10) + b"\n"], 4),
            (lambda lines: lines[:4], 5),
            (lambda _lines: [], 1),
            (lambda lines: [*lines[:4], lines[4][:-10]], 5),
        ],
        ids=[
            "changed",
            "renumbered",
            "no-first",
            "removed",
            "moved",
            "repeated",
            "blank",
            "long",
            "truncated",
            "emptied",
            "torn",
        ],
    )
    def test_a_broken_one(self, path: Path, change: Callable[[list[bytes]], list[bytes]], broken: int) -> None:
        """A change, a removal, an exchange and an addition; at the end of the log, too."""
        path.write_bytes(b"".join(change(lines_of(path))))
        verdict = checked(path)
        assert verdict.problem
        assert verdict.broken == broken

    def test_a_log_without_its_head(self, path: Path) -> None:
        """Without the head, missing lines could not be seen; a changed one proves nothing; another key fits neither."""
        head_file(path).rename(path.with_suffix(".away"))
        assert "is missing" in checked(path).problem
        head_file(path).write_bytes(path.with_suffix(".away").read_bytes().replace(b'"line":5', b'"line":4'))
        assert "was changed" in checked(path).problem
        assert verify(path, b"x" * 32).problem

    def test_an_older_copy(self, path: Path, log: AuditLog) -> None:
        """Who puts back older copies of both files is found out by a MAC that the service's log has shown."""
        files = {file: file.read_bytes() for file in (path, head_file(path))}
        log.append([entry("late")])
        late = checked(path).end.mac
        for file, content in files.items():
            file.write_bytes(content)
        assert checked(path).problem == ""
        assert "missing" in checked(path, known_mac=late).problem


class TestWriter:
    """The logs to which `append` adds no line, and the one that it mends."""

    @pytest.mark.parametrize("keep", [0, 3, 4])
    def test_a_truncated_log_gets_no_line(self, path: Path, log: AuditLog, keep: int) -> None:
        """The next line would hide that some are missing."""
        path.write_bytes(b"".join(lines_of(path)[:keep]))
        with pytest.raises(AuditError, match="missing"):
            log.append([entry()])
        assert len(lines_of(path)) == keep

    def test_what_a_crash_leaves(self, path: Path, log: AuditLog) -> None:
        """A line that its head has not seen stays; half a line goes, and its change did not happen."""
        head = head_file(path).read_bytes()
        log.append([entry("late")])
        head_file(path).write_bytes(head)
        with path.open("ab") as file:
            file.write(b'{"line":7,"at"')
        log.append([entry("later")])
        assert checked(path) == Verdict(checked(path).end)
        assert [msgspec.json.decode(line)["name"] for line in lines_of(path)[4:]] == ["voice 4", "late", "later"]

    def test_a_crash_before_the_first_head(self, path: Path) -> None:
        """The first line is no exception."""
        AuditLog(path).append([entry()])
        first = AuditLog(path.with_name("b.jsonl"))
        first.append([])
        assert not path.with_name("b.jsonl").exists()
        written = path.read_bytes()
        path.unlink()
        head_file(path).unlink()
        AuditLog(path).append([entry()])
        assert len(lines_of(path)) == len(written.splitlines()) == 1
        assert not checked(path).problem

    def test_a_lost_key(self, path: Path, log: AuditLog) -> None:
        """A new key would break the chain, so none is made."""
        default_key_file(path).unlink()
        with pytest.raises(AuditError, match=r"audit\.jsonl\.key, cannot be read"):
            log.append([entry()])
        assert len(lines_of(path)) == 5

    def test_a_key_of_the_operator(self, path: Path, tmp_path: Path) -> None:
        """It is used, and never made."""
        key_file = tmp_path / "key"
        with pytest.raises(AuditError, match="cannot be read"):
            AuditLog(path, key_file).append([entry()])
        key_file.write_text("short")
        with pytest.raises(AuditError, match="less than 32 bytes"):
            AuditLog(path, key_file).append([entry()])
        key_file.write_text("k" * 40 + "\n")
        AuditLog(path, key_file).append([entry()])
        assert verify(path, b"k" * 40).problem == ""
        assert not default_key_file(path).exists()

    def test_a_full_disk(self, path: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
        """A line that could not be synced is not there."""
        before = path.read_bytes()

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(AuditError, match="No space left on device"):
            log.append([entry()])
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert not checked(path).problem

    def test_a_head_that_cannot_be_written(self, path: Path, log: AuditLog) -> None:
        """The change is refused, so no line tells of it, and the next one can be written."""
        before = lines_of(path)
        obstacle = head_file(path).with_name(f"{head_file(path).name}.new")
        obstacle.mkdir()
        with pytest.raises(AuditError):
            log.append([entry("never")])
        obstacle.rmdir()
        assert lines_of(path) == before
        log.append([entry("later")])
        assert checked(path).end.line == len(before) + 1

    def test_a_line_is_bounded(self, path: Path) -> None:
        """Long fields are cut, and nothing in them ends the line."""
        AuditLog(path).append(
            [entry("\n\u2028\0" * 1000, was='","mac":"' * 99, consent="\x01" * 999, failed="\x02" * 999)]
        )
        (line,) = lines_of(path)
        assert len(line) <= MAX_LINE
        assert not checked(path).problem

    def test_several_writers(self, path: Path) -> None:
        """They write one chain: the kernel's lock belongs to the open file, so threads stand for processes here."""
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(_write, [path] * 3, ("a", "b", "c")))
        assert (checked(path).problem, checked(path).end.line) == ("", 30)


def _write(path: Path, name: str) -> None:
    log = AuditLog(path)
    for number in range(5):
        log.append([entry(f"{name} {number}"), entry(f"{name} {number}", failed="no")])
