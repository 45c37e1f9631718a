"""The loop counts the requests of limited keys: over all web workers, and only those that it takes."""

from collections import Counter

import pytest

from shared.protocol import KeyLimits
from tests.gpu_worker.worker_bench import WEB, MakeBench, WorkerBench, loaded

OTHER_WEB = b"web-2"


def test_a_key_has_one_limit_over_all_web_workers(bench: WorkerBench) -> None:
    """Three requests a minute are three, whichever web worker sends them; the answers say what is left."""
    limits = KeyLimits(requests_per_minute=3)
    for number in range(5):
        bench.speak(f"r{number}", "one", client="key:a", limits=limits, peer=(WEB, OTHER_WEB)[number % 2])
    bench.settle()
    started = [bench.messages(f"r{number}", peer=(WEB, OTHER_WEB)[number % 2])[0] for number in range(3)]
    assert [message.rate_limit.remaining for message in started] == [2, 1, 0]
    for number in (3, 4):
        (failed,) = bench.messages(f"r{number}", peer=(WEB, OTHER_WEB)[number % 2])
        assert failed.code == "rate_limit_exceeded"
        assert 0 < failed.retry_after_s <= 20
        assert (failed.rate_limit.limit, failed.rate_limit.remaining) == (3, 0)
    assert bench.snapshot().requests.rejected == 2
    assert bench.snapshot().limit_hits == {"requests_per_minute": 2}


def test_a_refused_request_is_not_counted(make_bench: MakeBench) -> None:
    """A full queue, or a model that is unknown, uses up nothing of the minute."""
    bench = loaded(make_bench(slots=1, max_queue=1))
    limits = KeyLimits(requests_per_minute=3, characters_per_day=12)
    for name in "abc":
        bench.speak(name, "one", client="key:a", limits=limits)
    bench.speak("d", "one", client="key:a", limits=limits, model="nonesuch")
    bench.settle()
    assert [bench.messages(name)[-1].code for name in "cd"] == ["queue_full", "model_not_found"]
    assert bench.snapshot().limit_hits == {"queue": 1}
    assert bench.messages("c")[-1].rate_limit.remaining == 1
    bench.speak("e", "one", client="key:a", limits=limits)
    bench.settle()
    assert bench.messages("e")[0].rate_limit.remaining == 0


def test_every_end_frees_a_place(bench: WorkerBench) -> None:
    """Finished, cancelled or failed: the next request of the key may come."""
    limits = KeyLimits(concurrent_requests=1)
    bench.speak("a", "one", client="key:a", limits=limits)
    bench.speak("b", "one", client="key:a", limits=limits)
    bench.settle()
    assert bench.messages("b")[0].code == "rate_limit_exceeded"
    assert bench.kinds("a")[-1] == "Finished"
    bench.speak("c", "one two three", client="key:a", limits=limits, credit=1)
    bench.cancel("c")
    bench.speak("d", "one", client="key:a", limits=limits)
    bench.settle()
    assert bench.kinds("d")[-1] == "Finished"


@pytest.mark.slow
def test_twenty_keys_with_mixed_limits(make_bench: MakeBench) -> None:
    """2,000 requests of twenty keys by two web workers: each key gets exactly its limit, and other clients get all."""
    bench = loaded(make_bench(slots=8, max_queue=10_000))
    allowed = {f"key:{number}": KeyLimits(requests_per_minute=5 * number or None) for number in range(20)}
    names = [(client, f"{client}-{number}") for number in range(100) for client in allowed]
    for number, (client, name) in enumerate(names):
        bench.speak(name, "one", client=client, limits=allowed[client], peer=(WEB, OTHER_WEB)[number % 2])
    bench.settle()
    passed = Counter(
        client
        for number, (client, name) in enumerate(names)
        if bench.kinds(name, peer=(WEB, OTHER_WEB)[number % 2])[-1] == "Finished"
    )
    assert passed == {client: limits.requests_per_minute or 100 for client, limits in allowed.items()}
