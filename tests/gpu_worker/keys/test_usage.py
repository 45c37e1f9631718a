"""Usage: what is counted where, and what is in the file after every kind of mishap."""

import multiprocessing
import os
import signal
import sqlite3
import time
from datetime import date
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gpu_worker.keys.usage import AddUsage, Sums, UsageFile, UsageFound, UsageLog
from shared.protocol import FindUsage, UsageRow
from tests.gpu_worker.fakes import FakeClock

DAY = date(2026, 11, 29)
NOON = 1_795_953_600.0
"""Noon of DAY, UTC."""


def rows(file: UsageFile, since: date = date.min, until: date = date.max) -> list[UsageRow]:
    """The rows of the file."""
    found = file.handle(FindUsage(since=since, until=until))
    assert isinstance(found, UsageFound)
    assert not found.problem
    return found.rows


class TestLog:
    """The usage that waits for the file."""

    @pytest.fixture(autouse=True)
    def _log(self) -> None:
        self.clock, self.wall = FakeClock(), FakeClock()
        self.wall.now = NOON
        self.work: list[AddUsage | FindUsage] = []
        self.log = UsageLog(self.work.append, clock=self.clock, wall_clock=self.wall)

    def test_by_day_key_and_model(self) -> None:
        """Clients without a key are one, whatever their address; nothing is handed over before its time."""
        for client, model in (("key:a", "m"), ("key:a", "n"), ("peer:1.2.3.4", "m"), ("peer:5.6.7.8", "m")):
            self.log.add(client, model, Sums(requests=1, characters=5, audio_s=0.5))
        self.wall.advance(86_400)
        self.log.add("key:a", "m", Sums(refused=1))
        self.log.flush_if_due()
        assert self.work == []
        self.clock.advance(0.5)
        self.log.flush_if_due()
        one = Sums(requests=1, characters=5, audio_s=0.5)
        assert self.work == [
            AddUsage(
                {
                    ("2026-11-29", "a", "m"): one,
                    ("2026-11-29", "a", "n"): one,
                    ("2026-11-29", "", "m"): Sums(requests=2, characters=10, audio_s=1.0),
                    ("2026-11-30", "a", "m"): Sums(refused=1),
                }
            )
        ]
        self.log.flush_if_due()
        assert len(self.work) == 1

    def test_a_question_comes_behind_what_was_counted(self) -> None:
        """Its answer has everything up to now."""
        self.log.add("key:a", "m", Sums(requests=1))
        find = FindUsage(since=DAY, until=DAY)
        self.log.find(find)
        assert [type(work) for work in self.work] == [AddUsage, FindUsage]


class TestFile:
    """The usage in the file."""

    def test_sums_add_up(self, tmp_path: Path) -> None:
        """Over writes, and over processes; the latest day comes first."""
        place, next_day = ("2026-11-29", "a", "m"), ("2026-11-30", "a", "m")
        for _ in range(2):
            file = UsageFile(tmp_path / "new" / "usage.sqlite", days=30, today=lambda: DAY)
            for _ in range(2):
                file.handle(AddUsage({place: Sums(requests=1, characters=2, audio_s=0.5, cancelled=1)}))
        file.handle(AddUsage({next_day: Sums(refused=1)}))
        assert rows(file) == [
            UsageRow(date(2026, 11, 30), "a", "m", 0, 0, 0.0, 1, 0, 0),
            UsageRow(DAY, "a", "m", 4, 8, 2.0, 0, 0, 4),
        ]
        assert rows(file, until=date(2026, 11, 28)) == rows(file, since=date(2026, 12, 1)) == []
        assert [row.date for row in rows(file, since=DAY, until=DAY)] == [DAY]
        assert file.characters_today() == {"key:a": 8}

    def test_old_days_go(self, tmp_path: Path) -> None:
        """A day is kept for `days`."""
        file = UsageFile(tmp_path / "usage.sqlite", days=2, today=lambda: DAY)
        file.handle(AddUsage({(f"2026-11-{day}", "a", "m"): Sums(requests=1) for day in (26, 27, 28, 29)}))
        assert [row.date.day for row in rows(file)] == [29, 28, 27]

    def test_nothing_is_kept(self, tmp_path: Path) -> None:
        """With 0 days there is not even a file."""
        file = UsageFile(tmp_path / "usage.sqlite", days=0)
        file.handle(AddUsage({("2026-11-29", "a", "m"): Sums(requests=1)}))
        assert rows(file) == []
        assert file.characters_today() == {}
        assert list(tmp_path.iterdir()) == []

    def test_many_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer is bounded, and says that there is more."""
        monkeypatch.setattr("gpu_worker.keys.usage.MAX_ROWS", 3)
        file = UsageFile(tmp_path / "usage.sqlite", days=30, today=lambda: DAY)
        file.handle(AddUsage({("2026-11-29", f"k{number}", "m"): Sums(requests=1) for number in range(4)}))
        found = file.handle(FindUsage(since=DAY, until=DAY))
        assert isinstance(found, UsageFound)
        assert (len(found.rows), found.has_more) == (3, True)

    def test_a_disk_that_takes_nothing_for_a_while(self, tmp_path: Path) -> None:
        """Nothing is lost meanwhile, and the log says it once."""
        blocked = tmp_path / "folder"
        blocked.write_text("in the way")
        file = UsageFile(blocked / "usage.sqlite", days=30, today=lambda: DAY)
        place = ("2026-11-29", "a", "m")
        with capture_logs() as logs:
            for _ in range(3):
                file.handle(AddUsage({place: Sums(requests=1)}))
            found = file.handle(FindUsage(since=DAY, until=DAY))
        assert [entry["event"] for entry in logs] == ["usage_not_saved"]
        assert isinstance(found, UsageFound)
        assert "folder" in found.problem
        blocked.unlink()
        file.handle(AddUsage({place: Sums(requests=1)}))
        assert [row.requests for row in rows(file)] == [4]

    def test_a_day_that_is_none(self, tmp_path: Path) -> None:
        """A row that somebody wrote by hand is named in the answer; it must not end the thread."""
        file = UsageFile(tmp_path / "usage.sqlite", days=30, today=lambda: DAY)
        file.handle(AddUsage({("2026-11-29x", "a", "m"): Sums(requests=1)}))
        found = file.handle(FindUsage(since=date(2026, 11, 1), until=date(2026, 11, 30)))
        assert isinstance(found, UsageFound)
        assert "2026-11-29x" in found.problem

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        """It stays as it is, and the worker starts all the same."""
        path = tmp_path / "usage.sqlite"
        path.write_bytes(b"not a database" * 100)
        file = UsageFile(path, days=30, today=lambda: DAY)
        assert file.characters_today() == {}
        file.handle(AddUsage({("2026-11-29", "a", "m"): Sums(requests=1)}))
        assert path.read_bytes() == b"not a database" * 100


def _write_without_end(path: Path) -> None:
    file = UsageFile(path, days=30, today=lambda: DAY)
    while True:
        file.handle(AddUsage({("2026-11-29", "a", "m"): Sums(requests=1, characters=1)}))


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    """Kill -9 at any moment: what was written is there, each write as a whole."""
    path = tmp_path / "usage.sqlite"
    seen = 0
    for _ in range(3):
        writer = multiprocessing.get_context("fork").Process(target=_write_without_end, args=(path,))
        writer.start()
        before, deadline = seen, time.monotonic() + 60
        while seen < before + 3:
            assert time.monotonic() < deadline
            seen = sum(row.requests for row in rows(UsageFile(path, days=30)))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        (row,) = rows(UsageFile(path, days=30))
        assert row.requests == row.characters >= seen
        seen = row.requests
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
