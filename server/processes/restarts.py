"""The pauses before a dead process starts again: none after a first death, growing ones while it keeps dying early."""

import contextlib
import signal
from typing import Final

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
SETTLED_S: Final = 60.0
"""A process that lived this long had started well: its death is a new event, and the next start does not wait."""


class RestartPauses:
    """The pauses before the starts of one process: none after the first early death, then 0.5, 1, 2 … 30 s."""

    def __init__(self) -> None:
        self._early_deaths = 0

    def after_death(self, lived_s: float) -> float:
        """Count a death; returns the seconds to wait before the next start."""
        self._early_deaths = 0 if lived_s >= SETTLED_S else self._early_deaths + 1
        if self._early_deaths <= 1:
            return 0.0
        return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._early_deaths - 2, 16)))


def death_cause(exit_code: int | None) -> str:
    """Why a process ended, for the log: "SIGKILL", "exit code 1"; None means that it could not be started."""
    if exit_code is None:
        return "it could not be started"
    if exit_code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
