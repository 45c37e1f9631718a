"""The limits of a key over several GPU workers: LimitCounters that exchange what they have counted, on fake clocks."""

from typing import Final

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.keys.limits import DAY_S, LimitCounter
from server.engine.ray.key_use import ClusterUse
from shared.protocol import KeyLimits
from tests.gpu_worker.fakes import FakeClock

NOON: Final = 20_000 * DAY_S + DAY_S / 2
KEY: Final = "key:a"
DELAY_S: Final = 1.0
"""From a request at one worker until the others know of it; the documentation promises that."""


class Cluster:
    """GPU workers whose counts reach each other every DELAY_S, as by the web process `source`."""

    def __init__(self, workers: int, sources: list[str] | None = None, in_files: dict[str, int] | None = None) -> None:
        self.clock, self.wall = FakeClock(), FakeClock()
        self.wall.now = NOON
        self.use = ClusterUse()
        self.source = "web"
        sources = sources or [f"file {number}" for number in range(workers)]
        self.workers = [self.start(source, (in_files or {}).get(source, 0)) for source in sources]

    def start(self, source: str, in_file: int = 0) -> LimitCounter:
        """A new worker, whose file of usage has so many characters of today."""
        worker = LimitCounter(self.clock, self.wall, {KEY: in_file} if in_file else {}, source)
        worker.take(self.source, {})
        return worker

    def exchange(self) -> None:
        """Every worker reports, and learns of the others."""
        for number, worker in enumerate(self.workers):
            assert worker.worker_use is not None
            self.use.record(str(number), worker.worker_use)
        for number, worker in enumerate(self.workers):
            worker.take(self.source, self.use.elsewhere(str(number)))

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(seconds)
        self.wall.advance(seconds)

    def request(self, worker: int, limits: KeyLimits, characters: int = 1) -> bool:
        """Whether a request is let pass."""
        try:
            self.workers[worker].check(KEY, limits, characters)
        except JobError:
            return False
        self.workers[worker].count(KEY, limits, characters)
        return True


class TestRequestsAMinute:
    """Sixty a minute."""

    LIMITS = KeyLimits(requests_per_minute=60)

    @pytest.mark.parametrize("a_second", [2, 20, 200])
    def test_in_the_long_run(self, a_second: int) -> None:
        """In five minutes a key gets 300 requests and the first minute's 60, and what it can ask for within the delay.

        What it got too much is taken off what follows. The key asks all workers in turn.
        """
        cluster = Cluster(3)
        passed = asked = 0
        seconds_passed: list[int] = []
        for _second in range(300):
            before = passed
            for _ in range(a_second):
                passed += cluster.request(asked % 3, self.LIMITS)
                asked += 1
            seconds_passed.append(passed - before)
            cluster.advance(DELAY_S)
            cluster.exchange()
        within_delay = max(0, min(a_second, 3 * 60) - 60)
        assert passed <= 360 + within_delay + 3
        assert passed >= 295
        assert all(count <= 3 for count in seconds_passed[-60:])

    def test_as_one_worker_where_the_news_is_faster(self) -> None:
        """With an exchange after each request, several workers let exactly the same requests pass as one does."""
        one, three = Cluster(1), Cluster(3)
        for number in range(500):
            expected = one.request(0, self.LIMITS)
            assert three.request(number % 3, self.LIMITS) == expected
            three.exchange()
            for cluster in (one, three):
                cluster.advance(0.3 if number % 7 else 2.0)

    def test_another_web_process_tells(self) -> None:
        """The sums of another web process begin with what was counted long ago: that does not count again."""
        cluster = Cluster(2)
        for _ in range(60):
            assert cluster.request(0, self.LIMITS)
        cluster.advance(60)
        cluster.source, cluster.use = "another", ClusterUse()
        cluster.exchange()
        assert cluster.request(1, self.LIMITS)

    def test_a_worker_that_comes_later(self) -> None:
        """Of the requests at others before it came, a minute counts at most; all that come from then on do."""
        cluster = Cluster(2)
        for number in range(300):
            assert cluster.request(number % 2, self.LIMITS)
            cluster.exchange()
            cluster.advance(1)
        cluster.workers.append(cluster.start("file of a new worker"))
        cluster.exchange()
        cluster.advance(60)
        assert cluster.request(2, self.LIMITS)
        for _ in range(59):
            assert cluster.request(0, self.LIMITS)
            cluster.exchange()
        assert not cluster.request(2, self.LIMITS)

    def test_a_new_web_process_that_hears_of_workers_one_by_one(self) -> None:
        """What it did not know yet counts for a minute at most."""
        cluster = Cluster(2)
        for _ in range(300):
            assert cluster.request(0, self.LIMITS)
            cluster.exchange()
            cluster.advance(1)
        new, (busy, idle) = ClusterUse(), cluster.workers
        for number, worker in ((1, idle), (0, busy), (1, idle)):
            assert worker.worker_use is not None
            new.record(str(number), worker.worker_use)
            idle.take("new web process", new.elsewhere("1"))
        cluster.advance(60)
        assert cluster.request(1, self.LIMITS)


class TestCharactersADay:
    """A thousand a day."""

    LIMITS = KeyLimits(characters_per_day=1000)

    def test_over_all_workers(self) -> None:
        """Characters used at one worker are used up at the others, until midnight."""
        cluster = Cluster(3)
        assert cluster.request(0, self.LIMITS, 600)
        assert cluster.request(1, self.LIMITS, 300)
        cluster.exchange()
        assert not cluster.request(2, self.LIMITS, 101)
        assert cluster.request(2, self.LIMITS, 100)
        cluster.exchange()
        assert not any(cluster.request(worker, self.LIMITS) for worker in range(3))
        cluster.advance(DAY_S / 2)
        cluster.exchange()
        assert cluster.request(0, self.LIMITS, 1000)
        cluster.exchange()
        assert not cluster.request(1, self.LIMITS)

    def test_workers_with_one_file(self) -> None:
        """A worker that starts reads what its siblings have written: that does not count twice, and nothing is lost."""
        cluster = Cluster(2, sources=["file", "other file"])
        assert cluster.request(0, self.LIMITS, 400)
        assert cluster.request(1, self.LIMITS, 100)
        cluster.exchange()
        cluster.workers.append(cluster.start("file", in_file=400))
        cluster.exchange()
        assert not cluster.request(2, self.LIMITS, 501)
        assert cluster.request(2, self.LIMITS, 500)
        cluster.exchange()
        assert not any(cluster.request(worker, self.LIMITS) for worker in range(3))

    def test_a_worker_that_has_ended(self) -> None:
        """Its characters count on, its running requests do not."""
        limits = KeyLimits(characters_per_day=1000, concurrent_requests=2)
        cluster = Cluster(2)
        assert cluster.request(0, limits, 400)
        assert cluster.request(0, limits, 400)
        cluster.exchange()
        assert not cluster.request(1, limits)
        cluster.use.end("0")
        cluster.workers[1].take("web", cluster.use.elsewhere("1"))
        assert not cluster.request(1, limits, 201)
        assert cluster.request(1, limits, 200)


def test_requests_at_once() -> None:
    """They count over all workers, until they end."""
    limits = KeyLimits(concurrent_requests=3)
    cluster = Cluster(2)
    assert [cluster.request(0, limits) for _ in range(2)] == [True, True]
    cluster.exchange()
    assert [cluster.request(1, limits) for _ in range(2)] == [True, False]
    cluster.workers[0].end(KEY, limits)
    cluster.exchange()
    assert [cluster.request(1, limits) for _ in range(2)] == [True, False]


def test_requests_of_a_worker_that_comes_back() -> None:
    """They count again, and no longer than it is there."""
    limits = KeyLimits(concurrent_requests=2)
    cluster = Cluster(2)
    assert cluster.request(0, limits)
    for _ in range(2):
        cluster.exchange()
        assert [used.running for used in cluster.use.elsewhere("1").values()] == [1]
        cluster.use.end("0")
        assert [used.running for used in cluster.use.elsewhere("1").values()] == [0]


def test_a_worker_alone_reports_nothing() -> None:
    """Without a cluster, snapshots carry no keys."""
    worker = LimitCounter(FakeClock(), FakeClock())
    worker.count(KEY, KeyLimits(requests_per_minute=60), 1)
    assert worker.worker_use is None
    worker.take("web", {})
    assert worker.worker_use is not None
    used = worker.worker_use.clients[KEY]
    assert (used.minute_s, used.characters, used.running) == (1.0, 1, 1)
