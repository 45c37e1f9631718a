"""The queue: bounded, fair between clients, first come first served within a client."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.engines.base import JobError
from gpu_worker.requests import Request
from gpu_worker.requests.request import BATCH_PATIENCE_S
from gpu_worker.scheduling.scheduler import MAX_RETRY_S, PACE_WINDOW_S, Scheduler
from gpu_worker.scheduling.shares import MAX_CLIENTS, AudioShares
from tests.gpu_worker.fakes import FakeClock, a_request


def _any(_model: str, _yields: bool) -> bool:  # noqa: FBT001 -- as the scheduler asks
    return True


def _queue(*requests: Request, max_queue: int = 100, clock: FakeClock | None = None) -> Scheduler:
    scheduler = Scheduler(max_queue, clock or FakeClock())
    for request in requests:
        scheduler.submit(request, slots=1)
    return scheduler


def _next(scheduler: Scheduler) -> str:
    request = scheduler.next(_any)
    assert request is not None
    return request.id


def _take_all(scheduler: Scheduler) -> list[str]:
    return [_next(scheduler) for _ in range(len(scheduler))]


class TestOrder:
    """Which request is next."""

    def test_first_come_first_served(self) -> None:
        """Requests of one client start in the order of arrival."""
        assert _take_all(_queue(a_request("1"), a_request("2"), a_request("3"))) == ["1", "2", "3"]

    def test_clients_take_turns(self) -> None:
        """One request of each client in turn, in the order in which the clients came."""
        requests = [a_request(f"a{i}", client="alice") for i in range(4)]
        requests += [a_request("b0", client="bob"), a_request("b1", client="bob"), a_request("c0", client="carol")]
        assert _take_all(_queue(*requests)) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]

    def test_positions(self) -> None:
        """The place of a request is the one at which it leaves the queue; one that has left has none."""
        choose = random.Random(5)  # noqa: S311 -- no secret
        for _ in range(20):
            requests = [a_request(f"{i}", client=choose.choice("abcd")) for i in range(choose.randrange(1, 12))]
            scheduler = _queue(*requests)
            if choose.random() < 0.5:
                requests.remove(next(request for request in requests if request.id == _next(scheduler)))
            places = {request.id: scheduler.position(request) for request in requests}
            order = _take_all(scheduler)
            assert places == {name: place for place, name in enumerate(order, 1)}
            assert [scheduler.position(request) for request in requests] == [None] * len(requests)

    def test_put_back(self) -> None:
        """A request that could not be started is next again, before its own client's and all other requests."""
        scheduler = _queue(a_request("a0"), a_request("a1"), a_request("b0", client="bob"))
        first = scheduler.next(_any)
        assert first is not None
        scheduler.put_back(first)
        assert len(scheduler) == 3
        assert _take_all(scheduler) == ["a0", "b0", "a1"]
        scheduler.put_back(first)
        assert _take_all(scheduler) == ["a0"]

    def test_late_client(self) -> None:
        """A late client waits for at most one request of each other client."""
        scheduler = _queue(
            *[a_request(f"a{i}", client="alice") for i in range(5)],
            *[a_request(f"b{i}", client="bob") for i in range(5)],
        )
        for _ in range(3):
            scheduler.next(_any)
        scheduler.submit(a_request("late", client="carol"), slots=1)
        assert "late" in _take_all(scheduler)[:3]

    def test_coming_back_is_no_advantage(self) -> None:
        """A client whose queue was empty goes to the end of the turns."""
        scheduler = _queue(a_request("a0"), a_request("b0", client="bob"), a_request("b1", client="bob"))
        assert _next(scheduler) == "a0"
        scheduler.submit(a_request("a1"), slots=1)
        assert _take_all(scheduler) == ["b0", "a1", "b1"]

    def test_model_without_a_slot(self) -> None:
        """Its requests keep their places and hold up no request for another model, not even of the same client."""
        scheduler = _queue(
            a_request("1", model="full"), a_request("2"), a_request("3", model="full"), a_request("4", client="bob")
        )
        started = [scheduler.next(lambda model, _yields: model != "full") for _ in range(3)]
        assert [request and request.id for request in started] == ["2", "4", None]
        assert _take_all(scheduler) == ["1", "3"]

    def test_each_model_is_checked_once(self) -> None:
        """`admissible` is called once for each model, however many requests wait for it."""
        checked: list[str] = []

        def refuse(model: str, _yields: bool) -> bool:  # noqa: FBT001 -- as the scheduler asks
            checked.append(model)
            return False

        scheduler = _queue(*[a_request(str(i), client=f"client {i % 7}", model=f"m{i % 2}") for i in range(50)])
        assert scheduler.next(refuse) is None
        assert sorted(checked) == ["m0", "m1"]

    def test_empty(self) -> None:
        """An empty queue has no next request."""
        assert _queue().next(_any) is None


class TestShares:
    """Clients share the audio."""

    def serve(self, scheduler: Scheduler, audio_s: dict[str, float], requests: int) -> Counter[str]:
        """Let so many requests start and end, one after the other; the audio that each client got."""
        got: Counter[str] = Counter()
        for number in range(requests):
            for client in audio_s:
                if all(request.client != client for request in scheduler):
                    scheduler.submit(a_request(f"{client}{number}", client=client), slots=1)
            request = scheduler.next(_any)
            assert request is not None
            scheduler.settle(request, audio_s[request.client])
            got[request.client] += audio_s[request.client]
        return got

    def test_by_audio_and_not_by_requests(self) -> None:
        """A client with long texts and one with short ones get the same time."""
        got = self.serve(_queue(), {"long": 60.0, "short": 2.0, "middle": 10.0}, 600)
        assert got["long"] == pytest.approx(got["short"], abs=61)
        assert got["long"] == pytest.approx(got["middle"], abs=61)

    def test_nobody_saves_up(self) -> None:
        """A client that was away for long is next, and then takes turns with the others."""
        scheduler = _queue()
        self.serve(scheduler, {"alice": 10.0, "bob": 10.0}, 4)
        self.serve(scheduler, {"alice": 10.0}, 100)
        got = self.serve(scheduler, {"alice": 10.0, "bob": 10.0}, 20)
        assert got["bob"] == pytest.approx(got["alice"], abs=21)

    def test_what_was_not_spoken_is_not_charged(self) -> None:
        """Requests that are cancelled at once cost their client nothing."""
        got = self.serve(_queue(), {"alice": 0.0, "bob": 1.0, "carol": 1.0}, 30)
        assert got["bob"] == pytest.approx(got["carol"], abs=1)

    def test_the_number_of_clients_is_bounded(self) -> None:
        """A million addresses leave no million entries."""
        shares = AudioShares()
        for number in range(3 * MAX_CLIENTS):
            shares.join(f"peer:{number}")
            shares.serve(f"peer:{number}", 1.0)
        assert len(shares._clocks) <= MAX_CLIENTS + 1


class TestBatch:
    """Batch requests come after all others, and come."""

    def test_after_all_others(self) -> None:
        """Also after those that arrive later; among each other they take turns as the others do."""
        scheduler = _queue(
            a_request("b0", client="robot", is_batch=True, arrived_at=1_000.0),
            a_request("b1", client="robot", is_batch=True, arrived_at=1_000.0),
            a_request("c0", client="other robot", is_batch=True, arrived_at=1_000.0),
        )
        scheduler.submit(a_request("a0"), slots=1)
        assert scheduler.position(next(request for request in scheduler if request.id == "b0")) == 2
        assert _take_all(scheduler) == ["a0", "b0", "c0", "b1"]

    def test_fills_what_others_leave(self) -> None:
        """If no other request has a slot, a batch request starts."""
        scheduler = _queue(a_request("a0", model="full"), a_request("b0", client="robot", is_batch=True))
        request = scheduler.next(lambda model, _yields: model != "full")
        assert request is not None
        assert request.id == "b0"

    def test_asks_for_its_own_kind_of_slot(self) -> None:
        """A slot that another request must give up may not be there for one that yields."""
        scheduler = _queue(
            a_request("b0", client="robot", is_batch=True, arrived_at=1_000.0), a_request("a0", arrived_at=1_000.0)
        )
        assert scheduler.next(lambda _model, yields: yields).id == "b0"  # type: ignore[union-attr] # it has one
        assert scheduler.next(lambda _model, yields: yields) is None
        assert scheduler.next(lambda _model, yields: not yields).id == "a0"  # type: ignore[union-attr] # as above

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0.1, 20)), min_size=1, max_size=60))
    def test_nobody_starves(self, arrivals: list[tuple[str, bool, float]]) -> None:
        """While interactive requests come without a pause, every batch request starts within a bounded time."""
        clock = FakeClock()
        scheduler = Scheduler(1_000, clock)
        waiting: dict[str, float] = {}
        longest = 0.0
        for number, (client, is_batch, audio_s) in enumerate(arrivals):
            names = [f"{number}/greedy", f"{number}/{client}"]
            scheduler.submit(a_request(names[0], client="greedy", arrived_at=clock.now), slots=1)
            scheduler.submit(
                a_request(names[1], client=f"{client}{is_batch}", is_batch=is_batch, arrived_at=clock.now), slots=1
            )
            waiting |= dict.fromkeys(names, clock.now)
            longest = max(longest, self.start(scheduler, clock, waiting, audio_s))
        while any(request.client != "greedy" for request in scheduler):
            assert clock.now < 1_000 + 100 * BATCH_PATIENCE_S
            scheduler.submit(a_request("more", client="greedy", arrived_at=clock.now), slots=1)
            waiting["more"] = clock.now
            longest = max(longest, self.start(scheduler, clock, waiting, 1.0))
        # Its patience; then turns: each other client's requests that were there, 20 s each at most.
        assert longest <= BATCH_PATIENCE_S + 20.0 * (len(arrivals) + 1)

    def start(self, scheduler: Scheduler, clock: FakeClock, waiting: dict[str, float], audio_s: float) -> float:
        """Let the next request speak for `audio_s`; how long it had waited, if it was not the greedy client's."""
        request = scheduler.next(_any)
        assert request is not None
        waited_s = clock.now - waiting.pop(request.id)
        clock.advance(audio_s)
        scheduler.settle(request, audio_s)
        return 0.0 if request.client == "greedy" else waited_s


class TestBound:
    """At most `max_queue` requests wait."""

    def test_full(self) -> None:
        """The error has the number of waiting requests and an estimate; a place that becomes free can be taken."""
        one = _queue(a_request("1"), max_queue=1)
        one.record_slot_time(7.1)
        with pytest.raises(JobError, match=r"1 request is waiting already; a place may be free in about 8 s"):
            one.submit(a_request("2"), slots=1)  # 7.1 s, rounded up: not sooner than Retry-After
        scheduler = _queue(a_request("1"), a_request("2"), max_queue=2)
        with pytest.raises(JobError, match="2 requests are waiting already") as caught:
            scheduler.submit(a_request("3"), slots=1)
        assert caught.value.code == "queue_full"
        assert (caught.value.retry_after_s or 0) >= 1
        assert len(scheduler) == 2
        scheduler.next(_any)
        scheduler.submit(a_request("3"), slots=1)
        assert len(scheduler) == 2

    def test_free_slots_are_places(self) -> None:
        """Free slots count before the queue, and a request that is about to start needs no place."""
        scheduler = _queue(a_request("1"), max_queue=1)
        scheduler.submit(a_request("2"), slots=2, free_slots=1)
        with pytest.raises(JobError, match="queue is full"):
            scheduler.submit(a_request("3"), slots=2, free_slots=1)
        scheduler.submit(a_request("4"), slots=2, can_start=True)
        assert len(scheduler) == 3


class TestEstimate:
    """When a refused client should try again."""

    def retry_after_s(self, scheduler: Scheduler, slots: int = 1) -> float:
        """The time to retry that a refused client reads."""
        with pytest.raises(JobError, match="queue is full") as caught:
            scheduler.submit(a_request("refused"), slots)
        assert caught.value.retry_after_s is not None
        return caught.value.retry_after_s

    def full(self, clock: FakeClock, count: int = 64) -> Scheduler:
        """A scheduler whose queue is full with `count` requests."""
        return _queue(*[a_request(str(i)) for i in range(count)], max_queue=count, clock=clock)

    def start_one(self, scheduler: Scheduler) -> None:
        """Take out a request; another one comes in its place."""
        assert scheduler.next(_any)
        scheduler.submit(a_request("more"), slots=1)

    @pytest.mark.parametrize("every_s", [3.0, 7.0])
    def test_pace_of_the_last_minute(self, every_s: float) -> None:
        """The wait is the time between two starts of the last minute, whatever a slot's time was before."""
        clock = FakeClock()
        scheduler = self.full(clock)
        scheduler.record_slot_time(1.0)
        for pace_s in (0.1, every_s):
            for _ in range(25):
                clock.advance(pace_s)
                self.start_one(scheduler)
        assert self.retry_after_s(scheduler) == pytest.approx(every_s, rel=0.2)

    def test_each_refused_client_waits_for_its_own_place(self) -> None:
        """The third refused client waits for three places; each place that becomes free counts one client less."""
        clock = FakeClock()
        scheduler = self.full(clock)
        for _ in range(20):
            clock.advance(4)
            self.start_one(scheduler)
        waits = [self.retry_after_s(scheduler) for _ in range(3)]
        assert waits == pytest.approx([4, 8, 12], rel=0.2)
        for _ in range(3):
            assert scheduler.next(_any)
        for _ in range(3):
            scheduler.submit(a_request("more"), slots=1)
        assert self.retry_after_s(scheduler) < 5

    def test_a_client_that_asks_without_a_pause(self) -> None:
        """However often clients are refused, the wait is never longer than the whole queue's, nor than a minute."""
        clock = FakeClock()
        scheduler = self.full(clock, count=4)
        clock.advance(5)
        self.start_one(scheduler)
        waits = [self.retry_after_s(scheduler) for _ in range(50)]
        assert waits[-1] == waits[4] == pytest.approx(4 * 3)
        clock.advance(1_000)
        assert self.retry_after_s(scheduler) == MAX_RETRY_S

    def test_before_the_queue_has_a_pace(self) -> None:
        """The mean time in a slot, shared by the slots; while no request starts, as long as they have waited."""
        clock = FakeClock()
        for slots, expected in ((1, 20.0), (4, 5.0), (0, 20.0)):
            scheduler = self.full(clock)
            for _ in range(50):
                scheduler.record_slot_time(20.0)
            assert self.retry_after_s(scheduler, slots) == pytest.approx(expected, rel=0.01)
        clock.advance(15)
        assert self.retry_after_s(self.full(clock)) == 1.0
        scheduler = self.full(clock)
        clock.advance(15)
        assert self.retry_after_s(scheduler) == pytest.approx(16)

    def test_never_less_than_a_second(self) -> None:
        """A queue that moves fast still asks for a pause of a second."""
        clock = FakeClock()
        scheduler = self.full(clock)
        for _ in range(50):
            clock.advance(0.01)
            self.start_one(scheduler)
        assert self.retry_after_s(scheduler) == 1.0

    def test_old_starts_do_not_count(self) -> None:
        """A queue that stands still for a minute has no pace left, and an empty queue forgets its own."""
        clock = FakeClock()
        scheduler = self.full(clock)
        for _ in range(50):
            clock.advance(0.01)
            self.start_one(scheduler)
        clock.advance(PACE_WINDOW_S + 1)
        assert self.retry_after_s(scheduler) == MAX_RETRY_S
        _take_all(scheduler)
        for _ in range(64):
            scheduler.submit(a_request("new"), slots=1)
        assert self.retry_after_s(scheduler) == 1.0

    def test_put_back(self) -> None:
        """A request that could not be started does not count as a start."""
        clock = FakeClock()
        scheduler = self.full(clock)
        clock.advance(9)
        for _ in range(100):
            request = scheduler.next(_any)
            assert request is not None
            scheduler.put_back(request)
        assert self.retry_after_s(scheduler) == pytest.approx(10)


class TestRemove:
    """Requests that do not wait any more."""

    def test_one(self) -> None:
        """The request is gone; the others keep their order."""
        requests = [a_request("1"), a_request("2"), a_request("3", client="bob"), a_request("4")]
        scheduler = _queue(*requests)
        for request in requests[1:3]:
            scheduler.remove(request)
        assert len(scheduler) == 2
        assert _take_all(scheduler) == ["1", "4"]

    def test_not_queued(self) -> None:
        """Removing a request that is not queued has no effect."""
        scheduler = _queue(a_request("1"))
        scheduler.remove(a_request("1"))
        scheduler.remove(a_request("2", client="bob"))
        assert _take_all(scheduler) == ["1"]


def test_every_request_leaves_once() -> None:
    """Through two thousand arrivals, starts and removals every request leaves exactly once."""
    dice = random.Random(5)  # noqa: S311 -- a dice, not a secret
    scheduler = _queue(max_queue=30)
    submitted: list[Request] = []
    left: list[Request] = []
    for step in range(2_000):
        match dice.randrange(4):
            case 0 | 1:
                request = a_request(str(step), client=dice.choice("abcde"), model=dice.choice("mn"))
                try:
                    scheduler.submit(request, slots=2)
                except JobError:
                    assert len(scheduler) == 30
                else:
                    submitted.append(request)
            case 2:
                chosen = scheduler.next(lambda model, _yields: model == dice.choice("mn"))
                left += [chosen] if chosen is not None else []
            case _:
                for request in [request for request in scheduler if dice.random() < 0.01]:
                    scheduler.remove(request)
                    left.append(request)
        assert len(scheduler) == len(submitted) - len(left) == len(list(scheduler))
    left += list(scheduler)
    assert Counter(left) == Counter(submitted)
