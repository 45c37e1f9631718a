"""How many replicas a cluster is to have, by their requests and slots. Plain data in, a number out.

It counts the requests of the GPU workers, running and queued. It counts no HTTP connections: a client that stalls stays
connected for minutes after its speech is made.

Up: when there are more requests than UP_LOAD of the slots, to as many replicas as hold them; and by one when a model
finds no room and no replica is idle.
Down: when no request waits, to as many replicas as hold them at DOWN_LOAD of the slots; and by no more than there are
replicas without any stream.

Serve chooses which replicas it stops. One that has streams ends with its last one: see `server.cluster.application`.
How long a number must be wanted before Serve follows is the application's, too.
"""

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from shared.protocol import Snapshot

UP_LOAD: Final = 0.8
"""The running and queued requests for each slot above which another replica is wanted."""

DOWN_LOAD: Final = 0.5
"""The same with fewer replicas, up to which one is given up. The gap keeps the number still while the load changes."""


class ReplicaLoad(msgspec.Struct, frozen=True):
    """The requests of one replica.

    `queued` requests wait for a slot, or for their model. `without_room` are those whose model is neither there nor on
    its way. `streams` are all that have not ended, also those that only wait for their readers.
    """

    running: float
    queued: float
    without_room: float
    streams: float
    slots: float


def load_of(snapshot: Snapshot, streams: int) -> ReplicaLoad:
    """The load of a replica with this snapshot, through which so many streams go."""
    return ReplicaLoad(
        running=snapshot.running,
        queued=snapshot.queued,
        without_room=sum(model.references for model in snapshot.models if model.state in {"absent", "offloaded"}),
        streams=max(streams, snapshot.running + snapshot.queued + snapshot.buffered),
        slots=snapshot.slots,
    )


def wanted_replicas(loads: Sequence[ReplicaLoad], *, unassigned: float, target: int) -> int:
    """The number of replicas for these requests; `loads` are those of the replicas that have sent them.

    `unassigned` requests have no replica yet. `target`: how many replicas there are or are on their way.
    """
    if not loads:  # the first one to come will say how many slots it has
        return max(target, 1 if unassigned else 0)
    busy = [load for load in loads if load.streams]
    # A replica without a model states the most slots that it may have.
    slots = max(1.0, sum(load.slots for load in busy or loads) / len(busy or loads))
    requests = unassigned + sum(load.running + load.queued for load in loads)
    needed = math.ceil(requests / (slots * UP_LOAD))
    if len(busy) >= target and any(load.without_room for load in loads):
        needed = max(needed, target + 1)
    if needed >= target:
        return needed
    if unassigned or len(loads) < target or any(load.queued for load in loads):
        return target
    return min(target, max(math.ceil(requests / (slots * DOWN_LOAD)), target - (len(loads) - len(busy))))
