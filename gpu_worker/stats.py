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
        self._model_stats: dict[str, ModelStats] = {}
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
        seconds = self._clock() - request.arrived_at
        histogram = self._stats_of(request.model).first_audio_s
        self._replace(request.model, first_audio_s=_with_value(histogram, FIRST_AUDIO_BOUNDS_S, seconds))

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
        model, kind = report.transition.model, report.transition.kind
        before = self._stats_of(model)
        if isinstance(report, TransitionDone):
            seconds = _with_value(before.transitions_s.get(kind, Histogram()), TRANSITION_BOUNDS_S, report.seconds)
            self._replace(model, transitions_s={**before.transitions_s, kind: seconds})
            return
        failures = before.failed_transitions.get(kind, 0) + 1
        self._replace(model, failed_transitions={**before.failed_transitions, kind: failures})
        if report.error.code == "insufficient_vram":
            self.out_of_memory(model)

    def out_of_memory(self, model: str) -> None:
        """Count that the device ran out of memory for the model."""
        self._replace(model, out_of_memory=self._stats_of(model).out_of_memory + 1)

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
            model_stats=dict(self._model_stats),
            streams=[request.to_struct(now) for request in islice(streams, MAX_STREAMS)],
        )

    def _record_speech(self, request: Request) -> None:
        playback, real_time_factor = request.playback, self._stats_of(request.model).real_time_factor
        if playback.audio_s and request.started_at is not None:
            synthesis_s = self._clock() - request.started_at - playback.paused_s
            real_time_factor = _with_value(real_time_factor, REAL_TIME_FACTOR_BOUNDS, synthesis_s / playback.audio_s)
        underrun_s = _with_value(self._stats_of(request.model).underrun_s, UNDERRUN_BOUNDS_S, playback.underrun_s)
        self._replace(request.model, real_time_factor=real_time_factor, underrun_s=underrun_s)

    def _stats_of(self, model: str) -> ModelStats:
        return self._model_stats.get(model, ModelStats())

    def _replace(self, model: str, **changes: Any) -> None:
        """Put the fields `changes` into the model's statistics."""
        self._model_stats[model] = msgspec.structs.replace(self._stats_of(model), **changes)


def _with_value(histogram: Histogram, bounds: Sequence[float], value: float) -> Histogram:
    """`histogram`, of which `bounds` are the upper bounds, with one more value."""
    counts = histogram.counts or [0] * (len(bounds) + 1)
    bucket = bisect_left(bounds, value)
    counts = [*counts[:bucket], counts[bucket] + 1, *counts[bucket + 1 :]]
    return Histogram(counts=counts, sum=histogram.sum + value)
