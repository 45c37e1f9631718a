"""When the thread that owns the voices' files looks at their folder: regularly, and when something was not found.

Owned by the synthesis thread. At most one look is under way; all that were asked for meanwhile become one.
"""

import time
from collections.abc import Callable
from typing import Final

from gpu_worker.voices.files import LookAtFolder

LOOK_S: Final = 0.5
"""Seconds between two looks. One costs two calls of stat; only a folder that has changed is read."""


class FolderWatch:
    """`submit` hands a look to the thread; `on_seen` takes note of its report. `clock` gives seconds."""

    def __init__(
        self,
        submit: Callable[[LookAtFolder], None],
        *,
        interval_s: float = LOOK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._submit = submit
        self._interval_s = interval_s
        self._clock = clock
        self._asked_at = clock()
        self._wanted = self._asked = self.seen = 0

    @property
    def looking(self) -> bool:
        """True while a look is under way."""
        return self._asked > self.seen

    def look(self) -> int:
        """The number of a look that begins after this call: it is over when `seen` has reached the number."""
        self._wanted = self._asked + 1
        self._ask()
        return self._wanted

    def look_if_due(self) -> None:
        """Look, if the last one began `interval_s` ago."""
        if not self.looking and self._clock() - self._asked_at >= self._interval_s:
            self.look()

    def on_seen(self) -> None:
        """The report of a look has come."""
        self.seen = self._asked
        self._ask()

    def _ask(self) -> None:
        if self._wanted > self._asked and not self.looking:
            self._asked = self._wanted
            self._asked_at = self._clock()
            self._submit(LookAtFolder())
