"""The GPU workers of a cluster one by one, in the answers of /admin/stats, /admin/vram and /admin/performance."""

from collections.abc import Mapping
from typing import Any

import msgspec

from server.engine import ReplicaReport
from shared.protocol import Counters, DeviceMemory, HostMemory, ModelStatus, Snapshot, WindowPerformance


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU worker's process; `restarts` counts the workers that its supervisor has replaced (0 without one)."""

    pid: int
    boot_id: str
    uptime_s: float
    restarts: int


class ModelPerformance(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one model over the last 1, 15 and 60 minutes."""

    id: str
    windows: list[WindowPerformance]


class ReplicaStats(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU worker of a cluster: its node, its GPUs there, and its requests, as in the figures of the cluster.

    `error` says why it takes no requests. Its figures are then those of its last report.
    """

    replica: str
    node: str
    gpus: list[str]
    error: str | None
    worker: WorkerStats
    accepting: bool
    running: int
    queued: int
    slots: int
    buffered: int
    stalled: int
    requests: Counters
    audio_s: float


class ReplicaVram(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one GPU worker of a cluster, as in the figures of the cluster; `error` as in ReplicaStats."""

    replica: str
    node: str
    gpus: list[str]
    error: str | None
    device: DeviceMemory
    shared: dict[str, int]
    host: HostMemory
    models: list[ModelStatus]


class ReplicaPerformance(msgspec.Struct, frozen=True, kw_only=True):
    """The models of one GPU worker of a cluster that spoke within the last hour."""

    replica: str
    node: str
    gpus: list[str]
    models: list[ModelPerformance]


Reports = Mapping[str, ReplicaReport]


def worker_of(snapshot: Snapshot) -> WorkerStats:
    """The process in a snapshot."""
    return WorkerStats(
        pid=snapshot.pid, boot_id=snapshot.boot_id, uptime_s=snapshot.uptime_s, restarts=snapshot.restarts
    )


def audio_of(snapshot: Snapshot) -> float:
    """Seconds of audio made by all models in a snapshot."""
    return round(sum(model.audio_s for model in snapshot.model_stats.values()), 3)


def models_of(snapshot: Snapshot) -> list[ModelPerformance]:
    """The performance in a snapshot."""
    return [ModelPerformance(id=model, windows=windows) for model, windows in snapshot.performance.items()]


def placed(reports: Reports) -> list[tuple[ReplicaReport, Snapshot]]:
    """The reports with a snapshot, by node and GPU."""
    there = [(report, report.snapshot) for report in reports.values() if report.snapshot is not None]
    return sorted(there, key=lambda pair: (pair[0].node, pair[0].gpus, pair[0].replica))


def replica_stats(reports: Reports) -> list[ReplicaStats]:
    """The request figures of each replica that has reported."""
    return [
        ReplicaStats(
            **_place(report),
            error=report.error.message if report.error else None,
            worker=worker_of(snapshot),
            accepting=snapshot.accepting,
            running=snapshot.running,
            queued=snapshot.queued,
            slots=snapshot.slots,
            buffered=snapshot.buffered,
            stalled=snapshot.stalled,
            requests=snapshot.requests,
            audio_s=audio_of(snapshot),
        )
        for report, snapshot in placed(reports)
    ]


def replica_vram(reports: Reports) -> list[ReplicaVram]:
    """The memory of each replica that has reported."""
    return [
        ReplicaVram(
            **_place(report),
            error=report.error.message if report.error else None,
            device=snapshot.device,
            shared=snapshot.shared_bytes,
            host=snapshot.host,
            models=snapshot.models,
        )
        for report, snapshot in placed(reports)
    ]


def replica_performance(reports: Reports) -> list[ReplicaPerformance]:
    """The performance of each replica that has reported."""
    return [ReplicaPerformance(**_place(report), models=models_of(snapshot)) for report, snapshot in placed(reports)]


def _place(report: ReplicaReport) -> dict[str, Any]:
    return {"replica": report.replica, "node": report.node, "gpus": report.gpus}
