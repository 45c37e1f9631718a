"""Which model is where, and which is to move next. Owned by the synthesis thread alone, so it needs no lock.

It decides and keeps the books; the loader moves, the probe measures.
It knows neither sockets, tensors, threads nor files, and its time is a clock that is passed in.

    absent --load--> resident --offload--> offloaded --drop--> absent
                        ^-------restore-------'

A model with a reference (a request queued or running) is never moved away from the device.
One move is in flight at a time: each is decided on what was measured after the one before.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from gpu_worker.engines.base import Memory
from gpu_worker.ledger import Account, Ledger
from gpu_worker.memory import MemoryProbe
from gpu_worker.moves import ARRIVES, Move, MoveDone, MoveFailed, Place
from shared.catalog import ModelSpec
from shared.protocol import CleanupPass, HostMemory, ModelState, State

BUSY_RETRY_S: Final = 5.0
"""Retry-After of a load that fits once models that now speak are idle: a request takes seconds."""

FULL_RETRY_S: Final = 60.0
"""Retry-After of a load that needs somebody to give memory back, unpin a model or raise the budget."""


class ModelBusyError(Exception):
    """The model has requests, so it is not moved."""


class ResidencyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """When models that nobody uses leave; the byte budgets are the probe's to know.

    Idle for `idle_timeout_s`, a model leaves the device for host RAM; there for `host_idle_timeout_s`, it leaves that.
    Both are checked every `cleanup_interval_s`, unless not `cleanup_enabled`.
    """

    idle_timeout_s: float = 300.0
    host_idle_timeout_s: float = 3600.0
    cleanup_interval_s: float = 30.0
    cleanup_enabled: bool = True


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A wanted model cannot be brought to the device now: its requests and calls are to fail with this.

    `code` is `insufficient_vram` (the message has the arithmetic) or `model_unavailable`.
    It is repeated by every `plan` while the model still has references.
    """

    model: str
    code: Literal["insufficient_vram", "model_unavailable"]
    message: str
    retry_after_s: float


class _Pass:
    """A cleanup pass under way: what is still to look at, and what was unloaded."""

    def __init__(self, timestamp: float, before_bytes: int, checked: list[str]) -> None:
        self.timestamp = timestamp
        self.before_bytes = before_bytes
        self.checked = checked
        self.rest = list(checked)
        self.unloaded: list[str] = []


class Residency:
    """Where each model of `specs` is. `clock` gives monotonic seconds, `wall` Unix seconds.

    The synthesis loop calls `plan` in every turn, hands its moves to the loader and its refusals to the requests,
    and tells the outcome of each move with `moved` or `failed`.
    A model's requests may start only while its `state` is "resident". An unknown model is a KeyError everywhere.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        options: ResidencyOptions,
        clock: Callable[[], float],
        probe: MemoryProbe,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = Ledger(specs)
        self._options = options
        self._clock = clock
        self._wall = wall
        self._probe = probe
        self._moving: Move | None = None
        self._room: list[str] = []
        self._check_budget = False
        self._cleanup_asked = False
        self._pass: _Pass | None = None
        self._next_cleanup = clock() + options.cleanup_interval_s
        self.last_cleanup: CleanupPass | None = None

    # --- what the synthesis loop tells -------------------------------------------------------------------------------

    def acquire(self, model: str) -> None:
        """A request needs the model, from now until `release`: it is brought to the device and not moved."""
        account = self._ledger[model]
        self._want(account)
        account.references += 1
        if account.asked == "unload":
            account.asked = None
        self._used(account)

    def release(self, model: str, keep_alive_s: float | None) -> None:
        """That request is over, however it ended; ValueError where there was none.

        `keep_alive_s`: how long the model stays from now on if nobody else asks: negative: until others need the room;
        0: not at all; None: as configured.
        """
        account = self._ledger[model]
        if account.references == 0:
            raise ValueError(f"{model} has no reference to release")
        account.references -= 1
        account.keep_alive_s = keep_alive_s
        self._used(account)
        self._check_budget = True

    def pin(self, model: str, pinned: bool) -> None:  # noqa: FBT001 -- pin(model, True) reads as it says
        """Keep the model from being evicted wherever it is, or let it go again. Unloading by hand stays possible."""
        self._ledger[model].pinned = pinned
        self._check_budget = True

    def ask_load(self, model: str) -> None:
        """Bring the model to the device; done when its state is "resident", or at a Refusal."""
        account = self._ledger[model]
        self._want(account)
        account.asked = "load" if account.place != "resident" or self._is_moving(account) else None
        account.keep_alive_s = None
        self._used(account)

    def ask_unload(self, model: str) -> None:
        """Drop the model from the device and host RAM; done when its state is "absent".

        ModelBusyError where it has requests; one that comes before the drop began prevents it.
        """
        account = self._ledger[model]
        if account.references:
            raise ModelBusyError(f"{model} has {account.references} request(s), queued or running")
        account.asked = "unload" if account.place != "absent" or self._is_moving(account) else None

    def set_unavailable(self, model: str, reason: str) -> None:
        """The model cannot be loaded (its weights are not there), or can again where `reason` is empty."""
        self._ledger[model].unavailable = reason

    def set_detail(self, model: str, detail: str) -> None:
        """How far the model's loading or download has come, for people to read."""
        self._ledger[model].detail = detail

    def measured(self, model: str, memory: Memory) -> None:
        """What the model holds now (its caches grow with use); counts for its next load too."""
        account = self._ledger[model]
        if not self._is_moving(account) and account.place == "resident":
            self._measure(account, memory)

    def start_cleanup(self) -> None:
        """Run an eviction pass now, whether or not they run on their own; `last_cleanup` is its result.

        It is there as soon as `cleaning` is False again.
        """
        self._cleanup_asked = self._cleanup_asked or self._pass is None

    def make_room(self, n_bytes: int | None = None) -> bool:
        """The device ran out of memory: evict idle models, at least `n_bytes` of them or all.

        False where there is nothing to evict; else the caller tries once more when `making_room` is False again.
        """
        freed = 0
        for account in self._ledger.lru("resident"):
            if n_bytes is not None and freed >= n_bytes:
                break
            if account.device_bytes and account.id not in self._room:
                self._room.append(account.id)
            freed += account.device_bytes
        return bool(self._room)

    # --- what it answers ---------------------------------------------------------------------------------------------

    def state(self, model: str) -> State:
        """Where the model is. One that is being taken away counts as gone already, so that nothing starts on it."""
        account = self._ledger[model]
        if self._moving is not None and self._moving.model == model:
            arrives = ARRIVES[self._moving.kind]
            return "loading" if arrives == "resident" else arrives
        if account.place == "absent" and account.unavailable:
            return "unavailable"
        return account.place

    @property
    def moving(self) -> Move | None:
        """The move in flight."""
        return self._moving

    @property
    def cleaning(self) -> bool:
        """Whether a cleanup pass is asked for or under way."""
        return self._cleanup_asked or self._pass is not None

    @property
    def making_room(self) -> bool:
        """Whether idle models are still being evicted for `make_room`."""
        return bool(self._room)

    def wait_s(self) -> float | None:
        """Seconds until `plan` may decide something although nothing happened; None: never."""
        if not self._options.cleanup_enabled:
            return None
        return max(0.0, self._next_cleanup - self._clock())

    def models(self) -> list[ModelState]:
        """Where every model is and what it holds, in the catalogue's order."""
        now = self._clock()
        return [
            ModelState(
                id=account.id,
                state=self.state(account.id),
                detail=account.detail or account.unavailable,
                bytes=account.memory.device,
                host_bytes=account.host_bytes,
                last_used=account.used_at,
                idle_s=now - account.last_used if account.used_at is not None and not account.references else None,
                references=account.references,
                pinned=account.pinned,
                keep_alive_s=account.keep_alive_s,
            )
            for account in self._ledger
        ]

    def host(self) -> HostMemory:
        """Host RAM as the probe measures it, and what offloaded models hold of it."""
        return msgspec.structs.replace(self._probe.host(), offloaded_bytes=self._ledger.offloaded_bytes())

    # --- deciding ----------------------------------------------------------------------------------------------------

    def plan(self) -> list[Move | Refusal]:
        """What to do now: refusals to hand out, and at most one move to start; it is in flight from here on."""
        if self._moving is not None:
            return []
        if self._options.cleanup_enabled and self._clock() >= self._next_cleanup:
            self._cleanup_asked = True
        refusals: list[Move | Refusal] = []
        move = self._unload() or self._clean() or self._evict_for_room() or self._bring(refusals) or self._trim()
        if move is not None:
            self._moving = move
            self._ledger[move.model].detail = ""
        return [*refusals, move] if move is not None else refusals

    def moved(self, done: MoveDone) -> None:
        """The move in flight worked."""
        account = self._landed(done.move, ARRIVES[done.move.kind])
        self._measure(account, done.memory)
        account.detail = ""
        if account.place == "resident":
            # Ready, not used: but an idle time that began before the load would end before the first request.
            account.last_used = self._clock()
            account.retried = False
            account.asked = None if account.asked == "load" else account.asked

    def failed(self, failure: MoveFailed) -> Refusal | None:
        """The move in flight did not work. With a Refusal the model's requests and calls are to fail.

        None: they keep waiting, or there are none. Out of memory is tried once more after evicting what is idle.
        """
        account = self._landed(failure.move, failure.left)
        account.detail = failure.error.message
        if account.place == "absent":
            account.memory = Memory()
        if ARRIVES[failure.move.kind] != "resident":
            return None
        if failure.error.code == "insufficient_vram" and not account.retried and self.make_room():
            account.retried = True
            return None
        code: Literal["insufficient_vram", "model_unavailable"] = (
            "insufficient_vram" if failure.error.code == "insufficient_vram" else "model_unavailable"
        )
        return self._refuse(account, code, failure.error.message, failure.error.retry_after_s or BUSY_RETRY_S)

    def _unload(self) -> Move | None:
        """Drop what was asked to be dropped."""
        for account in self._ledger:
            if account.asked == "unload" and account.place == "absent":
                account.asked = None
            elif account.asked == "unload":
                return Move(model=account.id, kind="drop")
        return None

    def _clean(self) -> Move | None:
        """The next move of the cleanup pass; a pass with none left ends."""
        now = self._clock()
        if self._cleanup_asked and self._pass is None:
            self._cleanup_asked = False
            self._next_cleanup = now + self._options.cleanup_interval_s
            checked = [account.id for account in self._ledger if account.place != "absent"]
            self._pass = _Pass(self._wall(), self._probe.device().ours_bytes, checked)
        current = self._pass
        if current is None:
            return None
        while current.rest:
            account = self._ledger[current.rest[0]]
            move = self._outlived(account, now)
            if move is None or move.model == account.id:
                current.rest.pop(0)
            if move is not None:
                current.unloaded.append(move.model)
                return move
        self._pass = None
        self.last_cleanup = CleanupPass(
            timestamp=current.timestamp,
            vram_before_bytes=current.before_bytes,
            vram_after_bytes=self._probe.device().ours_bytes,
            models_checked=current.checked,
            models_unloaded=list(dict.fromkeys(current.unloaded)),
        )
        return None

    def _outlived(self, account: Account, now: float) -> Move | None:
        """How to evict `account`, where its time is over."""
        if not account.movable or (account.keep_alive_s is not None and account.keep_alive_s < 0):
            return None
        if account.place == "offloaded" and now - account.offloaded_since >= self._options.host_idle_timeout_s:
            return Move(model=account.id, kind="drop")
        keep_s = self._options.idle_timeout_s if account.keep_alive_s is None else account.keep_alive_s
        if account.place == "resident" and now - account.last_used >= keep_s:
            return self._evict(account)
        return None

    def _evict_for_room(self) -> Move | None:
        """Evict for `make_room`."""
        while self._room:
            account = self._ledger[self._room[0]]
            if account.place == "resident" and account.movable:
                return self._evict(account)
            self._room.pop(0)
        return None

    def _bring(self, refusals: list[Move | Refusal]) -> Move | None:
        """The next move towards a wanted model, the longest waiting first; what cannot come goes to `refusals`."""
        for account in sorted(self._ledger, key=lambda account: account.wanted_since):
            if not account.wanted:
                continue
            if account.place == "absent" and account.unavailable:
                refusals.append(self._refuse(account, "model_unavailable", account.unavailable, FULL_RETRY_S))
                continue
            decision = self._fit(account)
            if isinstance(decision, Move):
                return decision
            refusals.append(decision)
        return None

    def _fit(self, account: Account) -> Move | Refusal:
        """Bring the model to the device, or evict what has to leave before, or say why that does not help."""
        device = self._probe.device()
        shortage = self._ledger.shortage(account, device)
        if shortage is None:
            return Move(model=account.id, kind="load" if account.place == "absent" else "restore")
        if not shortage.curable:
            retry_after_s = BUSY_RETRY_S if shortage.passing else FULL_RETRY_S
            return self._refuse(account, "insufficient_vram", shortage.message, retry_after_s)
        if device.kind == "cpu" and shortage.over_budget <= 0:
            # Host RAM is the device: only dropping gives any of it back.
            return Move(model=[*shortage.droppable, *shortage.evictable][0].id, kind="drop")
        return self._evict(shortage.evictable[0])

    def _trim(self) -> Move | None:
        """Evict what asked not to be kept, and what a budget has no room for after all."""
        for account in self._ledger.lru("resident"):
            if account.keep_alive_s == 0:
                return self._evict(account)
        if not self._check_budget:
            return None
        device = self._probe.device()
        if self._ledger.held_bytes(device) > device.budget_bytes:
            for account in self._ledger.lru("resident"):
                if account.device_bytes:
                    return self._evict(account)
        if self._ledger.offloaded_bytes() > self._probe.host().budget_bytes:
            for account in self._ledger.lru("offloaded"):
                if account.host_bytes:
                    return Move(model=account.id, kind="drop")
        self._check_budget = False
        return None

    def _evict(self, account: Account) -> Move:
        """The move that takes `account` from the device: to host RAM where there is room or an older model makes it."""
        offload = Move(model=account.id, kind="offload")
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
            return Move(model=older[0].id, kind="drop")
        return Move(model=account.id, kind="drop")

    # --- the books ---------------------------------------------------------------------------------------------------

    def _want(self, account: Account) -> None:
        if not account.wanted:
            account.wanted_since = self._clock()

    def _used(self, account: Account) -> None:
        account.last_used = self._clock()
        account.used_at = self._wall()

    def _is_moving(self, account: Account) -> bool:
        return self._moving is not None and self._moving.model == account.id

    def _measure(self, account: Account, memory: Memory) -> None:
        account.memory = memory
        if account.place == "resident":
            account.device_estimate = account.device_bytes
        elif account.place == "offloaded":
            account.host_estimate = account.host_bytes
            account.offloaded_since = self._clock()
        self._check_budget = True

    def _landed(self, move: Move, place: Place) -> Account:
        if move != self._moving:
            raise ValueError(f"{move} is not in flight, but {self._moving}")
        self._moving = None
        account = self._ledger[move.model]
        account.place = place
        return account

    def _refuse(
        self,
        account: Account,
        code: Literal["insufficient_vram", "model_unavailable"],
        message: str,
        retry_after_s: float,
    ) -> Refusal:
        account.asked = None if account.asked == "load" else account.asked
        account.retried = False
        return Refusal(model=account.id, code=code, message=message, retry_after_s=retry_after_s)
