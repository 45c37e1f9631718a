"""The usage that the loop counts of every request, however it ends."""

from datetime import date

from gpu_worker.keys.usage import AddUsage, Sums, UsageFound
from shared.protocol import FindUsage, Reply, UsageRow
from tests.gpu_worker.worker_bench import MakeBench, WorkerBench, loaded


def counted(bench: WorkerBench) -> dict[tuple[str, str], Sums]:
    """All sums so far, by key and model."""
    bench.clock.advance(1)
    bench.turn()
    sums: dict[tuple[str, str], Sums] = {}
    for work in bench.usage_work:
        assert isinstance(work, AddUsage)
        for (_, key, model), more in work.sums.items():
            sums.setdefault((key, model), Sums()).add(more)
    return sums


def test_every_end_is_counted_once(make_bench: MakeBench) -> None:
    """Finished, cancelled, failed and refused requests, with their characters and the audio that was made."""
    bench = loaded(make_bench(slots=1, max_queue=1))
    counted(bench)
    bench.usage_work.clear()
    bench.engines["m"].word_s = 1.0
    bench.speak("done", "one two", client="key:a")
    bench.settle()
    bench.speak("left", "one two three", client="key:a", credit=1)
    bench.turn()
    bench.speak("waiting", "one", client="key:b")
    bench.speak("too many", "one", client="key:b")
    bench.cancel("left")
    bench.settle()
    bench.speak("broken", "one fault", client="peer:1.2.3.4")
    bench.settle()
    sums = counted(bench)
    assert sums["a", "m"] == Sums(requests=2, characters=20, audio_s=sums["a", "m"].audio_s, cancelled=1)
    assert 3.0 <= sums["a", "m"].audio_s <= 5.0
    assert sums["b", "m"] == Sums(requests=1, characters=3, audio_s=1.0, refused=1)
    assert sums["", "m"] == Sums(requests=1, characters=9, audio_s=1.0, failed=1)


def test_an_admin_asks(bench: WorkerBench) -> None:
    """The answer comes when the file has been read; a file that cannot be read is an error."""
    for name in ("u", "v"):
        bench.call(name, FindUsage(since=date(2026, 11, 1), until=date(2026, 11, 30)))
        bench.turn()
    asked = [work for work in bench.usage_work if isinstance(work, FindUsage)]
    assert bench.messages("u") == []
    row = UsageRow(date(2026, 11, 29), "a", "m", 1, 2, 3.0, 0, 0, 0)
    bench.inbox.put(UsageFound(asked[0], [row], has_more=True))
    bench.inbox.put(UsageFound(asked[1], problem="usage.sqlite: disk I/O error"))
    bench.turn()
    assert bench.messages("u") == [Reply(id="u", usage=[row], has_more=True)]
    (failed,) = bench.messages("v")
    assert (failed.code, "disk I/O error" in failed.message) == ("internal_error", True)
