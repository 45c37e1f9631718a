"""The books of residency: what each model holds, who needs it, which moves, and whether one more would fit.

It decides nothing (see residency.py) and measures nothing (see memory.py). Owned by the synthesis thread alone.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import msgspec

from gpu_worker.engines.base import Memory
from gpu_worker.residency.moves import Place, Transition
from shared.catalog import ModelSpec
from shared.protocol import DeviceMemory


class ModelEntry:
    """The books of one model. Times are the clock's; `used_at` is Unix seconds.

    `wanted_turn` numbers the models in the order in which they began to be wanted;
    `short_since` is when this one first found no room since then, `retried` whether it ran out of memory since then.
    `progress` says how far it has come on its way.
    `trouble` is why it could not come the last time; where that was for lack of room, at `trouble_looked_at`.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.id = spec.id
        self.place: Place = "absent"
        self.memory = Memory()
        self._estimated_bytes = spec.estimated_bytes
        self.measured_bytes: int | None = None
        self.host_estimate: int | None = None
        self.references = 0
        self.asked: Literal["load", "unload"] | None = None
        self.wanted_turn = 0
        self.short_since: float | None = None
        self.pinned = False
        self.broken = False
        self.keep_alive_s: float | None = None
        self.last_used = 0.0
        self.used_at: float | None = None
        self.offloaded_since = 0.0
        self.retried = False
        self.progress = ""
        self.trouble = ""
        self.trouble_looked_at: float | None = None

    @property
    def device_bytes(self) -> int:
        """What it holds on the device."""
        return sum(self.memory.device.values())

    @property
    def host_bytes(self) -> int:
        """What it holds in host RAM."""
        return sum(self.memory.host.values())

    @property
    def device_estimate(self) -> int:
        """What it will hold on the device once it is there; a restore brings back what was measured."""
        if self.place == "offloaded" and self.measured_bytes is not None:
            return self.measured_bytes
        return self.load_estimate

    @property
    def load_estimate(self) -> int:
        """What it will hold on the device once it is loaded, wherever it is now.

        A load begins anew, with as many slots as there is room for: a size it had grown to must not forbid that.
        """
        if self.measured_bytes is None:
            return self._estimated_bytes
        return min(self.measured_bytes, self._estimated_bytes)

    @property
    def wanted(self) -> bool:
        """Whether it is to come to the device and is not there."""
        return self.place != "resident" and (self.references > 0 or self.asked == "load")

    @property
    def movable(self) -> bool:
        """Whether it may be taken away for the sake of others."""
        return self.references == 0 and not self.pinned and self.asked != "load"

    @property
    def offloaded_bytes(self) -> int:
        """Host RAM it will hold once offloaded, as last measured; before that, what it holds on the device."""
        return self.host_estimate if self.host_estimate is not None else self.device_bytes

    def measure(self, memory: Memory, now: float) -> None:
        """It holds `memory` where it is: what its next moves are reckoned by."""
        self.memory = memory
        if self.place == "resident":
            self.measured_bytes = self.device_bytes
        elif self.place == "offloaded":
            self.host_estimate = self.host_bytes
            self.offloaded_since = now


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model does not fit on the device as things are.

    `evictable` are the models whose leaving the device helps, `droppable` those whose leaving host RAM does,
    the least recently used first.
    `of_host_ram`: that is the device, and it is what is short, not a budget: only dropping gives any of it back.
    `curable`: it fits once they have left. `passing`: it fits once those that are now busy are idle and have left too.
    `message` has the figures.
    """

    evictable: list[ModelEntry]
    droppable: list[ModelEntry]
    of_host_ram: bool
    curable: bool
    passing: bool
    message: str


class ModelTable:
    """The accounts of all models, in the catalogue's order. `moving` is the move in flight."""

    def __init__(self, specs: Sequence[ModelSpec]) -> None:
        self._accounts = {spec.id: ModelEntry(spec) for spec in specs}
        self.moving: Transition | None = None

    def __getitem__(self, model: str) -> ModelEntry:
        return self._accounts[model]

    def __iter__(self) -> Iterator[ModelEntry]:
        return iter(self._accounts.values())

    def is_moving(self, account: ModelEntry) -> bool:
        """Whether the move in flight is the model's."""
        return self.moving is not None and self.moving.model == account.id

    def waiting(self) -> list[ModelEntry]:
        """The wanted models, the longest waiting first."""
        return sorted((account for account in self if account.wanted), key=lambda account: account.wanted_turn)

    def lru(self, place: Place) -> list[ModelEntry]:
        """The models in `place` that may be moved, the least recently used first."""
        there = (account for account in self if account.place == place and account.movable)
        return sorted(there, key=lambda account: account.last_used)

    def held_bytes(self, device: DeviceMemory) -> int:
        """Bytes that count against the budget: on a GPU all that this process holds of it.

        On a CPU what the models hold: the interpreter and its libraries are no part of the budget there.
        """
        return device.ours_bytes if device.kind == "cuda" else sum(account.device_bytes for account in self)

    def offloaded_bytes(self) -> int:
        """Host RAM that models hold."""
        return sum(account.host_bytes for account in self)

    def shortage(
        self, account: ModelEntry, device: DeviceMemory, spared: Collection[str] = (), *, anew: bool = False
    ) -> Shortage | None:
        """What keeps `account` from coming to the device, which reads as `device` now; None: nothing does.

        The models in `spared` are not to leave for it.
        `anew`: were it dropped from where it is, and loaded.
        """
        estimate = account.load_estimate if anew else account.device_estimate
        need = max(0, estimate - account.device_bytes)
        over_budget = self.held_bytes(device) + need - device.budget_bytes
        # On a CPU, weights that were offloaded lie in the same memory already.
        short = need - (account.host_bytes if device.kind == "cpu" else 0) - device.free_bytes
        if need == 0 or (over_budget <= 0 and short <= 0):
            return None
        evictable = [other for other in self.lru("resident") if other.device_bytes and other.id not in spared]
        droppable = [other for other in self.lru("offloaded") if other.host_bytes and device.kind == "cpu"]
        evictable_bytes = sum(other.device_bytes for other in evictable)
        droppable_bytes = sum(other.host_bytes for other in droppable)
        busy_bytes = sum(
            other.device_bytes for other in self if other.references and not other.pinned and other.id not in spared
        )
        curable = over_budget <= evictable_bytes and short <= evictable_bytes + droppable_bytes
        leaving = evictable_bytes + busy_bytes
        return Shortage(
            evictable=evictable,
            droppable=droppable,
            of_host_ram=device.kind == "cpu" and over_budget <= 0,
            curable=curable,
            passing=not curable and over_budget <= leaving and short <= leaving + droppable_bytes,
            message=self._arithmetic(account, need, device, evictable_bytes, spared),
        )

    def _arithmetic(
        self, account: ModelEntry, need: int, device: DeviceMemory, evictable_bytes: int, spared: Collection[str]
    ) -> str:
        holders = []
        for other in self:
            if other.device_bytes and other is not account:
                idle = "preloaded" if other.id in spared else "idle"
                why = "busy" if other.references else "pinned" if other.pinned else idle
                holders.append(f"{other.id} {_mib(other.device_bytes)} ({why})")
        return (
            f"{account.id} needs {_mib(need)} on the device. Of the budget of {_mib(device.budget_bytes)}, "
            f"{_mib(self.held_bytes(device))} are held ({', '.join(holders) or 'by no model'}), "
            f"and {_mib(device.free_bytes)} of the device are free; "
            f"evicting every {'other' if spared else 'idle'} model would give back {_mib(evictable_bytes)}, "
            "which is not enough."
        )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
