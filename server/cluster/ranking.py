"""The ranking of replicas for a request of a model. Plain data in, plain data out.

The homes of a model are the replicas where it is resident or loading. The order of precedence:
 1. homes with a free slot, those first where the model is resident;
 2. if another home is wanted: a replica where the model fits, then one where idle models have to leave for it,
    and of these the ones first where it is offloaded;
 3. homes without a free slot.

The queue decides among equals. A model gets another home

- while it has fewer than its minimum, or
- while it has fewer than its maximum, none of its homes has a free slot, and as many requests wait at these as are
  QUEUE_PER_SLOT of the slots of one home.

So traffic that is thin never loads a model on all replicas. And it does not keep a model on more replicas than it
needs: the fewest homes that stay below PACKED_LOAD are used, always the same ones. On the others the model goes idle,
and leaves when the GPU worker needs its room. A home where another model waits for room is the last to be used.

Which model leaves a GPU is the policy of its worker alone; see `gpu_worker.residency`.
"""

import functools
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from shared.protocol import ModelStatus, Snapshot
from shared.settings import ReplicaBounds

QUEUE_PER_SLOT: Final = 0.25
"""Waiting requests, for each slot of one home, that justify another home.

The queue of 64 places (TTS_MAX_QUEUE) of a GPU with 64 slots is not full before another home is on its way.
"""

PACKED_LOAD: Final = 0.5
"""The running and queued requests for each slot from which on a model uses one more of its homes."""

IDLE_S: Final = 30.0
"""A model that has a home makes only such models leave for another one that were not used for this long."""

LOAD_STEPS: Final = 8
"""Loads that differ by less than an eighth of the slots are equal, so that several routers choose the same replica."""

Residence = Literal["resident", "loading", "offloaded", "waiting", "unavailable"]
"""waiting: requests wait for the model on that replica, and the model is not on its way yet."""

_AT_HOME: Final = frozenset({"resident", "loading"})


class ReplicaModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one replica. `requests` are those of the model there, `last_used` is in Unix seconds.

    `pinned`: the model stays on the device although it is idle.
    """

    residence: Residence
    device_bytes: int = 0
    requests: int = 0
    last_used: float = 0.0
    pinned: bool = False


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU worker as a router sees it. `free_bytes` are those that a load may take without an eviction.

    `queued` requests wait for a slot, or for their model.
    """

    id: str
    slots: int
    running: int
    queued: int
    free_bytes: int
    models: Mapping[str, ReplicaModel]

    @property
    def load(self) -> float:
        """The running and queued requests for each slot."""
        return (self.running + self.queued) / max(1, self.slots)

    @property
    def has_free_slot(self) -> bool:
        """True if a request would get a slot at once."""
        return self.running + self.queued < self.slots

    def residence(self, model: str) -> Residence | None:
        """The place of the model on this replica; None if it is absent."""
        held = self.models.get(model)
        return held.residence if held else None


def replica_of(replica_id: str, snapshot: Snapshot) -> Replica:
    """The figures of a GPU worker's snapshot that a router needs."""
    device = snapshot.device
    held_bytes = sum(sum(status.bytes.values()) for status in snapshot.models)
    # The driver is asked a few times a second: a model that has just come may not be in its figure.
    ours_bytes = max(device.ours_bytes, held_bytes) if device.kind == "cuda" else held_bytes
    return Replica(
        id=replica_id,
        slots=snapshot.slots,
        running=snapshot.running,
        queued=snapshot.queued,
        free_bytes=max(0, min(device.free_bytes, device.budget_bytes - ours_bytes)),
        models={status.id: held for status in snapshot.models if (held := _model_of(status))},
    )


def rank(
    model: str,
    replicas: Sequence[Replica],
    *,
    needed_bytes: int,
    now: float,
    bounds: ReplicaBounds,
    avoid: Collection[str] = (),
) -> list[Replica]:
    """The replicas for a request of `model`, the best first.

    `needed_bytes`: what a load of the model takes on a device. `avoid`: replicas that have just refused the request.
    """
    homes = [replica for replica in replicas if replica.residence(model) in _AT_HOME]
    homes.sort(key=lambda home: _order(model, home.id))
    free = [home for home in homes if home.has_free_slot and home.id not in avoid]
    full = [home for home in homes if not home.has_free_slot or home.id in avoid]
    full.sort(key=lambda home: (home.id in avoid, home.load))
    free = _packed(model, free, homes, bounds.minimum)
    if free and len(homes) >= bounds.minimum:
        return free + full
    if not _another_is_wanted(homes, bounds, avoid):
        return full
    unused_since = now - IDLE_S if homes else now
    others = _new_homes(model, replicas, needed_bytes, unused_since, avoid)
    if homes:
        others = [
            other for other in others if other.has_free_slot and _lets_in(model, other, needed_bytes, unused_since)
        ]
    return others + free + full


def _packed(model: str, free: list[Replica], homes: list[Replica], minimum: int) -> list[Replica]:
    """The homes with a free slot; those first that the model uses, and of these the ones with the shortest queue.

    The model uses the fewest homes that stay below PACKED_LOAD. A home that another model needs comes last.
    """
    used: set[str] = set()
    load = 0.0
    for home in sorted(homes, key=lambda home: _is_wanted_by_others(model, home)):
        if len(used) >= minimum and load < PACKED_LOAD * len(used):
            break
        used.add(home.id)
        load += home.load
    return sorted(free, key=lambda home: (home.residence(model) != "resident", home.id not in used, home.load))


def _another_is_wanted(homes: Sequence[Replica], bounds: ReplicaBounds, avoid: Collection[str]) -> bool:
    """True if the model is to have another home; no home has a free slot, or there are too few of them."""
    if len(homes) < bounds.minimum or len(homes) >= bounds.maximum:
        return len(homes) < bounds.minimum
    queued = sum(home.queued for home in homes)
    slots = sum(home.slots for home in homes) / len(homes)
    return queued >= max(1, QUEUE_PER_SLOT * slots) or any(home.id in avoid for home in homes)


def _new_homes(
    model: str, replicas: Sequence[Replica], needed_bytes: int, unused_since: float, avoid: Collection[str]
) -> list[Replica]:
    """The other replicas, the best new home first."""
    copies = _copies(replicas)

    def cost(replica: Replica) -> tuple[object, ...]:
        victims = _victims(replica, needed_bytes, unused_since)
        residence = replica.residence(model)
        return (
            replica.id in avoid,
            residence == "unavailable",
            not replica.has_free_slot,
            victims is None,
            bool(victims),
            sum(copies[name] == 1 for name in victims or ()),
            residence != "offloaded",
            residence != "waiting",
            int(replica.load * LOAD_STEPS),
            sum(held.residence in _AT_HOME for held in replica.models.values()),
            max((replica.models[name].last_used for name in victims or ()), default=0.0),
            _order(model, replica.id),
        )

    return sorted((replica for replica in replicas if replica.residence(model) not in _AT_HOME), key=cost)


def _lets_in(model: str, replica: Replica, needed_bytes: int, unused_since: float) -> bool:
    """True if a load of the model begins at once."""
    is_unavailable = replica.residence(model) == "unavailable"
    return not is_unavailable and _victims(replica, needed_bytes, unused_since) is not None


def _victims(replica: Replica, needed_bytes: int, unused_since: float) -> list[str] | None:
    """The idle models that leave for a load, as the worker takes them; None if there is no room without them all."""
    short_bytes = needed_bytes - replica.free_bytes
    victims: list[str] = []
    for name, held in sorted(replica.models.items(), key=lambda item: item[1].last_used):
        if short_bytes <= 0:
            break
        if held.residence == "resident" and not held.requests and not held.pinned and held.last_used <= unused_since:
            short_bytes -= held.device_bytes
            victims.append(name)
    return victims if short_bytes <= 0 else None


def _copies(replicas: Iterable[Replica]) -> dict[str, int]:
    """The number of homes by model."""
    copies: dict[str, int] = {}
    for replica in replicas:
        for name, held in replica.models.items():
            copies[name] = copies.get(name, 0) + (held.residence in _AT_HOME)
    return copies


def _model_of(status: ModelStatus) -> ReplicaModel | None:
    residence: Residence
    match status.state:
        case "resident" | "loading" | "unavailable":
            residence = status.state
        case _ if status.references:
            residence = "waiting"
        case "offloaded":
            residence = "offloaded"
        case _:
            return None
    return ReplicaModel(
        residence=residence,
        device_bytes=sum(status.bytes.values()),
        requests=status.references,
        last_used=status.last_used or 0.0,
        pinned=status.pinned,
    )


def _is_wanted_by_others(model: str, replica: Replica) -> bool:
    return any(held.residence == "waiting" and name != model for name, held in replica.models.items())


@functools.lru_cache(maxsize=65_536)
def _order(model: str, replica_id: str) -> int:
    """An order of the replicas that is another for each model, and the same in each process (`hash` is not)."""
    return zlib.crc32(f"{model} {replica_id}".encode())
