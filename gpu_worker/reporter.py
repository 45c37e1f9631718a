"""The figures of the process: counters, and the snapshot that dashboards read. Owned by the synthesis thread."""

import os
from collections.abc import Callable, Sequence
from typing import Final, Literal

from gpu_worker.memory import MemoryProbe
from shared.protocol import (
    CleanupPass,
    Counters,
    DeviceMemory,
    HostMemory,
    ModelState,
    SavedVoice,
    Snapshot,
)

DEVICE_READING_S: Final = 0.2
"""A reading of the driver serves for so long: several web workers ask five times a second each."""

Outcome = Literal["started", "finished", "failed", "cancelled", "rejected"]


class Reporter:
    """Counts requests and puts snapshots together."""

    def __init__(
        self,
        *,
        boot_id: str,
        default_model: str,
        probe: MemoryProbe,
        shared_bytes: Callable[[], dict[str, int]],
        clock: Callable[[], float],
    ) -> None:
        self.boot_id = boot_id
        self._default_model = default_model
        self._probe = probe
        self._shared_bytes = shared_bytes
        self._clock = clock
        self._started_at = clock()
        self._counts: dict[Outcome, int] = dict.fromkeys(("started", "finished", "failed", "cancelled", "rejected"), 0)
        self._device: DeviceMemory | None = None
        self._device_read_at = 0.0

    def count(self, outcome: Outcome) -> None:
        """One more request went this way."""
        self._counts[outcome] += 1

    def snapshot(
        self,
        *,
        accepting: bool,
        running: int,
        queued: int,
        slots: int,
        models: list[ModelState],
        host: HostMemory,
        cleanup: CleanupPass | None,
        voices: list[SavedVoice],
        preloading: Sequence[str] = (),
    ) -> Snapshot:
        """Everything at this moment."""
        now = self._clock()
        if self._device is None or now - self._device_read_at >= DEVICE_READING_S:
            self._device, self._device_read_at = self._probe.device(), now
        return Snapshot(
            pid=os.getpid(),
            boot_id=self.boot_id,
            uptime_s=now - self._started_at,
            accepting=accepting,
            default_model=self._default_model,
            running=running,
            queued=queued,
            slots=slots,
            requests=Counters(**self._counts),
            models=models,
            device=self._device,
            host=host,
            shared_bytes=self._shared_bytes(),
            voices=voices,
            cleanup=cleanup,
            preloading=list(preloading),
        )
