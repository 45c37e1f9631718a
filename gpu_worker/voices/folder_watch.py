"""Schedules the scans of the voices' folder: at an interval, and when a call does not find something.

Owned by the synthesis thread; the thread `voices` scans. At most one scan is under way. Requests for a scan that come
meanwhile are merged into the next one.
"""

import time
from collections.abc import Callable
from typing import Final

from gpu_worker.voices.records import ScanFolder

SCAN_INTERVAL_S: Final = 0.5
"""Seconds between two scans. A scan costs two calls of stat; it reads a folder only if that has changed."""


class FolderWatch:
    """`submit` hands a scan to the thread; `on_scanned` records its report. `clock` gives seconds."""

    def __init__(
        self,
        submit: Callable[[ScanFolder], None],
        *,
        interval_s: float = SCAN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._submit = submit
        self._interval_s = interval_s
        self._clock = clock
        self._submitted_at = clock()
        self._requested = self._submitted = self.scanned = 0
        """The numbers of the latest scans that were requested, submitted and reported."""

    @property
    def scanning(self) -> bool:
        """True while a scan is under way."""
        return self._submitted > self.scanned

    def scan(self) -> int:
        """Request a scan that begins after this call. Returns its number; it is over when `scanned` reaches that."""
        self._requested = self._submitted + 1
        self._submit_next()
        return self._requested

    def scan_if_due(self) -> None:
        """Scan if the last scan began `interval_s` ago."""
        if not self.scanning and self._clock() - self._submitted_at >= self._interval_s:
            self.scan()

    def on_scanned(self) -> None:
        """Record the report of a scan."""
        self.scanned = self._submitted
        self._submit_next()

    def _submit_next(self) -> None:
        if self._requested > self._submitted and not self.scanning:
            self._submitted = self._requested
            self._submitted_at = self._clock()
            self._submit(ScanFolder())
