"""The choice of a replica by reports: in front of real GPU workers with fake engines, without Ray."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from server.cluster.placement import Placement
from server.engine import ReplicaReport
from shared.protocol import Failed, Finished, ModelStatus, SpeechError
from shared.settings import ReplicaBounds
from tests.fakes import a_snapshot
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.worker_bench import WorkerBench

MODELS: Final = ("a", "b", "c")
SIZE: Final = 100
REQUESTS: Final = 200
REPORT_EVERY: Final = 5
"""Turns of the workers between two reports."""


class Crowd:
    """Three GPU workers with room for two models each, and one router in front of them.

    All requests come at once. The router sees new reports now and then, and tries a refused request elsewhere.
    """

    def __init__(self, folder: Path, bounds: dict[str, ReplicaBounds] | None = None) -> None:
        self.workers = {
            name: WorkerBench(
                folder / name,
                dict.fromkeys(MODELS, SIZE),
                device=FakeDevice(total_bytes=2 * SIZE + 50, budget_bytes=2 * SIZE + 50),
                slots=8,
                max_queue=64,
            )
            for name in ("x", "y", "z")
        }
        self.placement = Placement(bounds or {}, dict.fromkeys(MODELS, SIZE))
        self.spoken: Counter[str] = Counter()
        """Requests that were spoken in full, by model."""

        self.refused = 0
        self._numbers = count()
        self.at: dict[str, tuple[str, str]] = {}
        """The model and the worker of each request that has not ended."""

        self._avoided: defaultdict[str, list[str]] = defaultdict(list)
        self.homes: dict[str, Counter[str]] = {model: Counter() for model in MODELS}
        """Requests by model and worker."""

    def run(self, models: list[str]) -> None:
        """A request for each of `models`, all at once, until the last one has ended."""
        self._report()
        for model in models:
            self._send(f"r{next(self._numbers)}", model)
        for turns in count():
            assert turns < 5_000
            for name, worker in self.workers.items():
                worker.turn()
                self._take_answers(name, worker)
            if turns % REPORT_EVERY == 0:
                self._report()
            if not self.at:
                return

    def loads(self) -> int:
        """The loads and restores of all workers."""
        snapshots = [worker.snapshot() for worker in self.workers.values()]
        stats = [stats for snapshot in snapshots for stats in snapshot.model_stats.values()]
        kinds = ("load", "restore")
        return sum(sum(one.transitions_s[kind].counts) for one in stats for kind in kinds if kind in one.transitions_s)

    def _report(self) -> None:
        self.placement.reports = {
            name: ReplicaReport(replica=name, snapshot=worker.snapshot()) for name, worker in self.workers.items()
        }

    def _send(self, request_id: str, model: str) -> None:
        avoid = self._avoided[request_id]
        name = self.placement.choose([*self.workers], model, avoid)[0]
        if name in avoid:
            self.refused += 1
            return
        self.placement.sent(request_id, name, model, taken=True)
        self.at[request_id] = model, name
        self.homes[model][name] += 1
        self.workers[name].speak(request_id, "one two three four", model=model)

    def _take_answers(self, name: str, worker: WorkerBench) -> None:
        for _, message, _ in worker.sent:
            match message:
                case Finished(id=request_id):
                    model, _ = self.at.pop(request_id)
                    self.spoken[model] += worker.words(request_id) == "one two three four"
                    self.placement.ended(request_id)
                case Failed(id=request_id, code=code):
                    assert code == "queue_full"
                    model, _ = self.at.pop(request_id)
                    self.homes[model][name] -= 1
                    self.placement.ended(request_id)
                    self._avoided[request_id].append(name)
                    self._send(request_id, model)
        worker.sent[:] = [sent for sent in worker.sent if not isinstance(sent[1], Finished | Failed)]

    def close(self) -> None:
        """End the workers' threads."""
        for worker in self.workers.values():
            worker.close()


@pytest.fixture
def make_crowd(tmp_path: Path) -> Iterator[Callable[..., Crowd]]:
    """Makes a Crowd; its arguments are the bounds of models."""
    made: list[Crowd] = []

    def make(**bounds: ReplicaBounds) -> Crowd:
        made.append(Crowd(tmp_path, bounds))
        return made[-1]

    yield make
    for crowd in made:
        crowd.close()


def test_two_hundred_requests_over_three_models(make_crowd: Callable[..., Crowd]) -> None:
    """Each model stays mostly where it is: a few loads for all, and every request is spoken."""
    crowd = make_crowd()
    crowd.run([MODELS[number % 3] for number in range(REQUESTS)])
    print(f"{REQUESTS} requests: {crowd.loads()} loads; by model and worker: {crowd.homes}")  # noqa: T201 -- for -s
    assert crowd.spoken.total() == REQUESTS
    assert crowd.loads() <= 6
    for homes in crowd.homes.values():
        assert max(homes.values()) > homes.total() / 2


def test_thin_traffic_loads_a_model_once(make_crowd: Callable[..., Crowd]) -> None:
    """Sixty requests, one after the other: three loads, although every worker has free slots all the time."""
    crowd = make_crowd()
    for number in range(60):
        crowd.run([MODELS[number % 3]])
    assert crowd.loads() == 3


def test_bounds(make_crowd: Callable[..., Crowd]) -> None:
    """A model with a minimum of two is on two workers at its second request, one with a maximum of one never is."""
    crowd = make_crowd(a=ReplicaBounds(2, 2), b=ReplicaBounds(1, 1))
    crowd.run(["a", "a"])
    assert len(crowd.homes["a"]) == 2
    crowd.run(["b"] * 100)
    assert len(+crowd.homes["b"]) == 1
    assert crowd.spoken["b"] == 8 + 64  # as many as have a slot or a place in the queue
    assert crowd.refused == 100 - 72


def test_requests_count_until_they_end() -> None:
    """Between two reports: a home is full after as many requests as it has slots, and free again when one ends."""
    placement = Placement({}, {})
    home = a_snapshot([], models=[ModelStatus(id="a", state="resident")], slots=2)
    placement.reports = {name: ReplicaReport(replica=name, snapshot=home) for name in ("x", "y")}
    first, second = placement.choose(["x", "y"], "a")
    for number in range(2):
        placement.sent(str(number), first, "a", taken=True)
    assert placement.choose(["x", "y"], "a") == [second, first]
    placement.ended("0")
    placement.ended("1")
    assert placement.choose(["x", "y"], "a") == [first, second]


class TestUnknown:
    """Replicas that have not said anything, or nothing good."""

    def test_no_report_yet(self) -> None:
        """The order is any, but those that refused come last."""
        assert Placement({}, {}).choose(["x", "y"], "a", ["x"]) == ["y", "x"]

    def test_a_replica_without_a_worker_is_left_out(self) -> None:
        """If another one answers; else one that has not said so comes first."""
        placement = Placement({}, {})
        dead = ReplicaReport(
            replica="x", snapshot=a_snapshot([]), error=SpeechError(code="worker_unavailable", message="gone")
        )
        placement.reports = {"x": dead, "y": ReplicaReport(replica="y", snapshot=a_snapshot([]))}
        assert placement.choose(["x", "y", "z"], "a") == ["y"]
        assert placement.choose(["x", "z"], "a") == ["z", "x"]

    def test_a_replica_that_serve_has_taken_away(self) -> None:
        """Its last report may still be there."""
        placement = Placement({}, {})
        home = a_snapshot([], models=[ModelStatus(id="a", state="resident")])
        placement.reports = {
            "x": ReplicaReport(replica="x", snapshot=home),
            "y": ReplicaReport(replica="y", snapshot=a_snapshot([])),
        }
        assert placement.choose(["x", "y"], "a") == ["x"]
        assert placement.choose(["y"], "a") == ["y"]
