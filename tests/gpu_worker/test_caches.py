"""The caches of the service: their figures in the snapshot, and their emptying."""

from gpu_worker.transport import PeerGone
from shared.protocol import MAX_COUNT, CacheCounts, CacheStats, EmptyCache, Ping, Reply
from tests.gpu_worker.worker_bench import WEB, WorkerBench, loaded

OTHER = b"another web worker"


def test_of_engines_and_voices(bench: WorkerBench) -> None:
    """Each engine's caches have its model's name; the recordings of saved voices belong to none."""
    loaded(bench)
    assert bench.snapshot().caches == [
        CacheStats(name="references", model="m", entries=1, bytes=5, hits=3, misses=2),
        CacheStats(name="recordings", entries=0, bytes=0, hits=0, misses=0),
    ]


def test_emptied_engines(bench: WorkerBench) -> None:
    """Every resident model empties its cache of that name; no web worker is told."""
    loaded(bench)
    assert bench.result_of(EmptyCache(name="prompts")) == Reply(id="c")
    assert bench.engines["m"].emptied == ["prompts"]
    assert bench.snapshot().emptied == {}


def test_emptied_recordings(bench: WorkerBench) -> None:
    """Recordings of saved voices are read again."""
    voice = bench.save_voice("Ada")
    bench.voices.load(voice.id)
    assert bench.snapshot().caches[-1].entries == 1
    bench.result_of(EmptyCache(name="recordings"))
    bench.voices.load(voice.id)
    assert bench.snapshot().caches[-1].misses == 2


def test_of_web_workers(bench: WorkerBench) -> None:
    """The counts of web workers are summed up, each with its latest figures, until it is gone."""
    for peer, counts in (
        (WEB, {"catalog": CacheCounts(1, 1)}),
        (WEB, {"catalog": CacheCounts(5, 1), "stored_audio": CacheCounts(2, 3)}),
        (OTHER, {"catalog": CacheCounts(10, 0)}),
        (OTHER, {}),
    ):
        bench.send(Ping(caches=counts), peer=peer)  # type: ignore[arg-type] # the names are words of the protocol
    bench.turn()
    assert bench.snapshot().web_caches == {"catalog": CacheCounts(15, 1), "stored_audio": CacheCounts(2, 3)}
    bench.inbox.put(PeerGone(OTHER))
    bench.turn()
    assert bench.snapshot().web_caches == {"catalog": CacheCounts(5, 1), "stored_audio": CacheCounts(2, 3)}


def test_sums_have_a_bound(bench: WorkerBench) -> None:
    """The sum of what web workers report is again a number that a message can have."""
    for peer in (WEB, OTHER):
        bench.send(Ping(caches={"catalog": CacheCounts(MAX_COUNT, 1)}), peer=peer)
    bench.turn()
    assert bench.snapshot().web_caches == {"catalog": CacheCounts(MAX_COUNT, 2)}


def test_emptied_web_workers(bench: WorkerBench) -> None:
    """The snapshot says how often, so that each web worker notices, whichever one was asked."""
    loaded(bench)
    for _ in range(2):
        bench.result_of(EmptyCache(name="pronunciations"))
    assert bench.snapshot().emptied == {"pronunciations": 2}
    assert bench.engines["m"].emptied == []
