"""Counters and histograms of the process, and the snapshot that dashboards read. Owned by the synthesis thread."""

import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import msgspec

from gpu_worker.caches import Caches
from gpu_worker.engines.base import EngineStats
from gpu_worker.performance import Performance
from gpu_worker.requests import BYTES_PER_S, AudioBuffer, Ending, Request, RequestState
from gpu_worker.residency import MemoryProbe, TransitionDone, TransitionFailed
from shared.protocol import (
    BATCH_SIZE_BOUNDS,
    FIRST_AUDIO_BOUNDS_S,
    REAL_TIME_FACTOR_BOUNDS,
    TRANSITION_BOUNDS_S,
    UNDERRUN_BOUNDS_S,
    BufferMemory,
    CleanupPass,
    Counters,
    DeviceMemory,
    Exemplar,
    Histogram,
    HostMemory,
    LimitName,
    ModelStats,
    ModelStatus,
    SavedVoice,
    Snapshot,
    WorkerUse,
    speech_id_of,
)
from shared.trace_settings import trace_id_of

MEMORY_READING_S: Final = 0.2
"""How long one reading of the device's and the host's memory is used: every GET /admin/vram needs one."""

MAX_STREAMS: Final = 50
"""Streams in a snapshot: some hundred bytes each, in every answer to a ping."""

_SHOWN_FIRST: Final = {RequestState.RUNNING: 0, RequestState.PARKED: 1, RequestState.DRAINING: 1}
"""The order of the streams in a snapshot; queued requests come last."""


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
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.boot_id = boot_id
        self.settings = {**settings, "default_model": default_model}
        self._default_model = default_model
        self._restarts = restarts
        self._probe = probe
        self._shared_bytes = shared_bytes
        self._clock = clock
        self._wall_clock = wall_clock
        self._started_at = clock()
        self._counts: Counter[str] = Counter()
        self._limit_hits: Counter[LimitName] = Counter()
        self._model_stats: dict[str, ModelStats] = {}
        self._audio_bytes: Counter[str] = Counter()
        self._engine_stats: dict[str, EngineStats] = {}
        self._performance = Performance(clock)
        self._memory: tuple[DeviceMemory, HostMemory] | None = None
        self._memory_read_at = 0.0

    def request_started(self, request: Request) -> None:
        """Count a request that gets a slot now, and record how long it has waited."""
        self._counts["started"] += 1
        seconds = self._clock() - request.arrived_at
        histogram = self._stats_of(request.model).queue_wait_s
        self._replace(request.model, queue_wait_s=_with_value(histogram, FIRST_AUDIO_BOUNDS_S, seconds))
        self._performance.queue_wait(request.model, seconds)

    def request_rejected(self) -> None:
        """Count a request that was not even queued."""
        self._counts["rejected"] += 1

    def limit_hit(self, limit: LimitName | None) -> None:
        """Count a request that is over `limit`; None: it was refused for another reason."""
        if limit is not None:
            self._limit_hits[limit] += 1

    def add_limit_hits(self, counts: Mapping[LimitName, int]) -> None:
        """Count the requests that a web worker has refused by itself."""
        self._limit_hits.update(counts)

    def first_audio(self, request: Request) -> None:
        """Record the time to first audio: the request's first piece is there now. It counts from the first text."""
        asked_at = request.arrived_at if request.first_text_at is None else request.first_text_at
        seconds = self._clock() - asked_at
        histogram = _with_value(self._stats_of(request.model).first_audio_s, FIRST_AUDIO_BOUNDS_S, seconds)
        exemplar = Exemplar(
            value=seconds,
            at=self._wall_clock(),
            speech_id=speech_id_of(request.id),
            trace_id=trace_id_of(request.traceparent),
        )
        exemplars = {**histogram.exemplars, bisect_left(FIRST_AUDIO_BOUNDS_S, seconds): exemplar}
        self._replace(request.model, first_audio_s=msgspec.structs.replace(histogram, exemplars=exemplars))
        self._performance.first_audio(request.model, seconds)

    def audio_made(self, model: str, n_bytes: int) -> None:
        """Count audio of a model."""
        self._audio_bytes[model] += n_bytes

    def request_ended(self, ending: Ending) -> None:
        """Count a request whose last message is sent, or that was cancelled."""
        self._counts[ending] += 1

    def speech_made(self, request: Request) -> None:
        """Record the speech of a request in the histograms: all of it is made now.

        What is not sent yet waits for the reader, and causes no underrun.
        """
        before = self._stats_of(request.model)
        factor, factors = None, before.real_time_factor
        if request.made_bytes:
            factor = request.synthesis_s(self._clock()) / (request.made_bytes / BYTES_PER_S)
            factors = _with_value(factors, REAL_TIME_FACTOR_BOUNDS, factor)
        underruns = _with_value(before.underrun_s, UNDERRUN_BOUNDS_S, request.playback.underrun_s)
        self._replace(request.model, real_time_factor=factors, underrun_s=underruns)
        self._performance.speech_made(request.model, factor, request.playback.underrun_s)

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

    def engine_stats(self, model: str, now: EngineStats) -> None:
        """Add what the model's engine has counted since the last call."""
        before = self._engine_stats.get(model, EngineStats())
        if now == before:
            return
        if now.captured_steps + now.eager_steps < before.captured_steps + before.eager_steps or any(
            now.batch_sizes.get(size, 0) < count for size, count in before.batch_sizes.items()
        ):
            before = EngineStats()  # the model has been loaded again
        self._engine_stats[model] = now
        totals = self._stats_of(model)
        sizes = totals.batch_size
        for size, count in now.batch_sizes.items():
            more = count - before.batch_sizes.get(size, 0)
            if more:
                sizes = _with_value(sizes, BATCH_SIZE_BOUNDS, size, times=more)
                self._performance.batches(model, size, more)
        self._replace(
            model,
            batch_size=sizes,
            captured_steps=totals.captured_steps + now.captured_steps - before.captured_steps,
            eager_steps=totals.eager_steps + now.eager_steps - before.eager_steps,
        )

    def snapshot(
        self,
        *,
        accepting: bool,
        running: int,
        queued: int,
        slots: int,
        buffer: AudioBuffer,
        models: list[ModelStatus],
        offloaded_bytes: int,
        cleanup: CleanupPass | None,
        voices: list[SavedVoice],
        requests: Iterable[Request],
        caches: Caches,
        open_sockets: int = 0,
        preloading: Sequence[str] = (),
        key_use: WorkerUse | None = None,
    ) -> Snapshot:
        """The state of the worker now.

        `requests` are all open ones; those with a slot are listed first, queued ones last.
        `offloaded_bytes`: host RAM that models hold.
        """
        now = self._clock()
        if self._memory is None or now - self._memory_read_at >= MEMORY_READING_S:
            self._memory, self._memory_read_at = (self._probe.device(), self._probe.host()), now
        device, host = self._memory
        for model, n_bytes in self._audio_bytes.items():
            self._replace(model, audio_s=n_bytes / BYTES_PER_S)
        streams = sorted(requests, key=lambda request: _SHOWN_FIRST.get(request.state, 2))
        return Snapshot(
            pid=os.getpid(),
            boot_id=self.boot_id,
            uptime_s=now - self._started_at,
            accepting=accepting,
            default_model=self._default_model,
            running=running,
            queued=queued,
            slots=slots,
            buffered=sum(request.state in {RequestState.PARKED, RequestState.DRAINING} for request in streams),
            open_sockets=open_sockets,
            waiting_for_text=sum(request.waits_since is not None for request in streams),
            stalled=sum(request.shown_state(now) == "stalled" for request in streams),
            audio_buffer=BufferMemory(used_bytes=buffer.used_bytes, budget_bytes=buffer.budget_bytes),
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
            performance=self._performance.report(),
            caches=caches.list(),
            web_caches=caches.web_counts(),
            limit_hits=dict(self._limit_hits),
            emptied=caches.emptied,
            key_use=key_use,
            performance_counts={} if key_use is None else self._performance.counts(),
        )

    def _stats_of(self, model: str) -> ModelStats:
        return self._model_stats.get(model, ModelStats())

    def _replace(self, model: str, **changes: Any) -> None:
        """Put the fields `changes` into the model's statistics."""
        self._model_stats[model] = msgspec.structs.replace(self._stats_of(model), **changes)


def _with_value(histogram: Histogram, bounds: Sequence[float], value: float, times: int = 1) -> Histogram:
    """`histogram`, of which `bounds` are the upper bounds, with one more value, or the same one several times."""
    counts = histogram.counts or [0] * (len(bounds) + 1)
    bucket = bisect_left(bounds, value)
    counts = [*counts[:bucket], counts[bucket] + times, *counts[bucket + 1 :]]
    return Histogram(counts=counts, sum=histogram.sum + value * times, exemplars=histogram.exemplars)
