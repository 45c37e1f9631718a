"""A folder of records that several processes read and write: one lock for writers, and a list for each reader.

The list reads the folder's time of change, and only the files that are new to it. It knows no record's fields.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog

from shared.file_locks import lock

SETTLED_S: Final = 1.0
"""A file system may count its times of change in steps this long: two changes within one step look like one."""

_LOCK: Final = ".lock"
Stamp = tuple[int, ...]
R = TypeVar("R")

log = structlog.get_logger(__name__)


@contextmanager
def folder_lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `folder` among processes and threads; the kernel releases it when its process dies.

    Raises BlockingIOError without `wait` if another one holds the lock. On a file system without locks, writers rely on
    atomic renames alone: names may collide.
    """
    with (folder / _LOCK).open("wb") as file:
        lock(file, wait=wait)
        yield


class RecordList(Generic[R]):
    """The records in the files `*.json` of `folder`, ordered by `order`. One thread at a time uses it.

    `read` returns the record of a file; it raises one of `unreadable` for a file that stays unlisted.
    """

    def __init__(
        self,
        folder: Path,
        read: Callable[[Path], R],
        *,
        order: Callable[[R], tuple[int, str]],
        unreadable: tuple[type[Exception], ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._read = read
        self._order = order
        self._unreadable = unreadable
        self._clock = clock
        self._stamp: Stamp | None = None
        self._stamp_since = 0.0
        self._settled = False
        self._known: dict[str, tuple[Stamp, R]] = {}
        self._faulty: set[tuple[str, Stamp]] = set()
        self._records: list[R] = []

    def scan(self) -> list[R]:
        """The records as they are now, the same list object while nothing has changed; OSError without an answer."""
        now, stamp = self._clock(), self._stamp_of_folder()
        if stamp != self._stamp:
            self._stamp, self._stamp_since, self._settled = stamp, now, False
        if not self._settled:
            known = self._list() if stamp else {}
            self._settled = now - self._stamp_since >= SETTLED_S  # not if the list could not be read
            if known != self._known:
                self._known = known
                self._records = sorted((record for _, record in known.values()), key=self._order)
        return self._records

    def _stamp_of_folder(self) -> Stamp:
        try:
            return _stamp_of(self._folder.stat())
        except FileNotFoundError:
            return ()

    def _list(self) -> dict[str, tuple[Stamp, R]]:
        found, faulty = {}, set()
        for path in [Path(entry.path) for entry in os.scandir(self._folder) if entry.name.endswith(".json")]:
            try:
                stamp = _stamp_of(path.stat())
            except FileNotFoundError:  # deleted a moment ago
                continue
            before = self._known.get(path.name)
            if before is not None and before[0] == stamp:
                found[path.name] = before
                continue
            try:
                found[path.name] = (stamp, self._read(path))
            except self._unreadable as error:
                if path.exists():
                    faulty.add(fault := (path.name, stamp))
                    if fault not in self._faulty:
                        log.warning("saved_voice_unreadable", voice=path.stem, reason=str(error))
        self._faulty = faulty
        return found


def _stamp_of(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size
