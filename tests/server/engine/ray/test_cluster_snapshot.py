"""One snapshot of many: sums, percentiles of the sums, and nothing that counts twice."""

import random
from typing import Any

import msgspec
import pytest

from gpu_worker.performance import Performance
from server.engine.ray.cluster_snapshot import MAX_STREAMS, merge
from server.engine.reports import ReplicaReport
from shared.catalog import load_catalog
from shared.protocol import (
    CacheCounts,
    CacheStats,
    CleanupPass,
    Counters,
    Exemplar,
    Histogram,
    ModelStats,
    ModelStatus,
    Snapshot,
    StreamState,
)
from tests.fakes import a_snapshot
from tests.gpu_worker.fakes import FakeClock

CATALOG = load_catalog()


def a_report(name: str, *, node: str = "n1", gpus: list[str] | None = None, **changes: Any) -> ReplicaReport:
    """The report of a replica, with changes to the snapshot of an idle worker; with `gpus` it is on these."""
    snapshot = a_snapshot(CATALOG, boot_id=f"boot-{name}", **changes)
    if gpus:
        device = msgspec.structs.replace(snapshot.device, kind="cuda", name="NVIDIA H200")
        snapshot = msgspec.structs.replace(snapshot, device=device)
    return ReplicaReport(replica=name, node=node, gpus=gpus or [], boot_id=snapshot.boot_id, snapshot=snapshot)


def merged(*reports: ReplicaReport) -> Snapshot:
    """Their snapshot, which does not depend on their order."""
    snapshot = merge(reports)
    assert merge(reports[::-1]) == snapshot
    return snapshot


def test_one_worker_is_the_cluster() -> None:
    """A cluster of one worker has that worker's snapshot."""
    report = a_report("a")
    assert merge([report]) is report.snapshot


def test_requests_are_added_up() -> None:
    """Counts of requests are sums; lists of streams begin with those that have a slot, and stay bounded."""
    streams = [
        StreamState(id=f"{state}-{number}", model="m", client="c", state=state, age_s=number, audio_s=0.0)
        for state in ("waiting", "generating")
        for number in range(40)
    ]
    snapshot = merged(
        a_report("a", running=2, queued=1, slots=8, requests=Counters(started=5, failed=1), streams=streams[:40]),
        a_report("b", running=3, slots=16, requests=Counters(started=7), streams=streams[40:], uptime_s=99.0),
    )
    assert (snapshot.running, snapshot.queued, snapshot.slots, snapshot.uptime_s) == (5, 1, 24, 99.0)
    assert snapshot.requests == Counters(started=12, failed=1)
    assert len(snapshot.streams) == MAX_STREAMS
    assert [stream.state for stream in snapshot.streams] == ["generating"] * 40 + ["waiting"] * 10
    assert snapshot.streams[0].age_s == 39


class TestMemory:
    """Bytes of devices and machines."""

    def test_gpus(self) -> None:
        """Each GPU counts once, and so does the RAM of a machine with two of them."""
        snapshot = merged(a_report("a", gpus=["0"]), a_report("b", gpus=["1"]), a_report("c", node="n2", gpus=["0"]))
        one = a_snapshot(CATALOG)
        assert snapshot.device.name == "3 x NVIDIA H200"
        assert (snapshot.device.total_bytes, snapshot.device.ours_bytes) == (
            3 * one.device.total_bytes,
            3 * one.device.ours_bytes,
        )
        assert (snapshot.host.total_bytes, snapshot.host.free_bytes) == (
            2 * one.host.total_bytes,
            2 * one.host.free_bytes,
        )
        assert (snapshot.host.ours_bytes, snapshot.host.offloaded_bytes) == (
            3 * one.host.ours_bytes,
            3 * one.host.offloaded_bytes,
        )

    def test_two_workers_on_the_cpu_of_one_machine(self) -> None:
        """Its RAM is one device: what the workers have is theirs, the rest is others', and no budget is above it."""
        snapshot = merged(a_report("a"), a_report("b"))
        assert snapshot.device == msgspec.structs.replace(
            a_snapshot(CATALOG).device, ours_bytes=2_000, others_bytes=4_000, budget_bytes=16_000
        )

    def test_models(self) -> None:
        """A model is where it answers soonest; its bytes are sums."""
        absent = ModelStatus(id="m", state="absent", idle_s=9.0)
        resident = ModelStatus(id="m", state="resident", bytes={"weights": 5}, references=2, idle_s=3.0)
        snapshot = merged(
            a_report("a", models=[absent]), a_report("b", models=[resident]), a_report("c", models=[resident])
        )
        assert snapshot.models == [msgspec.structs.replace(resident, bytes={"weights": 10}, references=4, idle_s=3.0)]

    def test_cleanup(self) -> None:
        """The last passes of all workers are one, at the time of the latest."""
        passes = [
            CleanupPass(
                timestamp=t, vram_before_bytes=9, vram_after_bytes=4, models_checked=["m"], models_unloaded=["m"]
            )
            for t in (5.0, 7.0)
        ]
        snapshot = merged(a_report("a", cleanup=passes[0]), a_report("b", cleanup=passes[1]), a_report("c"))
        assert snapshot.cleanup is not None
        assert (snapshot.cleanup.timestamp, snapshot.cleanup.vram_before_bytes) == (7.0, 18)
        assert snapshot.cleanup.models_unloaded == ["m"]


class TestFigures:
    """Histograms and percentiles."""

    def test_histograms(self) -> None:
        """They are added up bucket by bucket; the latest exemplar of a bucket stays."""
        early = Exemplar(value=0.1, at=1.0, speech_id="early")
        late = Exemplar(value=0.1, at=2.0, speech_id="late")
        load = {"load": Histogram(counts=[1, 0], sum=0.5)}
        one = ModelStats(
            first_audio_s=Histogram(counts=[1, 2], sum=3.0, exemplars={0: late}), audio_s=2.0, transitions_s=load
        )
        other = ModelStats(
            first_audio_s=Histogram(counts=[0, 4], sum=5.0, exemplars={0: early}), audio_s=1.0, out_of_memory=1
        )
        snapshot = merged(a_report("a", model_stats={"m": one}), a_report("b", model_stats={"m": other, "n": one}))
        assert snapshot.model_stats["m"] == ModelStats(
            first_audio_s=Histogram(counts=[1, 6], sum=8.0, exemplars={0: late}),
            audio_s=3.0,
            out_of_memory=1,
            transitions_s=load,
        )
        assert snapshot.model_stats["n"] == one

    @pytest.mark.parametrize("shares", [(500, 500), (990, 10)])
    def test_percentiles_are_those_of_all_requests(self, shares: tuple[int, int]) -> None:
        """Whatever each worker has seen: the result is that of one worker that has seen all. It is no mean."""
        chance = random.Random(7)  # noqa: S311 -- repeatable figures
        clock = FakeClock()
        together = Performance(clock)
        reports = []
        for number, requests in enumerate(shares):
            alone = Performance(clock)
            for _ in range(requests):
                seconds = chance.lognormvariate(-1.0 + 3 * number, 0.5)
                for performance in (alone, together):
                    performance.first_audio("m", seconds)
                    performance.speech_made("m", seconds / 10, seconds / 4)
                    performance.batches("m", 1 + number, 3)
            windows = alone.report()
            reports.append(a_report(str(number), performance=windows, performance_counts=alone.counts()))
        snapshot = merged(*reports)
        assert snapshot.performance == together.report()
        medians = [report.snapshot.performance["m"][0].first_audio_s.p50 for report in reports if report.snapshot]
        mean = sum(median for median in medians if median) / 2
        assert abs((snapshot.performance["m"][0].first_audio_s.p50 or 0.0) - mean) > 0.5

    def test_caches(self) -> None:
        """Caches of workers are added up. What web processes count, every worker knows: it counts once."""
        cache = CacheStats(name="prompts", model="m", entries=2, bytes=10, hits=3, misses=1)
        web = {"stored_audio": CacheCounts(hits=5, misses=2)}
        snapshot = merged(
            a_report("a", caches=[cache], web_caches=web, open_sockets=4),
            a_report("b", caches=[cache], web_caches=web, open_sockets=4),
        )
        assert snapshot.caches == [msgspec.structs.replace(cache, entries=4, bytes=20, hits=6, misses=2)]
        assert (snapshot.web_caches, snapshot.open_sockets) == (web, 4)
