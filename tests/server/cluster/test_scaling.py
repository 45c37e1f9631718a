"""How many replicas there should be, on plain data."""

import pytest

from server.cluster.scaling import ReplicaLoad, wanted_replicas


def wanted(*loads: tuple[float, float], unassigned: float = 0, target: int | None = None, slots: float = 10) -> int:
    """For replicas with these running and queued requests."""
    replicas = [ReplicaLoad(running, queued, slots) for running, queued in loads]
    return wanted_replicas(
        replicas, unassigned=unassigned, target=len(loads) if target is None else target, usual_slots=8
    )


def test_a_queue_needs_another_replica() -> None:
    """Ten requests for ten slots are too many, eight are not."""
    assert wanted((8, 0)) == 1
    assert wanted((10, 2)) == 2
    assert wanted((10, 30)) == 5


def test_requests_count_not_replicas() -> None:
    """A queue at one replica needs no new one while another has free slots: the router's choice, or a model's load."""
    assert wanted((4, 3), (0, 0)) == 2


def test_replicas_on_their_way_count() -> None:
    """The same queue does not start one after the other."""
    assert wanted((10, 2), target=2) == 2


def test_down_only_when_drained() -> None:
    """No more replicas leave than have nothing to do."""
    assert wanted((1, 0), (1, 0), (1, 0)) == 3
    assert wanted((1, 0), (0, 0), (1, 0)) == 2
    assert wanted((1, 0), (0, 0), (0, 0)) == 1
    assert wanted((0, 0), (0, 0)) == 0


@pytest.mark.parametrize("requests", [5.1, 7, 8])
def test_not_down_at_once_before_up(requests: float) -> None:
    """The replicas that are left have room to spare."""
    assert wanted((requests, 0), (0, 0)) == 2


def test_not_down_while_requests_wait_or_a_replica_starts() -> None:
    """A new replica takes half a minute, so one too many is better than one too few."""
    assert wanted((1, 0), (0, 1), (0, 0)) == 3
    assert wanted((1, 0), (0, 0), (0, 0), unassigned=1) == 3
    assert wanted((1, 0), (0, 0), target=3) == 3


def test_from_zero() -> None:
    """The first request starts one replica, sixteen start two or three by the usual slots of one."""
    assert wanted(target=0) == 0
    assert wanted(target=0, unassigned=1) == 1
    assert wanted(target=0, unassigned=16) == 3


def test_no_slots() -> None:
    """A replica whose worker has just started has said nothing yet."""
    assert wanted((0, 0), slots=0) == 0
    assert wanted((1, 0), slots=0) == 2
