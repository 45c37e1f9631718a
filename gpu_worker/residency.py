"""Which model is where, and which is to move next. Owned by the synthesis thread alone, so it needs no lock.

It decides and keeps the books; the loader moves, the probe measures.
It knows neither sockets, tensors, threads nor files, and its time is a clock that is passed in.

    absent --load--> resident --offload--> offloaded --drop--> absent
                        ^-------restore-------'

A model with a reference (a request queued or running) is never moved away from the device, unless its engine broke.
One move is in flight at a time: each is decided on what was measured after the one before.
Beside the moves, files are looked at and fetched: before every load, and to notice what comes and goes by itself.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from gpu_worker.engines.base import Memory
from gpu_worker.ledger import Account, Ledger
from gpu_worker.memory import MemoryProbe
from gpu_worker.moves import ARRIVES, Fetch, Fetched, Look, Looked, Move, MoveDone, MoveFailed, Place
from shared.catalog import ModelSpec
from shared.protocol import CleanupPass, HostMemory, ModelState, State

BUSY_RETRY_S: Final = 5.0
"""Retry-After of a load that fits once models that now speak are idle: a request takes seconds.

So often at most the figures are read again for a model that found no room, and caches emptied for one that finds none.
"""

FULL_RETRY_S: Final = 60.0
"""Retry-After of a load that needs somebody to give memory back, unpin a model or raise the budget."""


ROOM_WAIT_S: Final = 30.0
"""How long a model that would fit if busy ones were idle waits for that before its requests are refused."""

ROOM_LOOK_S: Final = 0.2
"""How often the figures are read meanwhile, beside every time that a model becomes idle: NVML takes a millisecond."""

LOOK_S: Final = 5.0
"""How often the files of models that are not loaded are looked at: weights are copied in and deleted by hand."""


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
    """A cleanup pass under way: what is still to look at, and what was unloaded, of that `dropped` from host RAM too.

    `by_hand`: somebody asked for it.
    """

    def __init__(self, timestamp: float, before_bytes: int, checked: list[str], *, by_hand: bool) -> None:
        self.timestamp = timestamp
        self.before_bytes = before_bytes
        self.checked = checked
        self.by_hand = by_hand
        self.rest = list(checked)
        self.unloaded: list[str] = []
        self.dropped: list[str] = []


class Residency:
    """Where each model of `specs` is. `clock` gives monotonic seconds, `wall` Unix seconds.

    The synthesis loop calls `errands` and `plan` in every turn,
    hands the errands to the fetcher, the moves to the loader and the refusals to the requests,
    and tells the outcome of each with `looked`, `fetched`, `moved` or `failed`.
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
        self._turns = itertools.count(1)
        self._of_the_start: list[str] = []
        self._preloading: list[str] = []
        self._room: list[str] = []
        self._check_budget = False
        self._cleanup_asked = False
        self._pass: _Pass | None = None
        self._next_cleanup = clock() + options.cleanup_interval_s
        self._next_look = clock() + LOOK_S
        self._room_looked_at = -math.inf
        self._reclaimed_at = -math.inf
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
        """That request has spoken, to its end or not; ValueError where there was none.

        `keep_alive_s`: how long the model stays from now on if nobody else asks: negative: until others need the room;
        0: not at all; None: as configured.
        """
        self.abandon(model)
        self._ledger[model].keep_alive_s = keep_alive_s

    def abandon(self, model: str) -> None:
        """That request is over without having spoken, so how long the model stays is still what others said."""
        account = self._ledger[model]
        if account.references == 0:
            raise ValueError(f"{model} has no reference to release")
        account.references -= 1
        self._used(account)
        self._figures_changed()

    def pin(self, model: str, pinned: bool) -> None:  # noqa: FBT001 -- pin(model, True) reads as it says
        """Keep the model from being evicted wherever it is, or let it go again. Unloading by hand stays possible."""
        self._ledger[model].pinned = pinned
        self._figures_changed()

    def preload(self, models: Sequence[str]) -> None:
        """Bring the models of the start to the device, in this order; none of them leaves for another of them."""
        self._of_the_start = list(models)
        self._preloading = list(models)
        for model in models:
            self.ask_load(model)

    def ask_load(self, model: str) -> None:
        """Bring the model to the device; done when its state is "resident", or at a Refusal."""
        account = self._ledger[model]
        self._want(account)
        account.asked = "load" if account.place != "resident" or not self.is_settled(model) else None
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
        self._preloaded(model)

    def replace(self, model: str) -> None:
        """The model's engine is broken: drop it, whoever waits for the model, and load it afresh where anybody does."""
        account = self._ledger[model]
        account.broken = True
        account.looked = False

    def looked(self, found: Looked) -> None:
        """What there is of the model's files."""
        account = self._ledger[found.model]
        account.looking = False
        account.looked = True
        account.unavailable = found.problem
        account.remote = found.remote
        if account.stamp not in {None, found.stamp} and account.trouble_looked_at is None:
            account.trouble = ""  # it was with other files
        account.stamp = found.stamp

    def fetched(self, fetched: Fetched) -> Refusal | None:
        """The model's files are here, or cannot be had: with a Refusal its requests and calls are to fail."""
        account = self._ledger[fetched.model]
        account.fetching = False
        account.progress = ""
        if fetched.error is None:
            account.remote = False
            return None
        account.stamp = None  # what was fetched in part has changed it, and mends nothing
        return self._refuse(
            account, "model_unavailable", fetched.error.message, fetched.error.retry_after_s or FULL_RETRY_S
        )

    def set_progress(self, model: str, detail: str) -> None:
        """How far the model's loading or download has come, for people to read."""
        self._ledger[model].progress = detail

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

    def make_room(self) -> bool:
        """The device ran out of memory: evict every idle model.

        False where there is nothing to evict; else the caller tries once more when `making_room` is False again.
        """
        evictable = [account.id for account in self._ledger.lru("resident") if account.device_bytes]
        self._room += [model for model in evictable if model not in self._room]
        return bool(evictable)

    # --- what it answers ---------------------------------------------------------------------------------------------

    def state(self, model: str) -> State:
        """Where the model is. One that is being taken away counts as gone already, so that nothing starts on it."""
        account = self._ledger[model]
        if self._moving is not None and self._moving.model == model:
            arrives = ARRIVES[self._moving.kind]
            return "loading" if arrives == "resident" else arrives
        if account.broken:
            return "loading" if account.references else "absent"
        if account.place == "absent" and account.unavailable:
            return "unavailable"
        if account.fetching and account.wanted:
            return "loading"
        return account.place

    @property
    def moving(self) -> Move | None:
        """The move in flight."""
        return self._moving

    @property
    def preloading(self) -> list[str]:
        """The models of the start that are still to come: not there yet, not refused, and not unloaded by hand."""
        return list(self._preloading)

    def is_settled(self, model: str) -> bool:
        """Whether the model is where its state says: not on its way, nor about to be dropped with its engine."""
        account = self._ledger[model]
        return not account.broken and not self._is_moving(account)

    @property
    def cleaning(self) -> bool:
        """Whether a cleanup pass is asked for or under way."""
        return self._cleanup_asked or self._pass is not None

    @property
    def making_room(self) -> bool:
        """Whether idle models are being evicted for `make_room`.

        Not while a model is on its way to the device: that takes seconds, and who speaks is not to wait for it.
        """
        coming = self._moving is not None and ARRIVES[self._moving.kind] == "resident"
        return bool(self._room) and not coming

    def models(self) -> list[ModelState]:
        """Where every model is and what it holds, in the catalogue's order."""
        now = self._clock()
        return [
            ModelState(
                id=account.id,
                state=self.state(account.id),
                detail=account.detail,
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

    def errands(self) -> list[Look | Fetch]:
        """What is to be done with files now, whatever moves; in flight from here on, one fetch at a time."""
        overdue = self._clock() >= self._next_look
        if overdue:
            self._next_look = self._clock() + LOOK_S
        errands: list[Look | Fetch] = []
        for account in self._ledger:
            wanted = account.wanted and not account.looked
            idle = not (account.looking or account.fetching or self._is_moving(account))
            if account.place == "absent" and idle and (overdue or wanted):
                account.looking = True
                errands.append(Look(account.id))
        if not any(account.fetching for account in self._ledger):
            for account in self._waiting():
                if account.place == "absent" and account.looked and account.remote:
                    account.fetching = True
                    errands.append(Fetch(account.id))
                    break
        return errands

    def plan(self) -> list[Move | Refusal]:
        """What to do now: refusals to hand out, and at most one move to start; it is in flight from here on."""
        if self._moving is not None:
            return []
        self._forget_shortages()
        refusals: list[Move | Refusal] = []
        move = self._clean() or self._unload() or self._evict_for_room() or self._bring(refusals) or self._trim()
        if move is not None:
            self._moving = move
            self._ledger[move.model].progress = ""
        return [*refusals, move] if move is not None else refusals

    def moved(self, done: MoveDone) -> None:
        """The move in flight worked."""
        account = self._landed(done.move, ARRIVES[done.move.kind])
        self._measure(account, done.memory)
        account.progress = ""
        if account.place == "resident":
            # Ready, not used: but an idle time that began before the load would end before the first request.
            account.last_used = self._clock()
            account.asked = None if account.asked == "load" else account.asked
            account.trouble, account.trouble_looked_at = "", None
            device = self._probe.device()
            if self._is_preload(account) and self._ledger.held_bytes(device) > device.budget_bytes:
                self._room.append(account.id)  # larger than thought: it leaves, and not those that came before it
            self._preloaded(account.id)

    def failed(self, failure: MoveFailed) -> Refusal | None:
        """The move in flight did not work. With a Refusal the model's requests and calls are to fail.

        None: they keep waiting, or there are none. Out of memory is tried once more after evicting what is idle.
        """
        account = self._landed(failure.move, failure.left)
        account.progress = ""
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
        """Drop what was asked to be dropped, and what is broken."""
        for account in self._ledger:
            if account.broken:
                return Move(model=account.id, kind="drop")
            if account.asked == "unload" and account.place == "absent":
                account.asked = None
            elif account.asked == "unload":
                return Move(model=account.id, kind="drop")
        return None

    def _clean(self) -> Move | None:
        """The next move of the cleanup pass; a pass with none left ends."""
        now = self._clock()
        due = self._options.cleanup_enabled and now >= self._next_cleanup
        if self._pass is None and (due or self._cleanup_asked):
            checked = [account.id for account in self._ledger if account.place != "absent"]
            before_bytes = self._probe.device().ours_bytes
            self._pass = _Pass(self._wall(), before_bytes, checked, by_hand=self._cleanup_asked)
            self._cleanup_asked = False
            self._next_cleanup = now + self._options.cleanup_interval_s
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
                if move.kind == "drop":
                    current.dropped.append(move.model)
                return move
        self._pass = None
        speaking = any(account.references for account in self._ledger)
        if not current.unloaded and (current.by_hand or not speaking):
            # Every move gives caches back, but there was none; who speaks would have to allocate them again.
            self._probe.reclaim(collect=False)
        self.last_cleanup = CleanupPass(
            timestamp=current.timestamp,
            vram_before_bytes=current.before_bytes,
            vram_after_bytes=self._probe.device().ours_bytes,
            models_checked=current.checked,
            models_unloaded=list(dict.fromkeys(current.unloaded)),
            models_dropped=current.dropped,
        )
        return None

    def _outlived(self, account: Account, now: float) -> Move | None:
        """How to evict `account`, where its time is over."""
        kept = account.keep_alive_s is not None and account.keep_alive_s < 0
        if not account.movable or kept or account.broken or account.asked == "unload":
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
        now = self._clock()
        looks = now - self._room_looked_at >= ROOM_LOOK_S
        for account in self._waiting():
            if account.place == "absent" and (not account.looked or account.fetching):
                continue
            if account.place == "absent" and account.unavailable:
                message = f"{account.id}: {account.unavailable}"
                refusals.append(self._refuse(account, "model_unavailable", message, FULL_RETRY_S))
                continue
            if (account.place == "absent" and account.remote) or (account.short_since is not None and not looks):
                continue
            decision = self._fit(account, now)
            if isinstance(decision, Move):
                return decision
            if decision is not None:
                refusals.append(decision)
            self._room_looked_at = now
        return None

    def _fit(self, account: Account, now: float) -> Move | Refusal | None:
        """Bring the model to the device, or evict what has to leave before, or say why that does not help.

        None: it waits for busy models to become idle.
        """
        spared = self._of_the_start if self._is_preload(account) else ()
        device = self._probe.device()
        shortage = self._ledger.shortage(account, device, spared)
        if shortage is not None and not shortage.curable and now - self._reclaimed_at >= BUSY_RETRY_S:
            self._reclaimed_at = now
            self._probe.reclaim(collect=False)
            device = self._probe.device()
            shortage = self._ledger.shortage(account, device, spared)
        if shortage is None:
            return Move(model=account.id, kind="load" if account.place == "absent" else "restore")
        if not shortage.curable:
            if account.short_since is None:
                account.short_since = now
            if shortage.passing and now - account.short_since < ROOM_WAIT_S:
                return None
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

    def _forget_shortages(self) -> None:
        """A model that found no room is in no trouble any more once there is some, or idle models would make it."""
        now = self._clock()
        for account in self._ledger:
            if account.trouble_looked_at is not None and now - account.trouble_looked_at >= BUSY_RETRY_S:
                shortage = self._ledger.shortage(account, self._probe.device())
                account.trouble_looked_at = now
                if shortage is None or shortage.curable:
                    account.trouble, account.trouble_looked_at = "", None

    # --- the books ---------------------------------------------------------------------------------------------------

    def _waiting(self) -> list[Account]:
        """The wanted models, the longest waiting first."""
        return sorted((account for account in self._ledger if account.wanted), key=lambda account: account.wanted_turn)

    def _is_preload(self, account: Account) -> bool:
        """Whether nobody but the start wants the model."""
        return account.id in self._preloading and account.references == 0

    def _preloaded(self, model: str) -> None:
        """The start does not wait for the model any longer."""
        if model in self._preloading:
            self._preloading.remove(model)

    def _want(self, account: Account) -> None:
        if not account.wanted:
            account.wanted_turn = next(self._turns)
            account.short_since = None
            account.looked = False
            account.retried = False

    def _used(self, account: Account) -> None:
        account.last_used = self._clock()
        account.used_at = self._wall()

    def _figures_changed(self) -> None:
        """A model may be evicted, or has another size, that was not so before: the figures are to be read again."""
        self._check_budget = True
        self._room_looked_at = -math.inf

    def _is_moving(self, account: Account) -> bool:
        return self._moving is not None and self._moving.model == account.id

    def _measure(self, account: Account, memory: Memory) -> None:
        account.memory = memory
        if account.place == "resident":
            account.measured_bytes = account.device_bytes
        elif account.place == "offloaded":
            account.host_estimate = account.host_bytes
            account.offloaded_since = self._clock()
        self._figures_changed()

    def _landed(self, move: Move, place: Place) -> Account:
        if move != self._moving:
            raise ValueError(f"{move} is not in flight, but {self._moving}")
        self._moving = None
        self._figures_changed()
        account = self._ledger[move.model]
        account.place = place
        account.broken = account.broken and place != "absent"
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
        account.looked = False
        account.short_since = None
        account.trouble = "" if account.unavailable else message
        account.trouble_looked_at = self._clock() if code == "insufficient_vram" else None
        self._figures_changed()
        self._preloaded(account.id)
        return Refusal(model=account.id, code=code, message=message, retry_after_s=retry_after_s)
