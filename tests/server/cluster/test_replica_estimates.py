"""A router's estimate of the replicas: their figures, and its own requests since."""

from server.cluster.ranking import Replica, ReplicaModel
from server.cluster.replica_estimates import ON_THE_WAY_S, UNCONFIRMED_S, ReplicaEstimates


def figures(name: str = "one", *, running: int = 0, free_bytes: int = 100, **models: ReplicaModel) -> Replica:
    """The figures of a replica with four slots."""
    return Replica(id=name, slots=4, running=running, queued=0, free_bytes=free_bytes, models=models)


def resident(requests: int = 0, device_bytes: int = 60) -> ReplicaModel:
    """A model on the device."""
    return ReplicaModel(residence="resident", requests=requests, device_bytes=device_bytes)


def estimates_of(*replicas: Replica) -> ReplicaEstimates:
    """The router's estimates of these replicas at time 0."""
    known = ReplicaEstimates({"a": 40, "b": 70})
    for replica in replicas:
        known.update(replica, 0.0)
    return known


def test_sent_requests_count_at_once() -> None:
    """A router sends many requests between two figures."""
    known = estimates_of(figures(a=resident()))
    for number in range(5):
        known.sent(str(number), "one", "a", 1.0, confirmed=True)
    (one,) = known.replicas
    assert (one.running, one.queued, one.models["a"].requests) == (4, 1, 5)
    known.done("0")
    assert known.replicas[0].queued == 0


def test_a_model_that_was_asked_for_is_on_its_way() -> None:
    """So the next request for it goes the same way, and one for another model finds less room."""
    known = estimates_of(figures())
    known.sent("1", "one", "a", 1.0, confirmed=False)
    (one,) = known.replicas
    assert (one.residence("a"), one.free_bytes) == ("loading", 60)


def test_new_figures_have_the_requests() -> None:
    """They count once: those on their way beside the figures, the others in them."""
    known = estimates_of(figures(a=resident()))
    known.sent("early", "one", "a", 1.0, confirmed=True)
    known.sent("late", "one", "a", 2.0, confirmed=True)
    known.update(figures(running=1, a=resident(1)), 2.0 + ON_THE_WAY_S / 2)
    assert known.replicas[0].running == 2
    known.done("early")
    assert known.replicas[0].running == 1
    known.done("late")
    known.update(figures(a=resident()), 3.0)
    assert known.replicas[0].running == 0


def test_a_request_that_was_never_taken_is_forgotten() -> None:
    """Its client left before a replica answered."""
    known = estimates_of(figures())
    known.sent("1", "one", "a", 1.0, confirmed=False)
    known.sent("2", "one", "a", 1.0, confirmed=True)
    known.update(figures(running=1), 1.1 + UNCONFIRMED_S)
    known.done("1")
    known.done("2")
    assert known.replicas == [figures()]
    known.update(figures(), 2.0 + UNCONFIRMED_S)
    known.sent("3", "one", "a", 20.0, confirmed=False)
    assert known.replicas[0].running == 1
    known.update(figures(), 20.1 + UNCONFIRMED_S)
    assert known.replicas == [figures()]


def test_a_request_that_moves_counts_at_its_new_replica() -> None:
    """The replica of the router's choice was full, and Serve took the next one."""
    known = estimates_of(figures("one"), figures("two"))
    known.sent("1", "one", "a", 1.0, confirmed=False)
    known.sent("1", "two", "a", 1.1, confirmed=True)
    assert {one.id: one.running for one in known.replicas} == {"one": 0, "two": 1}


def test_a_replica_that_is_gone() -> None:
    """Its requests change nothing any more, neither when they end nor when the replica comes back."""
    known = estimates_of(figures("one"), figures("two"))
    known.sent("1", "one", "a", 1.0, confirmed=True)
    known.keep({"two"})
    known.done("1")
    assert known.replicas == [figures("two")]
    known.sent("2", "one", "a", 2.0, confirmed=True)
    known.done("2")
    assert known.replicas == [figures("two")]
    known.update(figures("one"), 3.0)
    assert known.replicas == [figures("two"), figures("one")]


def test_equal_figures_are_new_figures() -> None:
    """A request that was sent is in them, and another one has ended."""
    known = estimates_of(figures(running=3))
    known.sent("1", "one", "a", 1.0, confirmed=True)
    known.update(figures(running=3), 2.0)
    assert known.replicas == [figures(running=3)]


def test_needed_bytes() -> None:
    """As measured where the model is resident, as estimated before."""
    known = estimates_of(figures(a=resident()))
    assert (known.needed_bytes("a"), known.needed_bytes("b"), known.needed_bytes("c")) == (60, 70, 0)
    known.update(figures(), 1.0)
    assert known.needed_bytes("a") == 60
