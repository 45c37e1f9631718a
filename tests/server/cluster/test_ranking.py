"""Which replica speaks a request, on plain data."""

import itertools
from typing import Any

import pytest
from msgspec.structs import replace

from server.cluster.ranking import IDLE_S, Replica, ReplicaModel, Residence, rank, replica_of
from shared.protocol import ModelStatus
from shared.settings import ReplicaBounds
from tests.fakes import a_snapshot

NOW = 10_000.0
NAMES = [*itertools.permutations("xyz")]
"""Among equals the name decides, so what must hold in any case holds for all of these."""

SIZE = 4
"""Bytes of each model, on replicas with room for two."""


def model(residence: Residence = "resident", *, requests: int = 0, idle_s: float = 0.0) -> ReplicaModel:
    """One model on a replica."""
    held = SIZE if residence in {"resident", "loading"} else 0
    return ReplicaModel(residence=residence, device_bytes=held, requests=requests, last_used=NOW - idle_s)


def replica(name: str, *, running: int = 0, queued: int = 0, slots: int = 8, **models: ReplicaModel) -> Replica:
    """A replica with room for two models."""
    free_bytes = 2 * SIZE - sum(held.device_bytes for held in models.values())
    return Replica(id=name, slots=slots, running=running, queued=queued, free_bytes=free_bytes, models=models)


def order(*replicas: Replica, of: str = "a", bounds: ReplicaBounds = ReplicaBounds(), avoid: Any = ()) -> list[str]:  # noqa: B008 -- immutable
    """The names of the ranked replicas."""
    ranked = rank(of, replicas, needed_bytes=SIZE, now=NOW, bounds=bounds, avoid=avoid)
    return [one.id for one in ranked]


class TestOrder:
    """Resident with a free slot, then where it fits, there first where it is offloaded; queues decide among equals."""

    def test_resident_is_before_all_others(self) -> None:
        """While the model's home has a free slot, no other replica is even named."""
        home = replica("home", running=7, a=model(requests=7))
        assert order(replica("empty"), home, replica("host", a=model("offloaded"))) == ["home"]

    def test_loading_counts_as_home(self) -> None:
        """The second request waits for the load of the first, and begins none elsewhere."""
        assert order(replica("empty"), replica("home", a=model("loading", requests=1), running=1)) == ["home"]

    def test_resident_is_before_loading(self) -> None:
        """Even if the loading home has fewer requests."""
        homes = replica("loading", a=model("loading")), replica("resident", running=6, a=model(requests=6))
        assert order(*homes) == ["resident", "loading"]

    @pytest.mark.parametrize("names", NAMES)
    def test_offloaded_then_free_room_then_idle_models(self, names: tuple[str, str, str]) -> None:
        """For a model without a home."""
        host, free, full = names
        leaving = replica(full, b=model(idle_s=60), c=model(idle_s=60))
        assert order(leaving, replica(free), replica(host, a=model("offloaded"))) == [host, free, full]

    @pytest.mark.parametrize("names", NAMES)
    def test_waiting_requests_for_a_model_gather(self, names: tuple[str, str, str]) -> None:
        """Where nothing has room, all requests for a model wait on the same replica."""
        waits, *others = names
        busy = {"b": model(requests=1), "c": model(requests=1)}
        replicas = [replica(name, running=2, **busy) for name in others]
        assert order(*replicas, replica(waits, running=2, **busy, a=model("waiting", requests=1)))[0] == waits

    def test_busy_models_are_not_made_to_leave(self) -> None:
        """A replica with idle models is before one whose models have requests."""
        busy = replica("busy", running=2, b=model(requests=1), c=model(requests=1))
        idle = replica("idle", running=5, b=model(), c=model(requests=5))
        assert order(busy, idle) == ["idle", "busy"]

    def test_the_last_home_of_another_model_is_kept(self) -> None:
        """A model that is elsewhere too leaves rather than one that would be nowhere, even if it was used later."""
        last = replica("last", b=model(idle_s=200), c=model(idle_s=200))
        twice = replica("twice", d=model(idle_s=40), e=model(idle_s=40))
        others = replica("others", running=1, d=model(requests=1), e=model())
        assert order(last, twice, others)[0] == "twice"

    def test_shortest_queue_among_equals(self) -> None:
        """Of several empty replicas, and of several full homes."""
        assert order(replica("x", running=4), replica("y"), replica("z", running=2)) == ["y", "z", "x"]
        full = [replica(name, running=8, queued=queued, a=model()) for name, queued in (("x", 1), ("y", 0))]
        assert order(*full) == ["y", "x"]

    def test_a_pinned_model_makes_no_room(self) -> None:
        """It stays although it is idle."""
        pinned = ReplicaModel(residence="resident", device_bytes=SIZE, pinned=True)
        names = order(replica("pinned", b=pinned, c=pinned), replica("idle", running=3, b=model(), c=model()))
        assert names == ["idle", "pinned"]

    @pytest.mark.parametrize("names", NAMES)
    def test_models_get_a_replica_each(self, names: tuple[str, str, str]) -> None:
        """While there are as many, although all have room."""
        one, two, free = names
        assert order(replica(one, b=model()), replica(two, c=model()), replica(free))[0] == free

    def test_unavailable_comes_last(self) -> None:
        """A replica without the weights answers only if none has them."""
        assert order(replica("lacks", a=model("unavailable")), replica("full", running=8))[0] == "full"
        assert order(replica("lacks", a=model("unavailable"))) == ["lacks"]

    def test_every_router_chooses_the_same(self) -> None:
        """Among equals the order is by name and model, not by the order in which a router knows them."""
        replicas = [replica(f"r{number}") for number in range(20)]
        assert order(*replicas) == order(*reversed(replicas))
        assert order(*replicas) != order(*replicas, of="b")
        homes = [replica(f"r{number}", a=model()) for number in range(20)]
        assert order(*homes) == order(*reversed(homes))


class TestHomes:
    """A model gets another home by its bounds and by its queue, and uses no more homes than it needs."""

    def test_a_queue_justifies_another_home(self) -> None:
        """One waiting request for four slots of a home; less does not."""
        home = replica("home", running=8, queued=1, a=model(requests=9))
        assert order(home, replica("empty")) == ["home"]
        longer = replica("home", running=8, queued=2, a=model(requests=10))
        assert order(longer, replica("empty")) == ["empty", "home"]

    def test_no_other_home_without_room(self) -> None:
        """A model that is used does not leave for the second home of another."""
        home = replica("home", running=8, queued=8, a=model(requests=16))
        used = replica("used", b=model(idle_s=IDLE_S - 1), c=model(idle_s=IDLE_S - 1))
        assert order(home, used) == ["home"]
        unused = replica("unused", b=model(idle_s=IDLE_S + 1), c=model(idle_s=IDLE_S - 1))
        assert order(home, unused) == ["unused", "home"]

    def test_maximum(self) -> None:
        """No queue takes a model beyond it."""
        home = replica("home", running=8, queued=60, a=model(requests=68))
        assert order(home, replica("empty"), bounds=ReplicaBounds(1, 1)) == ["home"]

    def test_minimum(self) -> None:
        """A model with too few homes gets another one at its next request, though a slot is free."""
        home = replica("home", a=model())
        assert order(home, replica("empty"), bounds=ReplicaBounds(2, 3)) == ["empty", "home"]

    def test_minimum_of_homes_share_the_requests(self) -> None:
        """The shortest queue decides among them."""
        homes = [replica(name, running=running, a=model(requests=running)) for name, running in (("x", 1), ("y", 0))]
        assert order(*homes, bounds=ReplicaBounds(2, 2)) == ["y", "x"]

    def test_homes_that_are_not_needed_are_left_alone(self) -> None:
        """Below half of the slots one home has all requests; from there on the next one has them too."""
        first, second = order(*(replica(name, a=model()) for name in "xy"))
        low = {first: 3, second: 0}
        assert order(*(replica(name, running=low[name], a=model()) for name in "xy"))[0] == first
        high = {first: 4, second: 0}
        assert order(*(replica(name, running=high[name], a=model()) for name in "xy"))[0] == second

    @pytest.mark.parametrize("names", NAMES)
    def test_a_home_that_another_model_needs_is_used_last(self, names: tuple[str, str, str]) -> None:
        """So that the model there goes idle and can leave."""
        needed, other, _ = names
        waits = replica(needed, running=1, a=model(requests=1), b=model(requests=1), c=model("waiting", requests=1))
        assert order(waits, replica(other, running=3, a=model(requests=3)))[0] == other

    def test_refused_everywhere_at_home(self) -> None:
        """A home that has refused a request comes last, and its refusal justifies another home."""
        home = replica("home", running=8, a=model(requests=8))
        assert order(home, replica("empty"), avoid=["home"]) == ["empty", "home"]
        assert order(home, replica("empty"), avoid=["home"], bounds=ReplicaBounds(1, 1)) == ["home"]


class TestFigures:
    """The figures that a router takes from a snapshot."""

    @pytest.mark.parametrize(
        ("kind", "ours_bytes", "free_bytes"), [("cuda", 100, 100), ("cuda", 0, 150), ("cpu", 100, 150)]
    )
    def test_room(self, kind: Any, ours_bytes: int, free_bytes: int) -> None:
        """The rest of the budget: on a GPU behind all that the process holds, on a CPU behind the models."""
        plain = a_snapshot([]).device
        device = replace(plain, kind=kind, free_bytes=600, ours_bytes=ours_bytes, budget_bytes=200)
        models = [
            ModelStatus(id="a", state="resident", bytes={"weights": 50}, references=2, last_used=7.0),
            ModelStatus(id="b", state="absent", references=1),
            ModelStatus(id="c", state="offloaded"),
            ModelStatus(id="d", state="absent"),
            ModelStatus(id="e", state="unavailable"),
        ]
        figures = replica_of("one", a_snapshot([], device=device, models=models, running=2, queued=1, slots=4))
        assert figures.free_bytes == free_bytes
        assert {name: held.residence for name, held in figures.models.items()} == {
            "a": "resident",
            "b": "waiting",
            "c": "offloaded",
            "e": "unavailable",
        }
        assert (figures.models["a"].device_bytes, figures.models["a"].requests) == (50, 2)
        assert (figures.load, figures.has_free_slot) == (0.75, True)
