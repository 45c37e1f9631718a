"""The figures of the process: counters, and the snapshot that dashboards read. Owned by the synthesis thread."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, Literal

import msgspec

from gpu_worker.requests import Request
from gpu_worker.residency import MemoryProbe, TransitionDone, TransitionFailed
from shared.protocol import (
    FIRST_AUDIO_BOUNDS_S,
    MOVE_BOUNDS_S,
    REAL_TIME_FACTOR_BOUNDS,
    UNDERRUN_BOUNDS_S,
    CleanupPass,
    Counters,
    DeviceMemory,
    Histogram,
    HostMemory,
    ModelFigures,
    ModelStatus,
    SavedVoice,
    Snapshot,
)

READING_S: Final = 0.2
"""A reading of the device's and the host's memory serves for so long: every look at /admin/vram asks for one."""

MOST_STREAMS: Final = 50
"""Streams that a snapshot lists: some hundred bytes each, in every answer to a ping."""

Outcome = Literal["started", "finished", "failed", "cancelled", "rejected"]


class Stats:
    """Counts what happens and puts snapshots together.

    `settings` are the worker's in force, under their public names; `restarts` is what its supervisor told it.
    """

    def __init__(
        self,
        *,
        boot_id: str,
        default_model: str,
        settings: Mapping[str, Any],
        restarts: int,
        probe: MemoryProbe,
        shared_bytes: Callable[[], dict[str, int]],
        clock: Callable[[], float],
    ) -> None:
        self.boot_id = boot_id
        self.settings = {**settings, "default_model": default_model}
        self._default_model = default_model
        self._restarts = restarts
        self._probe = probe
        self._shared_bytes = shared_bytes
        self._clock = clock
        self._started_at = clock()
        self._counts: dict[Outcome, int] = dict.fromkeys(("started", "finished", "failed", "cancelled", "rejected"), 0)
        self._figures: dict[str, _Figures] = {}
        self._memory: tuple[DeviceMemory, HostMemory] | None = None
        self._memory_read_at = 0.0

    def count(self, outcome: Outcome) -> None:
        """One more request went this way."""
        self._counts[outcome] += 1

    def began(self, request: Request) -> None:
        """The request's first piece is there, now."""
        self._of(request.model).first_audio_s.add(self._clock() - request.arrived)

    def spoken(self, request: Request) -> None:
        """The request has been said in full, now."""
        figures, playback = self._of(request.model), request.playback
        figures.underrun_s.add(playback.dry_s)
        if playback.audio_s and request.admitted is not None:
            took_s = self._clock() - request.admitted - playback.held_s
            figures.real_time_factor.add(took_s / playback.audio_s)

    def moved(self, report: TransitionDone | TransitionFailed) -> None:
        """A model was moved, or could not be."""
        figures, kind = self._of(report.transition.model), report.transition.kind
        if isinstance(report, TransitionDone):
            figures.moves_s.setdefault(kind, _Distribution(MOVE_BOUNDS_S)).add(report.seconds)
            return
        figures.failed_moves[kind] = figures.failed_moves.get(kind, 0) + 1
        if report.error.code == "insufficient_vram":
            self.ran_out_of_memory(report.transition.model)

    def ran_out_of_memory(self, model: str) -> None:
        """The device had no more memory for the model."""
        self._of(model).out_of_memory += 1

    def snapshot(
        self,
        *,
        accepting: bool,
        running: int,
        queued: int,
        slots: int,
        models: list[ModelStatus],
        offloaded_bytes: int,
        cleanup: CleanupPass | None,
        voices: list[SavedVoice],
        requests: Iterable[Request],
        preloading: Sequence[str] = (),
    ) -> Snapshot:
        """Everything at this moment; of `requests`, all that are open, those with a slot come first.

        `offloaded_bytes`: host RAM that models hold.
        """
        now = self._clock()
        if self._memory is None or now - self._memory_read_at >= READING_S:
            self._memory, self._memory_read_at = (self._probe.device(), self._probe.host()), now
        device, host = self._memory
        streams = sorted(requests, key=lambda request: request.admitted is None)
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
            device=device,
            host=msgspec.structs.replace(host, offloaded_bytes=offloaded_bytes),
            shared_bytes=self._shared_bytes(),
            voices=voices,
            cleanup=cleanup,
            preloading=list(preloading),
            restarts=self._restarts,
            figures={model: figures.told() for model, figures in self._figures.items()},
            streams=[request.state(now) for request in islice(streams, MOST_STREAMS)],
        )

    def _of(self, model: str) -> "_Figures":
        return self._figures.setdefault(model, _Figures())


class _Distribution:
    """A Histogram that is still counted."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts: list[int] = []
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts = self._counts or [0] * (len(self._bounds) + 1)
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self) -> Histogram:
        return Histogram(counts=list(self._counts), sum=self._sum)


class _Figures:
    """ModelFigures that are still counted."""

    def __init__(self) -> None:
        self.first_audio_s = _Distribution(FIRST_AUDIO_BOUNDS_S)
        self.real_time_factor = _Distribution(REAL_TIME_FACTOR_BOUNDS)
        self.underrun_s = _Distribution(UNDERRUN_BOUNDS_S)
        self.moves_s: dict[str, _Distribution] = {}
        self.failed_moves: dict[str, int] = {}
        self.out_of_memory = 0

    def told(self) -> ModelFigures:
        return ModelFigures(
            first_audio_s=self.first_audio_s.told(),
            real_time_factor=self.real_time_factor.told(),
            underrun_s=self.underrun_s.told(),
            moves_s={kind: seconds.told() for kind, seconds in self.moves_s.items()},
            failed_moves=dict(self.failed_moves),
            out_of_memory=self.out_of_memory,
        )
