"""Who leaves so that there is room, and whether for host RAM or for good.

It does not decide who is to come (see arrivals.py) nor whose time is over (see cleanup.py),
and takes nothing from a model with a reference, nor from a pinned one.
Owned by the synthesis thread alone; its time is a clock that is passed in.
"""

import math
from collections.abc import Callable, Collection
from typing import Final

from gpu_worker.residency.ledger import ModelEntry, ModelTable, Shortage
from gpu_worker.residency.memory import MemoryProbe
from gpu_worker.residency.moves import ARRIVES, Transition

RECLAIM_S: Final = 5.0
"""How often at most caches are emptied for a model that finds no room."""


class Room:
    """The room for the models of `ledger`, as `probe` measures it: each move is decided on what is there then."""

    def __init__(self, ledger: ModelTable, probe: MemoryProbe, clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._probe = probe
        self._clock = clock
        self._leaving: list[str] = []
        self._check_budgets = False
        self._reclaimed_at = -math.inf

    def make(self) -> bool:
        """The device ran out of memory: every idle model is to leave it.

        False where there is none; else the caller tries once more when `making` is False again.
        """
        evictable = [account.id for account in self._ledger.lru("resident") if account.device_bytes]
        self._leaving += [model for model in evictable if model not in self._leaving]
        return bool(evictable)

    @property
    def making(self) -> bool:
        """Whether idle models are being evicted for `make`.

        Not while a model is on its way to the device: that takes seconds, and who speaks is not to wait for it.
        """
        coming = self._ledger.moving is not None and ARRIVES[self._ledger.moving.kind] == "resident"
        return bool(self._leaving) and not coming

    def leave(self, account: ModelEntry) -> None:
        """`account` is to leave the device, unless somebody needs it before its turn has come."""
        self._leaving.append(account.id)

    def check_budgets(self) -> None:
        """A model may leave, or has another size, that was not so before: `trim` is to read the figures again."""
        self._check_budgets = True

    def shortage(self, account: ModelEntry, spared: Collection[str]) -> Shortage | None:
        """What keeps `account` from coming, though caches were emptied for it; the models in `spared` stay."""
        shortage = self._ledger.shortage(account, self._probe.device(), spared)
        now = self._clock()
        if shortage is None or shortage.curable or now - self._reclaimed_at < RECLAIM_S:
            return shortage
        self._reclaimed_at = now
        self._probe.reclaim(collect=False)
        return self._ledger.shortage(account, self._probe.device(), spared)

    def loads_anew(self, account: ModelEntry, shortage: Shortage, spared: Collection[str]) -> bool:
        """Whether the offloaded `account`, which `shortage` keeps from being restored for good, could be loaded.

        Its slots are as many as there was room for at its last load; a load takes as many as there is room for now.
        """
        if account.place != "offloaded" or shortage.curable or shortage.passing:
            return False
        anew = self._ledger.shortage(account, self._probe.device(), spared, anew=True)
        return anew is None or anew.curable or anew.passing

    def cure(self, shortage: Shortage) -> Transition:
        """The next move against a curable `shortage`."""
        if shortage.of_host_ram:
            return Transition(model=[*shortage.droppable, *shortage.evictable][0].id, kind="drop")
        return self.evict(shortage.evictable[0])

    def next_leaving(self) -> Transition | None:
        """The next move of what is to leave by `make` or `leave`."""
        while self._leaving:
            account = self._ledger[self._leaving[0]]
            if account.place == "resident" and account.movable:
                return self.evict(account)
            self._leaving.pop(0)
        return None

    def trim(self) -> Transition | None:
        """The next move of what asked not to be kept, and of what a budget has no room for after all."""
        for account in self._ledger.lru("resident"):
            if account.keep_alive_s == 0:
                return self.evict(account)
        if not self._check_budgets:
            return None
        device = self._probe.device()
        if self._ledger.held_bytes(device) > device.budget_bytes:
            for account in self._ledger.lru("resident"):
                if account.device_bytes:
                    return self.evict(account)
        if self._ledger.offloaded_bytes() > self._probe.host().budget_bytes:
            for account in self._ledger.lru("offloaded"):
                if account.host_bytes:
                    return Transition(model=account.id, kind="drop")
        self._check_budgets = False
        return None

    def evict(self, account: ModelEntry) -> Transition:
        """The move that takes `account` from the device: to host RAM where there is room or an older model makes it."""
        offload = Transition(model=account.id, kind="offload")
        more = account.offloaded_bytes - account.host_bytes
        host = self._probe.host()
        short = self._ledger.offloaded_bytes() + more - host.budget_bytes
        if self._probe.device().kind != "cpu":
            short = max(short, more - host.free_bytes)
        if more <= 0 or short <= 0:
            return offload
        older = [
            other
            for other in self._ledger.lru("offloaded")
            if other.host_bytes and other.last_used <= account.last_used
        ]
        if short <= sum(other.host_bytes for other in older):
            return Transition(model=older[0].id, kind="drop")
        return Transition(model=account.id, kind="drop")
