"""GET /metrics: the GPU worker's figures in Prometheus' text format or in OpenMetrics, all from the snapshot.

The one GPU worker counts everything, so each web worker gives the same answer, and the web workers share no memory:
of prometheus-client only the formats are used, not its multiprocess mode, which knows no exemplars.
Labels have few values: the catalogue's models, and words from this file or the protocol.
In a cluster, each GPU worker has its samples, with the labels replica, node and gpu. Prometheus adds them up: sums of
counters made here would fall when a worker ends, and Prometheus would take that for a new beginning.
OpenMetrics alone has exemplars: the speech id of a request leads to its log lines and to its outcome.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Final, get_args

import msgspec
from litestar import Request, Response, get
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as OpenMetricsExemplar

from server.dependencies import EngineDependency
from server.http.accept import preferred_type
from server.http.errors import documented
from server.routes.replicas import Reports
from shared.protocol import (
    BATCH_SIZE_BOUNDS,
    FIRST_AUDIO_BOUNDS_S,
    PLAYER_BUFFERS_S,
    REAL_TIME_FACTOR_BOUNDS,
    TRANSITION_BOUNDS_S,
    UNDERRUN_BOUNDS_S,
    CacheCounts,
    CacheStats,
    Exemplar,
    Histogram,
    LimitName,
    ModelStats,
    PublicState,
    Snapshot,
)

_WEBSOCKETS: Final = "tts_websockets"

_TEXT: Final = "text/plain"
_OPEN_METRICS: Final = "application/openmetrics-text"
_CONTENT_TYPES: Final = {_TEXT: "text/plain; version=0.0.4", _OPEN_METRICS: openmetrics.CONTENT_TYPE_LATEST}
"""Litestar adds the charset to text."""

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]
"""The values of a family by the values of its labels."""


@get(
    "/metrics",
    operation_id="getMetrics",
    summary="Get the figures for Prometheus",
    tags=["Service"],
    media_type="text/plain",
    responses=documented(401, 403, 500),
)
async def metrics(request: Request[Any, Any, Any], engine: EngineDependency) -> Response[bytes]:
    """Requests, speech, models and memory; only `tts_worker_up` while the GPU worker is down.

    OpenMetrics, if `Accept` prefers that, adds the id of a recent request to each bucket of the time to first audio.
    """
    snapshot, reports = engine.snapshot if engine.unavailable() is None else None, engine.reports()
    collector = _ClusterCollector(snapshot, reports) if reports else _SnapshotCollector(snapshot)
    kind = preferred_type(request.headers, [_TEXT, _OPEN_METRICS])
    write = generate_latest if kind == _TEXT else openmetrics.generate_latest
    return Response(write(collector), media_type=_CONTENT_TYPES[kind])


class _SnapshotCollector(Collector):
    """The families of one snapshot; None stands for a worker that is down."""

    def __init__(self, snapshot: Snapshot | None) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Every family, in the order of the answer."""
        snapshot = self._snapshot
        help_text = "1 while the GPU worker answers, or a cluster has scaled to zero."
        yield _gauge("tts_worker_up", help_text, [((), snapshot is not None)])
        if snapshot is not None:
            yield from _worker_families(snapshot)
            yield _open_sockets(snapshot)
            yield from _memory_families(snapshot)
            yield from _speech_families(snapshot.model_stats)
            yield from _batch_families(snapshot.model_stats)
            yield from _transition_families(snapshot.model_stats)
            yield from _cache_families(snapshot)


class _ClusterCollector(Collector):
    """The families of all replicas, and what the web processes have counted, as `merged` has it."""

    def __init__(self, merged: Snapshot | None, reports: Reports) -> None:
        self._merged = merged
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        """Every family once, with the samples of all replicas."""
        families: dict[str, Metric] = {}
        for report in self._reports.values():
            # What web processes count, every worker knows: it must not count once for each.
            snapshot = report.snapshot and msgspec.structs.replace(report.snapshot, web_caches={})
            place = {"replica": report.replica, "node": report.node, "gpu": ",".join(report.gpus)}
            for metric in _SnapshotCollector(None if report.error else snapshot).collect():
                if metric.name != _WEBSOCKETS:
                    _add(families, metric, place)
        if self._merged is not None:
            _add(families, _open_sockets(self._merged))
            for metric in _cache_families(msgspec.structs.replace(self._merged, caches=[])):
                _add(families, metric)
        yield from families.values()


def _add(families: dict[str, Metric], metric: Metric, labels: Mapping[str, str] = MappingProxyType({})) -> None:
    """Put the samples of `metric` into its family, with more labels."""
    samples = [sample._replace(labels={**labels, **sample.labels}) for sample in metric.samples]
    if metric.name in families:
        families[metric.name].samples += samples
    else:
        metric.samples = samples
        families[metric.name] = metric


def _worker_families(snapshot: Snapshot) -> Iterator[Metric]:
    requests = snapshot.requests
    outcomes = [((name,), getattr(requests, name)) for name in ("finished", "failed", "cancelled", "rejected")]
    yield _gauge("tts_worker_uptime_seconds", "Seconds since the GPU worker started.", [((), snapshot.uptime_s)])
    yield _counter("tts_worker_restarts", "GPU workers that the supervisor has replaced.", [((), snapshot.restarts)])
    yield _counter("tts_requests_started", "Requests that got a slot.", [((), requests.started)])
    yield _counter("tts_requests", "Requests that have ended, by outcome.", outcomes, ["outcome"])
    yield _gauge("tts_requests_running", "Requests that hold a slot.", [((), snapshot.running)])
    yield _gauge("tts_requests_queued", "Requests that wait for a slot.", [((), snapshot.queued)])
    yield _gauge(
        "tts_requests_buffered", "Requests without a slot whose speech waits for them.", [((), snapshot.buffered)]
    )
    yield _gauge("tts_requests_stalled", "Requests whose client has read nothing for 10 s.", [((), snapshot.stalled)])
    yield _gauge(
        "tts_requests_waiting_for_text",
        "Open requests that wait for more of their text.",
        [((), snapshot.waiting_for_text)],
    )
    hits = [((limit,), snapshot.limit_hits.get(limit, 0)) for limit in get_args(LimitName)]
    yield _counter(
        "tts_limit_hits",
        "Requests over a limit, by its name.",
        hits,
        ["limit"],
    )
    yield _gauge("tts_slots", "Requests that can run at the same time.", [((), snapshot.slots)])


def _open_sockets(snapshot: Snapshot) -> Metric:
    return _gauge(_WEBSOCKETS, "WebSockets that are open.", [((), snapshot.open_sockets)])


def _memory_families(snapshot: Snapshot) -> Iterator[Metric]:
    kinds = ("total", "used", "free", "ours", "others", "budget")
    device = [((kind,), getattr(snapshot.device, f"{kind}_bytes")) for kind in kinds]
    shared = [((purpose,), size) for purpose, size in snapshot.shared_bytes.items()]
    held = [((model.id, purpose), size) for model in snapshot.models for purpose, size in model.bytes.items()]
    states = [((model.id, state), model.state == state) for model in snapshot.models for state in get_args(PublicState)]
    offloaded = [((), snapshot.host.offloaded_bytes)]
    buffer = [((kind,), getattr(snapshot.audio_buffer, f"{kind}_bytes")) for kind in ("used", "budget")]
    yield _gauge("tts_device_memory_bytes", "The device's memory, as its driver reports it.", device, ["kind"])
    yield _gauge("tts_shared_bytes", "Memory on the device that several models use together.", shared, ["purpose"])
    yield _gauge("tts_model_bytes", "Memory on the device that a model uses, by purpose.", held, ["model", "purpose"])
    yield _gauge("tts_host_offloaded_bytes", "Offloaded weights in host RAM.", offloaded)
    yield _gauge("tts_audio_buffer_bytes", "Speech in host RAM that waits for clients.", buffer, ["kind"])
    yield _gauge("tts_model_state", "1 for the state that a model is in.", states, ["model", "state"])


def _speech_families(model_stats: dict[str, ModelStats]) -> Iterator[Metric]:
    by_model = {(model,): stats for model, stats in model_stats.items()}
    yield _histogram(
        "tts_time_to_first_audio_seconds",
        "From a request's arrival at the GPU worker to its first audio.",
        FIRST_AUDIO_BOUNDS_S,
        [(labels, stats.first_audio_s) for labels, stats in by_model.items()],
        ["model"],
    )
    yield _histogram(
        "tts_real_time_factor",
        "Seconds of synthesis for one second of audio, of each complete stream.",
        REAL_TIME_FACTOR_BOUNDS,
        [(labels, stats.real_time_factor) for labels, stats in by_model.items()],
        ["model"],
    )
    yield _histogram(
        "tts_underrun_seconds",
        "How long a player without a buffer would have had no audio, of each complete stream.",
        UNDERRUN_BOUNDS_S,
        [(labels, stats.underrun_s) for labels, stats in by_model.items()],
        ["model"],
    )
    yield _histogram(
        "tts_queue_wait_seconds",
        "From a request's arrival at the GPU worker to its slot, the load of its model included.",
        FIRST_AUDIO_BOUNDS_S,
        [(labels, stats.queue_wait_s) for labels, stats in by_model.items()],
        ["model"],
    )
    underruns = [(labels, sum(stats.underrun_s.counts[1:])) for labels, stats in by_model.items()]
    yield _counter("tts_underruns", "Streams in which such a player would have had no audio.", underruns, ["model"])
    yield _counter(
        "tts_continuous_streams",
        "Streams without a gap for a player that starts `player_buffer` seconds after the first audio; "
        "of the streams that tts_underrun_seconds_count counts.",
        [
            ((model, str(buffer_s)), _continuous(stats.underrun_s, buffer_s))
            for model, stats in model_stats.items()
            for buffer_s in PLAYER_BUFFERS_S
            if stats.underrun_s.counts
        ],
        ["model", "player_buffer"],
    )
    audio = [(labels, stats.audio_s) for labels, stats in by_model.items()]
    yield _counter("tts_audio_seconds", "Seconds of audio made.", audio, ["model"])


def _continuous(underrun_s: Histogram, buffer_s: float) -> int:
    """The streams in which a player with that buffer never runs dry: it starts later, so it has to wait less."""
    return sum(underrun_s.counts[: UNDERRUN_BOUNDS_S.index(buffer_s) + 1])


def _batch_families(model_stats: dict[str, ModelStats]) -> Iterator[Metric]:
    yield _histogram(
        "tts_batch_size",
        "Requests that shared a frame, of each frame.",
        BATCH_SIZE_BOUNDS,
        [((model,), stats.batch_size) for model, stats in model_stats.items()],
        ["model"],
    )
    steps = [
        ((model, captured), count)
        for model, stats in model_stats.items()
        for captured, count in (("true", stats.captured_steps), ("false", stats.eager_steps))
        if stats.captured_steps or stats.eager_steps
    ]
    yield _counter(
        "tts_decode_steps",
        "Decode steps of Qwen3-TTS models, by whether they replayed captured functions alone.",
        steps,
        ["model", "captured"],
    )


def _cache_families(snapshot: Snapshot) -> Iterator[Metric]:
    labels = ["cache", "model"]
    caches = [((cache.name, cache.model), cache) for cache in snapshot.caches]
    lookups: list[tuple[Labels, CacheStats | CacheCounts]] = [*caches]
    lookups += [((name, ""), counts) for name, counts in snapshot.web_caches.items()]
    yield _counter("tts_cache_hits", "Look-ups that a cache answered.", [(key, n.hits) for key, n in lookups], labels)
    yield _counter(
        "tts_cache_misses", "Look-ups that a cache did not answer.", [(key, n.misses) for key, n in lookups], labels
    )
    yield _gauge("tts_cache_entries", "Entries of a cache.", [(key, cache.entries) for key, cache in caches], labels)
    sizes = [(key, cache.bytes) for key, cache in caches if cache.bytes is not None]
    yield _gauge("tts_cache_bytes", "Bytes of a cache.", sizes, labels)


def _transition_families(model_stats: dict[str, ModelStats]) -> Iterator[Metric]:
    labels = ["model", "move"]
    by_model = model_stats.items()
    took = [((model, kind), seconds) for model, stats in by_model for kind, seconds in stats.transitions_s.items()]
    failed = [((model, kind), count) for model, stats in by_model for kind, count in stats.failed_transitions.items()]
    short = [((model,), stats.out_of_memory) for model, stats in by_model]
    yield _counter(
        "tts_model_moves",
        "Moves of models: loaded, restored to the device, offloaded from it (evicted) or dropped.",
        [(values, sum(seconds.counts)) for values, seconds in took],
        labels,
    )
    yield _counter("tts_model_move_failures", "Moves of models that failed.", failed, labels)
    yield _histogram("tts_model_move_seconds", "How long a move took.", TRANSITION_BOUNDS_S, took, labels)
    yield _counter("tts_out_of_memory", "How often the device was out of memory.", short, ["model"])


def _gauge(name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), samples)


def _counter(name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
    """The family of `name`, whose samples the format calls `name`_total."""
    return _filled(CounterMetricFamily(name, text, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histogram(
    name: str, text: str, bounds: Sequence[float], samples: Iterable[tuple[Labels, Histogram]], labels: Sequence[str]
) -> Metric:
    """The family of `samples`, without histograms that have no values yet."""
    family = HistogramMetricFamily(name, text, labels=labels)
    le = [*map(str, bounds), "+Inf"]
    for values, histogram in samples:
        if histogram.counts:
            numbers = enumerate(zip(le, accumulate(histogram.counts), strict=True))
            buckets = [(*bucket, *_exemplar(histogram.exemplars.get(number))) for number, bucket in numbers]
            family.add_metric(values, buckets, histogram.sum)
    return family


def _exemplar(found: Exemplar | None) -> tuple[()] | tuple[OpenMetricsExemplar]:
    if found is None:
        return ()
    labels = {"speech_id": found.speech_id} | ({"trace_id": found.trace_id} if found.trace_id else {})
    return (OpenMetricsExemplar(labels, found.value, round(found.at, 3)),)
