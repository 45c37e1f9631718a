"""How many replicas are wanted, for plain loads."""

from typing import Any

import pytest

from server.cluster.autoscaling import ReplicaLoad, load_of, wanted_replicas
from shared.protocol import ModelStatus
from tests.fakes import a_snapshot

SLOTS = 10


def replica(running: int, queued: int = 0, *, without_room: int = 0, streams: int = 0, slots: int = SLOTS) -> Any:
    """A load; each of its requests is a stream."""
    return ReplicaLoad(running, queued, without_room, max(streams, running + queued), slots)


def wanted(*loads: Any, unassigned: float = 0, target: int | None = None) -> int:
    """For these replicas, and none that is starting."""
    return wanted_replicas(loads, unassigned=unassigned, target=len(loads) if target is None else target)


def test_a_queue_needs_another_replica() -> None:
    """As many replicas as hold all requests, also those that no replica has yet; and none before four fifths."""
    assert wanted(replica(8)) == 1
    assert wanted(replica(9)) == 2
    assert wanted(replica(10, 3)) == 2
    assert wanted(replica(10, 30)) == 5
    assert wanted(replica(8), unassigned=3) == 2


def test_a_queue_of_one_replica_is_room_at_another() -> None:
    """Requests that wait where their model is need no replica beside one that can take the next ones."""
    assert wanted(replica(10, 2), replica(0)) == 2


def test_a_model_without_room_needs_another_replica() -> None:
    """Slots are free, but its requests find none; one idle replica is enough for it."""
    assert wanted(replica(2, 1, without_room=1)) == 2
    assert wanted(replica(2, 1, without_room=1), replica(1)) == 3
    assert wanted(replica(2, 1, without_room=1), replica(0)) == 2
    assert wanted(replica(2, 1, without_room=1), target=2) == 2


def test_down_only_when_drained() -> None:
    """By no more replicas than are idle, and never below what the load needs with room to spare."""
    assert wanted(replica(1), replica(1)) == 2
    assert wanted(replica(1), replica(0)) == 1
    assert wanted(replica(1), replica(0), replica(1)) == 2
    assert wanted(replica(1), replica(0), replica(0)) == 1
    assert wanted(replica(6), replica(0)) == 2


def test_to_zero_only_without_any_stream() -> None:
    """One that has been made and waits for its reader counts."""
    assert wanted(replica(0)) == 0
    assert wanted(replica(0), replica(0)) == 0
    assert wanted(replica(0, streams=1)) == 1


@pytest.mark.parametrize("running", [6, 7, 8])
def test_the_number_does_not_swing(running: int) -> None:
    """Between the two loads it stays as it is, whether there is one replica or there are two."""
    assert wanted(replica(running)) == 1
    assert wanted(replica(running), replica(0)) == 2


def test_not_down_while_requests_wait_or_a_replica_starts() -> None:
    """Both say that the figures are about to change."""
    assert wanted(replica(1, 1), replica(0)) == 2
    assert wanted(replica(1), replica(0), unassigned=1) == 2
    assert wanted(replica(1), target=2) == 2


def test_from_zero() -> None:
    """A request without a replica starts one. Until that has said what it can do, there are no more and no fewer."""
    assert wanted(target=0) == 0
    assert wanted(target=0, unassigned=16) == 1
    assert wanted(target=3, unassigned=16) == 3


def test_slots_are_those_of_busy_replicas() -> None:
    """A replica without a model states more slots than it will have."""
    assert wanted(replica(10, 10), replica(0, slots=64)) == 3
    assert wanted(replica(9, slots=0)) > 1


def test_the_load_of_a_snapshot() -> None:
    """A request whose model neither is there nor comes finds no room; what waits for a reader is a stream."""
    models = [
        ModelStatus(id="a", state="resident", references=3),
        ModelStatus(id="b", state="loading", references=4),
        ModelStatus(id="c", state="offloaded", references=2),
        ModelStatus(id="d", state="absent", references=1),
    ]
    snapshot = a_snapshot([], running=3, queued=7, buffered=5, slots=8, models=models)
    assert load_of(snapshot, 0) == ReplicaLoad(running=3, queued=7, without_room=3, streams=15, slots=8)
    assert load_of(snapshot, 16).streams == 16
