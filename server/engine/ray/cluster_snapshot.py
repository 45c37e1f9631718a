"""One Snapshot of the snapshots of all GPU workers of a cluster.

Counts and bytes are sums, and histograms are added up bucket by bucket: percentiles are computed of the sums.
A model is in the state in which it answers soonest. The RAM of a machine counts once, however many workers it has.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from server.engine.reports import ReplicaReport
from shared.performance import sum_of, window_of
from shared.protocol import (
    CacheStats,
    CleanupPass,
    Counters,
    DeviceMemory,
    Histogram,
    HostMemory,
    ModelStats,
    ModelStatus,
    PublicState,
    SavedVoice,
    Snapshot,
    StreamState,
    WindowPerformance,
)

MAX_STREAMS: Final = 50
"""As many as one GPU worker lists."""

_SOONEST: Final[tuple[PublicState, ...]] = ("resident", "loading", "offloaded", "absent", "unavailable")
_SUMMED: Final = ("running", "queued", "slots", "buffered", "stalled", "waiting_for_text", "restarts")
_SHOWN_FIRST: Final = ("generating", "buffered", "stalled", "waiting")

Report = tuple[ReplicaReport, Snapshot]
T = TypeVar("T", bound=msgspec.Struct)
K = TypeVar("K", bound=Hashable)


def merge(reports: Sequence[ReplicaReport]) -> Snapshot:
    """The snapshot of all workers together; one report at least has a snapshot."""
    there = sorted(
        ((report, report.snapshot) for report in reports if report.snapshot is not None),
        key=lambda pair: pair[0].replica,
    )
    snapshots = [snapshot for _, snapshot in there]
    if len(snapshots) == 1:
        return snapshots[0]
    changes: dict[str, Any] = {name: sum(getattr(one, name) for one in snapshots) for name in _SUMMED}
    return msgspec.structs.replace(
        snapshots[0],
        **changes,
        uptime_s=max(one.uptime_s for one in snapshots),
        accepting=any(one.accepting for one in snapshots),
        audio_buffer=_sum([one.audio_buffer for one in snapshots]),
        requests=_sum([one.requests for one in snapshots]),
        device=_device(there),
        host=_host(there),
        models=_models(snapshots),
        shared_bytes=sum_of_counts(one.shared_bytes for one in snapshots),
        voices=_voices(snapshots),
        cleanup=_cleanup([one.cleanup for one in snapshots if one.cleanup is not None]),
        preloading=sorted({model for one in snapshots for model in one.preloading}),
        model_stats=_model_stats(snapshots),
        performance=_performance(snapshots),
        performance_counts={},
        streams=_streams(snapshots),
        # Each web process tells every worker of its own.
        open_sockets=max(one.open_sockets for one in snapshots),
        web_caches=max((one.web_caches for one in snapshots), key=lambda counts: sum(n.hits for n in counts.values())),
        caches=_caches(snapshots),
        limit_hits=sum_of_counts(one.limit_hits for one in snapshots),
        emptied=sum_of_counts(one.emptied for one in snapshots),
        key_use=None,
    )


def without_workers(last: Snapshot) -> Snapshot:
    """The snapshot of a cluster that has scaled to zero, after the `last` one with a GPU worker.

    No model is loaded, and each can be. Nothing runs, and nothing is counted. Saved voices are as they were.
    """
    return msgspec.structs.replace(
        last,
        **dict.fromkeys(_SUMMED, 0),
        accepting=True,
        audio_buffer=_zeros(last.audio_buffer),
        requests=Counters(),
        device=_zeros(last.device),
        host=_zeros(last.host),
        models=[
            status if status.state == "unavailable" else ModelStatus(id=status.id, state="absent")
            for status in last.models
        ],
        shared_bytes={},
        preloading=[],
        model_stats={},
        performance={},
        streams=[],
        caches=[],
        web_caches={},
        limit_hits={},
        key_use=None,
        performance_counts={},
    )


def sum_of_counts(counts: Iterable[dict[K, int]]) -> dict[K, int]:
    """The sums by key."""
    total: dict[K, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def _sum(parts: Sequence[T]) -> T:
    """The first part with the sums of all numbers."""
    numbers = {
        name: sum(getattr(part, name) for part in parts)
        for name in parts[0].__struct_fields__
        if isinstance(getattr(parts[0], name), int | float)
    }
    return msgspec.structs.replace(parts[0], **numbers)


def _zeros(part: T) -> T:
    """The part without its numbers."""
    numbers = [name for name in part.__struct_fields__ if isinstance(getattr(part, name), int | float)]
    return msgspec.structs.replace(part, **dict.fromkeys(numbers, 0))


# --- memory ----------------------------------------------------------------------------------------------------------


def _device(reports: list[Report]) -> DeviceMemory:
    """All devices as one."""
    by_place: dict[Any, list[DeviceMemory]] = {}
    for report, snapshot in reports:
        gpus = tuple(report.gpus) if snapshot.device.kind == "cuda" else ()
        # A GPU without a number is that of its replica alone.
        place = (report.node, gpus or (report.replica if snapshot.device.kind == "cuda" else ""))
        by_place.setdefault(place, []).append(snapshot.device)
    devices = [_shared_device(devices) for devices in by_place.values()]
    names = {device.name for device in devices}
    name = f"{len(devices)} x {names.pop()}" if len(names) == 1 else f"{len(devices)} devices"
    return msgspec.structs.replace(_sum(devices), name=devices[0].name if len(devices) == 1 else name)


def _shared_device(devices: list[DeviceMemory]) -> DeviceMemory:
    """One device as several workers see it."""
    first, ours = devices[0], sum(device.ours_bytes for device in devices)
    return msgspec.structs.replace(
        first,
        ours_bytes=ours,
        others_bytes=max(0, first.used_bytes - ours),
        budget_bytes=min(first.total_bytes, sum(device.budget_bytes for device in devices)),
    )


def _host(reports: list[Report]) -> HostMemory:
    by_node: dict[str, list[HostMemory]] = {}
    for report, snapshot in reports:
        by_node.setdefault(report.node, []).append(snapshot.host)
    hosts = []
    for machine in by_node.values():
        budget = min(machine[0].total_bytes, sum(host.budget_bytes for host in machine))
        both = {"total_bytes": machine[0].total_bytes, "free_bytes": machine[0].free_bytes, "budget_bytes": budget}
        hosts.append(msgspec.structs.replace(_sum(machine), **both))
    return _sum(hosts)


def _cleanup(passes: list[CleanupPass]) -> CleanupPass | None:
    """The last passes of all workers as one."""
    if not passes:
        return None
    return CleanupPass(
        timestamp=max(one.timestamp for one in passes),
        vram_before_bytes=sum(one.vram_before_bytes for one in passes),
        vram_after_bytes=sum(one.vram_after_bytes for one in passes),
        models_checked=sorted({model for one in passes for model in one.models_checked}),
        models_unloaded=sorted({model for one in passes for model in one.models_unloaded}),
        models_dropped=sorted({model for one in passes for model in one.models_dropped}),
    )


def _models(snapshots: Sequence[Snapshot]) -> list[ModelStatus]:
    by_id: dict[str, list[ModelStatus]] = {}
    for one in snapshots:
        for status in one.models:
            by_id.setdefault(status.id, []).append(status)
    return [_model(statuses) for statuses in by_id.values()]


def _model(statuses: list[ModelStatus]) -> ModelStatus:
    best = min(statuses, key=lambda status: _SOONEST.index(status.state))
    return msgspec.structs.replace(
        best,
        bytes=sum_of_counts(status.bytes for status in statuses),
        host_bytes=sum(status.host_bytes for status in statuses),
        references=sum(status.references for status in statuses),
        pinned=any(status.pinned for status in statuses),
        last_used=max((status.last_used for status in statuses if status.last_used is not None), default=None),
        idle_s=min((status.idle_s for status in statuses if status.idle_s is not None), default=None),
    )


def _voices(snapshots: Sequence[Snapshot]) -> list[SavedVoice]:
    return list({voice.id: voice for one in snapshots for voice in one.voices}.values())


# --- figures ---------------------------------------------------------------------------------------------------------


def _model_stats(snapshots: Sequence[Snapshot]) -> dict[str, ModelStats]:
    by_model: dict[str, list[ModelStats]] = {}
    for one in snapshots:
        for model, stats in one.model_stats.items():
            by_model.setdefault(model, []).append(stats)
    return {model: _sum_of_stats(stats) for model, stats in by_model.items()}


def _sum_of_stats(parts: list[ModelStats]) -> ModelStats:
    names = [name for name in parts[0].__struct_fields__ if isinstance(getattr(parts[0], name), Histogram)]
    kinds = {kind for part in parts for kind in part.transitions_s}
    return msgspec.structs.replace(
        _sum(parts),
        **{name: _histogram([getattr(part, name) for part in parts]) for name in names},
        transitions_s={
            kind: _histogram([part.transitions_s[kind] for part in parts if kind in part.transitions_s])
            for kind in sorted(kinds)
        },
        failed_transitions=sum_of_counts(part.failed_transitions for part in parts),
    )


def _histogram(parts: list[Histogram]) -> Histogram:
    counted = [part for part in parts if part.counts]
    exemplars = [item for part in parts for item in part.exemplars.items()]
    return Histogram(
        counts=[sum(counts) for counts in zip(*(part.counts for part in counted), strict=True)],
        sum=sum(part.sum for part in parts),
        exemplars=dict(sorted(exemplars, key=lambda item: item[1].at)),
    )


def _performance(snapshots: Sequence[Snapshot]) -> dict[str, list[WindowPerformance]]:
    models = {model for one in snapshots for model in one.performance_counts}
    found = {}
    for model in sorted(models):
        parts = [one.performance_counts[model] for one in snapshots if model in one.performance_counts]
        found[model] = [window_of(sum_of(list(windows))) for windows in zip(*parts, strict=True)]
    return found


def _streams(snapshots: Sequence[Snapshot]) -> list[StreamState]:
    streams = [stream for one in snapshots for stream in one.streams]
    return sorted(streams, key=lambda stream: (_SHOWN_FIRST.index(stream.state), -stream.age_s))[:MAX_STREAMS]


def _caches(snapshots: Sequence[Snapshot]) -> list[CacheStats]:
    by_name: dict[tuple[str, str], list[CacheStats]] = {}
    for one in snapshots:
        for cache in one.caches:
            by_name.setdefault((cache.name, cache.model), []).append(cache)
    return [_cache(caches) for caches in by_name.values()]


def _cache(caches: list[CacheStats]) -> CacheStats:
    sizes = [cache.bytes for cache in caches if cache.bytes is not None]
    total = sum(sizes) if len(sizes) == len(caches) else None
    return msgspec.structs.replace(_sum(caches), bytes=total)
