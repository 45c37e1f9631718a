"""Counters and histograms of the process, and the snapshot that dashboards read. Owned by the synthesis thread."""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, assert_never

import msgspec

from gpu_worker.engines.base import Done, JobError
from gpu_worker.requests import Cancelled, Outcome, Request, RequestState
from gpu_worker.residency import MemoryProbe, TransitionDone, TransitionFailed
from shared.protocol import (
    FIRST_AUDIO_BOUNDS_S,
    REAL_TIME_FACTOR_BOUNDS,
    TRANSITION_BOUNDS_S,
    UNDERRUN_BOUNDS_S,
    CleanupPass,
    Counters,
    DeviceMemory,
    Histogram,
    HostMemory,
    ModelStats,
    ModelStatus,
    SavedVoice,
    Snapshot,
)

MEMORY_READING_S: Final = 0.2
"""How long one reading of the device's and the host's memory is used: every GET /admin/vram needs one."""

MAX_STREAMS: Final = 50
"""Streams in a snapshot: some hundred bytes each, in every answer to a ping."""


class Stats:
    """Counts requests and transitions, and builds snapshots.

    `settings` are the worker's settings in force, under their public names.
    `restarts` is how many workers the supervisor started before this one.
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
        self._counts: Counter[str] = Counter()
        self._model_stats: dict[str, _ModelCounts] = {}
        self._memory: tuple[DeviceMemory, HostMemory] | None = None
        self._memory_read_at = 0.0

    def request_started(self) -> None:
        """Count a request that has got a slot."""
        self._counts["started"] += 1

    def request_rejected(self) -> None:
        """Count a request that was not even queued."""
        self._counts["rejected"] += 1

    def first_audio(self, request: Request) -> None:
        """Record the time to first audio: the request's first piece is there now."""
        self._model_stats_of(request.model).first_audio_s.add(self._clock() - request.arrived_at)

    def request_finished(self, request: Request, outcome: Outcome) -> None:
        """Count a request that now leaves its slot or the queue; speech said in full also counts in the histograms."""
        match outcome:
            case Done():
                self._counts["finished"] += 1
                self._record_speech(request)
            case JobError():
                self._counts["failed"] += 1
            case Cancelled():
                self._counts["cancelled"] += 1
            case _:
                assert_never(outcome)

    def transition_ended(self, report: TransitionDone | TransitionFailed) -> None:
        """Count a model transition, or its failure."""
        model_stats, kind = self._model_stats_of(report.transition.model), report.transition.kind
        if isinstance(report, TransitionDone):
            model_stats.transitions_s.setdefault(kind, _Distribution(TRANSITION_BOUNDS_S)).add(report.seconds)
            return
        model_stats.failed_transitions[kind] = model_stats.failed_transitions.get(kind, 0) + 1
        if report.error.code == "insufficient_vram":
            self.out_of_memory(report.transition.model)

    def out_of_memory(self, model: str) -> None:
        """Count that the device ran out of memory for the model."""
        self._model_stats_of(model).out_of_memory += 1

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
        """The state of the worker now. `requests` are all open ones; those with a slot are listed first.

        `offloaded_bytes`: host RAM that models hold.
        """
        now = self._clock()
        if self._memory is None or now - self._memory_read_at >= MEMORY_READING_S:
            self._memory, self._memory_read_at = (self._probe.device(), self._probe.host()), now
        device, host = self._memory
        streams = sorted(requests, key=lambda request: request.state is RequestState.QUEUED)
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
            model_stats={model: model_stats.to_struct() for model, model_stats in self._model_stats.items()},
            streams=[request.to_struct(now) for request in islice(streams, MAX_STREAMS)],
        )

    def _record_speech(self, request: Request) -> None:
        model_stats, playback = self._model_stats_of(request.model), request.playback
        model_stats.underrun_s.add(playback.underrun_s)
        if playback.audio_s and request.started_at is not None:
            synthesis_s = self._clock() - request.started_at - playback.paused_s
            model_stats.real_time_factor.add(synthesis_s / playback.audio_s)

    def _model_stats_of(self, model: str) -> "_ModelCounts":
        return self._model_stats.setdefault(model, _ModelCounts())


class _Distribution:
    """The mutable form of a Histogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts: list[int] = []
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts = self._counts or [0] * (len(self._bounds) + 1)
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def to_struct(self) -> Histogram:
        return Histogram(counts=list(self._counts), sum=self._sum)


class _ModelCounts:
    """The mutable form of ModelStats."""

    def __init__(self) -> None:
        self.first_audio_s = _Distribution(FIRST_AUDIO_BOUNDS_S)
        self.real_time_factor = _Distribution(REAL_TIME_FACTOR_BOUNDS)
        self.underrun_s = _Distribution(UNDERRUN_BOUNDS_S)
        self.transitions_s: dict[str, _Distribution] = {}
        self.failed_transitions: dict[str, int] = {}
        self.out_of_memory = 0

    def to_struct(self) -> ModelStats:
        return ModelStats(
            first_audio_s=self.first_audio_s.to_struct(),
            real_time_factor=self.real_time_factor.to_struct(),
            underrun_s=self.underrun_s.to_struct(),
            transitions_s={kind: seconds.to_struct() for kind, seconds in self.transitions_s.items()},
            failed_transitions=dict(self.failed_transitions),
            out_of_memory=self.out_of_memory,
        )
