"""How many replicas a cluster should have. Plain data in, plain data out.

What counts are the requests that run and wait, against the slots. Connections do not count: a listener may stay
connected for minutes after its speech is made.

Up: when there are more requests than UP_LOAD of the slots, at once as many replicas as hold them.
Down: when fewer replicas would hold all requests with room to spare, nothing waits, and replicas are drained:
no more than have neither a running nor a waiting request. To zero only without any request.

How long a decision has to stand before it is followed is not decided here; see `server.cluster.deployment`.
"""

import math
from collections.abc import Sequence
from typing import Final

import msgspec

UP_LOAD: Final = 0.8
"""Requests for each slot from which on there are too few replicas. A new GPU needs half a minute for its start."""

DOWN_LOAD: Final = 0.5
"""Requests for each slot that are left to the remaining replicas at most, so that the next minute needs none again."""


class ReplicaLoad(msgspec.Struct, frozen=True):
    """The requests of one replica: those that run, those that wait, and how many can run."""

    running: float
    queued: float
    slots: float


def wanted_replicas(loads: Sequence[ReplicaLoad], *, unassigned: float, target: int, usual_slots: int) -> int:
    """The number of replicas for these requests; `loads` are those of the replicas that run.

    `unassigned` requests have no replica yet. `target`: how many replicas there are or are on their way.
    `usual_slots`: the slots of a replica while none runs.
    """
    requests = unassigned + sum(load.running + load.queued for load in loads)
    slots = sum(load.slots for load in loads) / len(loads) if loads else usual_slots
    slots = max(1.0, slots)
    needed = math.ceil(requests / (slots * UP_LOAD))
    if needed >= target:
        return needed
    if any(load.queued for load in loads) or unassigned or len(loads) < target:
        return target
    drained = sum(not load.running for load in loads)
    return max(math.ceil(requests / (slots * DOWN_LOAD)), target - drained)
