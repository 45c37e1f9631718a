"""The queue: bounded, fair between clients, first come first served within one."""

import random
from collections import Counter

import msgspec
import pytest

from gpu_worker.scheduler import QueueFullError, Scheduler


class _Asked(msgspec.Struct, frozen=True):
    """A request, as far as the queue looks at it."""

    name: str
    client: str = "alice"
    model: str = "m"


def _any(_model: str) -> bool:
    return True


def _queue(*requests: _Asked, max_queue: int = 100) -> Scheduler[_Asked]:
    scheduler = Scheduler[_Asked](max_queue)
    for request in requests:
        scheduler.submit(request, slots=1)
    return scheduler


def _drain(scheduler: Scheduler[_Asked]) -> list[str]:
    names = []
    while (request := scheduler.next(_any)) is not None:
        names.append(request.name)
    return names


class TestOrder:
    """Who is next."""

    def test_first_come(self) -> None:
        """Within one client, in the order of arrival."""
        assert _drain(_queue(_Asked("1"), _Asked("2"), _Asked("3"))) == ["1", "2", "3"]

    def test_clients_take_turns(self) -> None:
        """One each, in the order in which they first came, until all are served."""
        requests = [_Asked(f"a{i}", "alice") for i in range(4)] + [_Asked("b0", "bob"), _Asked("b1", "bob")]
        assert _drain(_queue(*requests, _Asked("c0", "carol"))) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]

    def test_put_back(self) -> None:
        """A request that could not be started after all is the next again, before its own client's and all others."""
        scheduler = _queue(_Asked("a0", "alice"), _Asked("a1", "alice"), _Asked("b0", "bob"))
        first = scheduler.next(_any)
        assert first is not None
        scheduler.put_back(first)
        assert len(scheduler) == 3
        assert _drain(scheduler) == ["a0", "b0", "a1"]
        scheduler.put_back(first)
        assert _drain(scheduler) == ["a0"]

    def test_late_client(self) -> None:
        """Somebody who comes late waits for one request of each other client at most."""
        scheduler = _queue(*[_Asked(f"a{i}", "alice") for i in range(5)], *[_Asked(f"b{i}", "bob") for i in range(5)])
        for _ in range(3):
            scheduler.next(_any)
        scheduler.submit(_Asked("late", "carol"), slots=1)
        assert "late" in _drain(scheduler)[:3]

    def test_coming_back_is_no_advantage(self) -> None:
        """A client whose line was empty goes behind those who wait already."""
        scheduler = _queue(_Asked("a0", "alice"), _Asked("b0", "bob"), _Asked("b1", "bob"))
        assert scheduler.next(_any) == _Asked("a0", "alice")
        scheduler.submit(_Asked("a1", "alice"), slots=1)
        assert _drain(scheduler) == ["b0", "a1", "b1"]

    def test_model_that_cannot_start(self) -> None:
        """Its requests keep their places and hold up none for another model, not even of the same client."""
        scheduler = _queue(_Asked("1", model="full"), _Asked("2"), _Asked("3", model="full"), _Asked("4", "bob"))
        assert scheduler.next(lambda model: model != "full") == _Asked("2")
        assert scheduler.next(lambda model: model != "full") == _Asked("4", "bob")
        assert scheduler.next(lambda model: model != "full") is None
        assert _drain(scheduler) == ["1", "3"]

    def test_asked_once_for_each_model(self) -> None:
        """Whether a model can start one is asked once, however many wait for it."""
        asked: list[str] = []

        def refuse(model: str) -> bool:
            asked.append(model)
            return False

        scheduler = _queue(*[_Asked(str(i), f"client {i % 7}", f"m{i % 2}") for i in range(50)])
        assert scheduler.next(refuse) is None
        assert sorted(asked) == ["m0", "m1"]

    def test_nobody(self) -> None:
        """An empty queue has no next."""
        assert _queue().next(_any) is None


class TestBound:
    """No more than so many."""

    def test_full(self) -> None:
        """One too many is told its place and an estimate; a place that becomes free can be taken."""
        one = _queue(_Asked("1"), max_queue=1)
        one.finished(7.1)
        with pytest.raises(QueueFullError, match=r"1 request is waiting already; a place may be free in about 5 s"):
            one.submit(_Asked("2"), slots=1)  # 4.44 s: not sooner than its Retry-After
        scheduler = _queue(_Asked("1"), _Asked("2"), max_queue=2)
        with pytest.raises(QueueFullError, match="2 requests are waiting already") as caught:
            scheduler.submit(_Asked("3"), slots=1)
        assert caught.value.position == 3
        assert caught.value.wait_s >= 1
        assert len(scheduler) == 2
        scheduler.next(_any)
        scheduler.submit(_Asked("3"), slots=1)
        assert len(scheduler) == 2

    def test_estimate(self) -> None:
        """Longer with longer requests and a longer queue, shorter with more slots, never less than a second."""
        scheduler = _queue()
        for _ in range(50):
            scheduler.finished(10.0)
        assert scheduler.estimate_s(3, 1) == pytest.approx(40.0, rel=0.01)
        assert scheduler.estimate_s(3, 4) == pytest.approx(10.0, rel=0.01)
        assert scheduler.estimate_s(3, 0) == scheduler.estimate_s(3, 1)
        for _ in range(100):
            scheduler.finished(0.0)
        assert scheduler.estimate_s(3, 1) == 1.0


class TestRemove:
    """Those who do not wait any more."""

    def test_some(self) -> None:
        """They are gone and told of; the others keep their order."""
        scheduler = _queue(_Asked("1"), _Asked("2"), _Asked("3", "bob"), _Asked("4"))
        removed = scheduler.remove(lambda request: request.name in "23")
        assert {request.name for request in removed} == {"2", "3"}
        assert len(scheduler) == 2
        assert _drain(scheduler) == ["1", "4"]

    def test_none(self) -> None:
        """Nobody is gone where nobody is meant."""
        scheduler = _queue(_Asked("1"))
        assert scheduler.remove(lambda _: False) == []
        assert [request.name for request in scheduler] == ["1"]


def test_nobody_is_lost_or_served_twice() -> None:
    """Through a thousand arrivals, starts and departures everybody leaves exactly once, in order within a client."""
    dice = random.Random(5)  # noqa: S311 -- a dice, not a secret
    scheduler = _queue(max_queue=30)
    came: list[_Asked] = []
    left: list[_Asked] = []
    for step in range(2_000):
        match dice.randrange(4):
            case 0 | 1:
                request = _Asked(str(step), dice.choice("abcde"), dice.choice("mn"))
                try:
                    scheduler.submit(request, slots=2)
                except QueueFullError:
                    assert len(scheduler) == 30
                else:
                    came.append(request)
            case 2:
                chosen = scheduler.next(lambda model: model == dice.choice("mn"))
                left += [chosen] if chosen is not None else []
            case _:
                left += scheduler.remove(lambda _: dice.random() < 0.01)
        assert len(scheduler) == len(came) - len(left) == len(list(scheduler))
    left += scheduler.remove(lambda _: True)
    assert Counter(left) == Counter(came)
    assert len(scheduler) == 0
