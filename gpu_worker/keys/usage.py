"""Usage in SQLite: requests, characters and seconds of audio by day, API key and model.

The synthesis thread counts and never waits for the disk: UsageLog adds up, and hands the sums to a thread of its own
every FLUSH_S. UsageFile belongs to that thread. What a killed process had not handed over is lost: FLUSH_S at most.
GPU workers of one machine may have one file: SQLite adds up what they write.
"""

import hashlib
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
import structlog

from shared.protocol import FindUsage, UsageRow

FLUSH_S: Final = 0.5
"""Seconds between two writes."""

MAX_ROWS: Final = 10_000
"""Rows of one answer."""

_BUSY_TIMEOUT_S: Final = 5.0
"""How long a write waits for another process that reads or writes the file."""

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
"""Linux gives each machine another one at each start."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL,
    requests INTEGER NOT NULL, characters INTEGER NOT NULL, audio_s REAL NOT NULL,
    refused INTEGER NOT NULL, failed INTEGER NOT NULL, cancelled INTEGER NOT NULL,
    PRIMARY KEY (day, key, model)
) WITHOUT ROWID
"""
_ADD: Final = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (day, key, model) DO UPDATE SET
    requests = requests + excluded.requests, characters = characters + excluded.characters,
    audio_s = audio_s + excluded.audio_s, refused = refused + excluded.refused,
    failed = failed + excluded.failed, cancelled = cancelled + excluded.cancelled
"""
_FIND: Final = "SELECT * FROM usage WHERE day BETWEEN ? AND ? ORDER BY day DESC, key, model LIMIT ?"
_CHARACTERS: Final = "SELECT key, sum(characters) FROM usage WHERE day = ? GROUP BY key"

log = structlog.get_logger(__name__)

Place = tuple[str, str, str]
"""Day, key and model of a sum."""


class Sums(msgspec.Struct):
    """Sums of usage. `requests` counts the requests that were taken, `refused` the others."""

    requests: int = 0
    characters: int = 0
    audio_s: float = 0.0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0

    def add(self, other: "Sums") -> None:
        """Add other sums."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class AddUsage(msgspec.Struct, frozen=True):
    """Add these sums to the file."""

    sums: dict[Place, Sums]


class UsageFound(msgspec.Struct, frozen=True):
    """The answer to `find`: its rows, or why the file cannot be read."""

    find: FindUsage
    rows: list[UsageRow] = []
    has_more: bool = False
    problem: str = ""
    source: str = ""


class UsageLog:
    """The sums that are not in the file yet. Owned by the synthesis thread."""

    def __init__(
        self,
        submit: Callable[[AddUsage | FindUsage], None],
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        """`submit` hands work to the thread of a UsageFile. `clock` is monotonic, `wall_clock` gives Unix seconds."""
        self._submit = submit
        self._clock = clock
        self._wall_clock = wall_clock
        self._sums: dict[Place, Sums] = {}
        self._flushed_at = clock()

    def add(self, client: str, model: str, sums: Sums) -> None:
        """Count `sums` for the key of `client`, today, UTC. Clients without a key are counted together."""
        day = datetime.fromtimestamp(self._wall_clock(), UTC).date()
        self._sums.setdefault((day.isoformat(), key_of(client), model), Sums()).add(sums)

    def find(self, find: FindUsage) -> None:
        """Look into the file, behind all that was counted before; UsageFound is the answer."""
        self.flush()
        self._submit(find)

    def flush_if_due(self) -> None:
        """Hand over what was counted, every FLUSH_S."""
        if self._sums and self._clock() - self._flushed_at >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Hand over what was counted."""
        if self._sums:
            self._submit(AddUsage(self._sums))
            self._sums = {}
        self._flushed_at = self._clock()


class UsageFile:
    """The file. One thread at a time uses it. A write that fails is tried again with the next one."""

    def __init__(self, path: Path, *, days: int, today: Callable[[], date] = lambda: datetime.now(UTC).date()) -> None:
        """`days`: how long a day is kept; 0: nothing is."""
        self._path = path
        self._days = days
        self._today = today
        self._cleared_on: date | None = None
        self._unsaved: dict[Place, Sums] = {}
        self._problem = ""
        self.source = _identity_of(path)
        """The same for all processes with this file, and for no others."""

    def handle(self, work: AddUsage | FindUsage) -> UsageFound | None:
        """Add sums, or find rows."""
        if isinstance(work, FindUsage):
            return self._find(work) if self._days else UsageFound(work)
        if not self._days:
            return None
        for place, sums in work.sums.items():
            self._unsaved.setdefault(place, Sums()).add(sums)
        try:
            self._save()
            self._problem = ""
        except (sqlite3.Error, OSError) as error:
            if str(error) != self._problem:  # it is tried twice a second
                log.error("usage_not_saved", file=str(self._path), reason=str(error))  # noqa: TRY400 -- no traceback helps
            self._problem = str(error)
        return None

    def characters_today(self) -> dict[str, int]:
        """The characters of today by client; none if the file cannot be read."""
        if not self._path.exists():
            return {}
        try:
            with closing(self._open()) as database:
                found = database.execute(_CHARACTERS, (self._today().isoformat(),)).fetchall()
                return {f"key:{key}": characters for key, characters in found}
        except (sqlite3.Error, OSError) as error:
            log.error("usage_not_read", file=str(self._path), reason=str(error))  # noqa: TRY400 -- no traceback helps
            return {}

    def _save(self) -> None:
        with closing(self._open()) as database, database:
            rows = [(*place, *msgspec.structs.astuple(sums)) for place, sums in self._unsaved.items()]
            database.executemany(_ADD, rows)
            if self._cleared_on != self._today():
                oldest = self._today() - timedelta(days=self._days)
                database.execute("DELETE FROM usage WHERE day < ?", (oldest.isoformat(),))
                self._cleared_on = self._today()
        self._unsaved.clear()

    def _find(self, find: FindUsage) -> UsageFound:
        try:
            if self._unsaved:
                self._save()
            with closing(self._open()) as database:
                period = find.since.isoformat(), find.until.isoformat()
                found = database.execute(_FIND, (*period, MAX_ROWS + 1)).fetchall()
            rows = [UsageRow(date.fromisoformat(day), *rest) for day, *rest in found[:MAX_ROWS]]
        except (sqlite3.Error, OSError, ValueError) as error:  # ValueError: a day that is none, written by hand
            return UsageFound(find, problem=f"{self._path}: {error}")
        return UsageFound(find, rows, has_more=len(found) > MAX_ROWS, source=self.source)

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(_SCHEMA)
        return database


def _identity_of(path: Path) -> str:
    """Names a file that need not exist yet: by the machine, the file system, and the place in it."""
    try:
        machine = _BOOT_ID.read_text().strip()
    except OSError:
        machine = socket.gethostname()
    existing = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    status = existing.stat()
    place = f"{machine} {status.st_dev} {status.st_ino} {path.absolute().relative_to(existing)}"
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def key_of(client: str) -> str:
    """The name or digest of the API key of `client`; "" without one: addresses of people are not kept."""
    return client.removeprefix("key:") if client.startswith("key:") else ""
