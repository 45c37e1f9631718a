"""GET /metrics: the worker's figures in Prometheus' text format, all from the snapshot.

What is counted is counted in the one GPU worker, so any web worker gives the same answer and none has to share memory
with others: prometheus-client's multiprocess mode is not needed, and of the library only the format is used.
Labels take few values: the catalogue's models, and words that are written here or in the protocol.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, get_args

from litestar import Response, get
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from server.dependencies import EngineDependency
from server.http.errors import documented
from shared.protocol import (
    FIRST_AUDIO_BOUNDS_S,
    REAL_TIME_FACTOR_BOUNDS,
    TRANSITION_BOUNDS_S,
    UNDERRUN_BOUNDS_S,
    Histogram,
    ModelStats,
    PublicState,
    Snapshot,
)

_CONTENT_TYPE: Final = "text/plain; version=0.0.4"
"""Litestar adds the charset."""

Labels = tuple[str, ...]


@get(
    "/metrics",
    operation_id="getMetrics",
    summary="Figures for Prometheus",
    tags=["Service"],
    media_type="text/plain",
    responses=documented(401, 403, 500),
)
async def metrics(engine: EngineDependency) -> Response[bytes]:
    """Requests, speech, models and memory; `tts_worker_up` alone while there is no worker."""
    snapshot = engine.snapshot if engine.unavailable_reason() is None else None
    return Response(generate_latest(_Figures(snapshot)), media_type=_CONTENT_TYPE)


class _Figures(Collector):
    """One snapshot, or none, as Prometheus' families."""

    def __init__(self, snapshot: Snapshot | None) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Every family, in the order in which it is read."""
        snapshot = self._snapshot
        yield _gauge("tts_worker_up", "Whether the GPU worker answers.", [((), snapshot is not None)])
        if snapshot is not None:
            yield from _of_the_worker(snapshot)
            yield from _of_memory(snapshot)
            yield from _of_speech(snapshot.model_stats)
            yield from _of_transitions(snapshot.model_stats)


def _of_the_worker(snapshot: Snapshot) -> Iterator[Metric]:
    requests = snapshot.requests
    outcomes = [((name,), getattr(requests, name)) for name in ("finished", "failed", "cancelled", "rejected")]
    yield _gauge("tts_worker_uptime_seconds", "How long the GPU worker lives.", [((), snapshot.uptime_s)])
    yield _counter("tts_worker_restarts", "GPU workers that died and were replaced.", [((), snapshot.restarts)])
    yield _counter("tts_requests_started", "Requests that got a slot.", [((), requests.started)])
    yield _counter("tts_requests", "Requests that are over, by outcome.", outcomes, ["outcome"])
    yield _gauge("tts_requests_running", "Requests that hold a slot.", [((), snapshot.running)])
    yield _gauge("tts_requests_queued", "Requests that wait for a slot.", [((), snapshot.queued)])
    yield _gauge("tts_slots", "Requests that can run at the same time.", [((), snapshot.slots)])


def _of_memory(snapshot: Snapshot) -> Iterator[Metric]:
    kinds = ("total", "used", "free", "ours", "others", "budget")
    device = [((kind,), getattr(snapshot.device, f"{kind}_bytes")) for kind in kinds]
    shared = [((purpose,), size) for purpose, size in snapshot.shared_bytes.items()]
    held = [((model.id, purpose), size) for model in snapshot.models for purpose, size in model.bytes.items()]
    states = [((model.id, state), model.state == state) for model in snapshot.models for state in get_args(PublicState)]
    offloaded = [((), snapshot.host.offloaded_bytes)]
    yield _gauge("tts_device_memory_bytes", "The device's memory, as its driver tells it.", device, ["kind"])
    yield _gauge("tts_shared_bytes", "What several models use together on the device.", shared, ["purpose"])
    yield _gauge("tts_model_bytes", "What a model holds on the device, by purpose.", held, ["model", "purpose"])
    yield _gauge("tts_host_offloaded_bytes", "Weights that wait in RAM.", offloaded)
    yield _gauge("tts_model_state", "1 for the state that a model is in.", states, ["model", "state"])


def _of_speech(model_stats: dict[str, ModelStats]) -> Iterator[Metric]:
    by_model = {(model,): stats for model, stats in model_stats.items()}
    yield _histogram(
        "tts_time_to_first_audio_seconds",
        "From a request's arrival at the worker to its first sound.",
        FIRST_AUDIO_BOUNDS_S,
        [(labels, stats.first_audio_s) for labels, stats in by_model.items()],
        ["model"],
    )
    yield _histogram(
        "tts_real_time_factor",
        "Seconds of synthesis for a second of audio, of each stream that was said in full.",
        REAL_TIME_FACTOR_BOUNDS,
        [(labels, stats.real_time_factor) for labels, stats in by_model.items()],
        ["model"],
    )
    yield _histogram(
        "tts_underrun_seconds",
        "How long a player that buffers nothing would have stood still, of each stream that was said in full.",
        UNDERRUN_BOUNDS_S,
        [(labels, stats.underrun_s) for labels, stats in by_model.items()],
        ["model"],
    )
    underruns = [(labels, sum(stats.underrun_s.counts[1:])) for labels, stats in by_model.items()]
    yield _counter("tts_underruns", "Streams whose player would have stood still.", underruns, ["model"])


def _of_transitions(model_stats: dict[str, ModelStats]) -> Iterator[Metric]:
    labels = ["model", "move"]
    by_model = model_stats.items()
    took = [((model, kind), seconds) for model, stats in by_model for kind, seconds in stats.transitions_s.items()]
    failed = [((model, kind), count) for model, stats in by_model for kind, count in stats.failed_transitions.items()]
    short = [((model,), stats.out_of_memory) for model, stats in by_model]
    yield _counter(
        "tts_model_moves",
        "Models that were moved: loaded, restored to the device, offloaded from it (evicted), dropped.",
        [(of, sum(seconds.counts)) for of, seconds in took],
        labels,
    )
    yield _counter("tts_model_move_failures", "Moves that did not work, loads among them.", failed, labels)
    yield _histogram("tts_model_move_seconds", "How long moving a model took.", TRANSITION_BOUNDS_S, took, labels)
    yield _counter("tts_out_of_memory", "Times that the device had no memory left for a model.", short, ["model"])


def _gauge(name: str, said: str, samples: Iterable[tuple[Labels, float]], labels: Sequence[str] = ()) -> Metric:
    family = GaugeMetricFamily(name, said, labels=labels)
    for of, value in samples:
        family.add_metric(of, value)
    return family


def _counter(name: str, said: str, samples: Iterable[tuple[Labels, float]], labels: Sequence[str] = ()) -> Metric:
    """The family of `name`, whose samples the format calls `name`_total."""
    family = CounterMetricFamily(name, said, labels=labels)
    for of, value in samples:
        family.add_metric(of, value)
    return family


def _histogram(
    name: str, said: str, bounds: Sequence[float], samples: Iterable[tuple[Labels, Histogram]], labels: Sequence[str]
) -> Metric:
    family = HistogramMetricFamily(name, said, labels=labels)
    le = [*map(str, bounds), "+Inf"]
    for of, histogram in samples:
        if histogram.counts:
            family.add_metric(of, list(zip(le, accumulate(histogram.counts), strict=True)), histogram.sum)
    return family
