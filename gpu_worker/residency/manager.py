"""Which model is where, and which is to move next. Owned by the synthesis thread alone, so it needs no lock.

It takes what is asked for and what came of it, and puts its parts in order: who comes is decided in arrivals.py,
who leaves for others in room.py, whose time is over in cleanup.py, what is done with files in errands.py;
the books are in ledger.py. The loader moves, the probe measures.
None of them knows sockets, tensors or threads, and their time is clocks that are passed in.

    absent --load--> resident --offload--> offloaded --drop--> absent
                        ^-------restore-------'

A model with a reference (a request queued or running) is never moved away from the device, unless its engine broke.
One that cannot be restored for lack of room, but could be loaded, is dropped from host RAM for that.
One move is in flight at a time: each is decided on what was measured after the one before.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

from gpu_worker.engines.base import Memory
from gpu_worker.residency.arrivals import BUSY_RETRY_S, FULL_RETRY_S, Arrivals, Refusal
from gpu_worker.residency.cleanup import Cleanup, CleanupOptions
from gpu_worker.residency.errands import Errands
from gpu_worker.residency.ledger import ModelEntry, ModelTable
from gpu_worker.residency.memory import MemoryProbe
from gpu_worker.residency.moves import ARRIVES, Downloaded, Place, Transition, TransitionDone, TransitionFailed
from gpu_worker.residency.room import Room
from shared.catalog import ModelSpec
from shared.protocol import ModelStatus, State


class ModelBusyError(Exception):
    """The model has requests, so it is not moved."""


class Residency:
    """Where each model of `specs` is. `clock` gives monotonic seconds, `wall` Unix seconds.

    The synthesis loop calls `plan` in every turn, hands the moves to the loader and the refusals to the requests,
    and tells the outcome of each move with `moved` or `failed`.
    A model's requests may start only while its `state` is "resident". An unknown model is a KeyError everywhere.
    `errands`, `room` and `cleanup` are the parts that others talk to themselves.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        options: CleanupOptions,
        clock: Callable[[], float],
        probe: MemoryProbe,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ModelTable(specs)
        self._clock = clock
        self._wall = wall
        self.errands = Errands(self._ledger, clock)
        self.room = Room(self._ledger, probe, clock)
        self.cleanup = Cleanup(self._ledger, self.room, options, probe=probe, clock=clock, wall=wall)
        self._arrivals = Arrivals(self._ledger, self.errands, self.room, probe, clock)

    # --- what the synthesis loop tells -------------------------------------------------------------------------------

    def acquire(self, model: str) -> None:
        """A request needs the model, from now until `release`: it is brought to the device and not moved."""
        account = self._ledger[model]
        self._arrivals.want(account)
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
        self._arrivals.figures_changed()

    def pin(self, model: str, pinned: bool) -> None:  # noqa: FBT001 -- pin(model, True) reads as it says
        """Keep the model from being evicted wherever it is, or let it go again. Unloading by hand stays possible."""
        self._ledger[model].pinned = pinned
        self._arrivals.figures_changed()

    def preload(self, models: Sequence[str]) -> None:
        """Bring the models of the start to the device, in this order; none of them leaves for another of them."""
        self._arrivals.expect(models)
        for model in models:
            self.ask_load(model)

    def ask_load(self, model: str) -> None:
        """Bring the model to the device; done when its state is "resident", or at a Refusal."""
        account = self._ledger[model]
        self._arrivals.want(account)
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
        account.asked = "unload" if account.place != "absent" or self._ledger.is_moving(account) else None
        self._arrivals.expect_no_longer(model)

    def replace(self, model: str) -> None:
        """The model's engine is broken: drop it, whoever waits for the model, and load it afresh where anybody does."""
        self._ledger[model].broken = True
        self.errands.look_again(model)

    def fetched(self, fetched: Downloaded) -> Refusal | None:
        """A fetch has ended. Where it failed, the model's requests and calls are to fail with the Refusal."""
        self.errands.fetched(fetched)
        if fetched.error is None:
            return None
        account, error = self._ledger[fetched.model], fetched.error
        return self._arrivals.refuse(account, "model_unavailable", error.message, error.retry_after_s or FULL_RETRY_S)

    def set_progress(self, model: str, detail: str) -> None:
        """How far the model's loading or download has come, for people to read."""
        self._ledger[model].progress = detail

    def measured(self, model: str, memory: Memory) -> None:
        """What the model holds now (its caches grow with use); counts for its next load too."""
        account = self._ledger[model]
        if not self._ledger.is_moving(account) and account.place == "resident":
            account.measure(memory, self._clock())
            self._arrivals.figures_changed()

    # --- what it answers ---------------------------------------------------------------------------------------------

    def state(self, model: str) -> State:
        """Where the model is. One that is being taken away counts as gone already, so that nothing starts on it."""
        account = self._ledger[model]
        moving = self._ledger.moving
        if moving is not None and moving.model == model:
            arrives = ARRIVES[moving.kind]
            return "loading" if arrives == "resident" else arrives
        if account.broken:
            return "loading" if account.references else "absent"
        if account.place == "absent" and self.errands.problem(model):
            return "unavailable"
        if account.wanted and self.errands.is_fetching(model):
            return "loading"
        return account.place

    @property
    def moving(self) -> Transition | None:
        """The move in flight."""
        return self._ledger.moving

    @property
    def preloading(self) -> list[str]:
        """The models of the start that are still to come: not there yet, not refused, and not unloaded by hand."""
        return list(self._arrivals.expected)

    def is_settled(self, model: str) -> bool:
        """Whether the model is where its state says: not on its way, nor about to be dropped with its engine."""
        account = self._ledger[model]
        return not account.broken and not self._ledger.is_moving(account)

    def models(self) -> list[ModelStatus]:
        """Where every model is and what it holds, in the catalogue's order."""
        now = self._clock()
        return [
            ModelStatus(
                id=account.id,
                state=self.state(account.id),
                detail=self._detail(account),
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

    def offloaded_bytes(self) -> int:
        """Host RAM that offloaded models hold."""
        return self._ledger.offloaded_bytes()

    # --- deciding ----------------------------------------------------------------------------------------------------

    def plan(self) -> list[Transition | Refusal]:
        """What to do now: refusals to hand out, and at most one move to start; it is in flight from here on."""
        if self._ledger.moving is not None:
            return []
        self._arrivals.forget_shortages()
        refusals: list[Transition | Refusal] = []
        move = (
            self.cleanup.next_move()
            or self._unload()
            or self.room.next_leaving()
            or self._arrivals.next_move(refusals)
            or self.room.trim()
        )
        if move is not None:
            self._ledger.moving = move
            self._ledger[move.model].progress = ""
        return [*refusals, move] if move is not None else refusals

    def moved(self, done: TransitionDone) -> None:
        """The move in flight worked."""
        account = self._landed(done.move, ARRIVES[done.move.kind])
        account.measure(done.memory, self._clock())
        account.progress = ""
        if account.place == "resident":
            # Ready, not used: but an idle time that began before the load would end before the first request.
            account.last_used = self._clock()
            self._arrivals.arrived(account)

    def failed(self, failure: TransitionFailed) -> Refusal | None:
        """The move in flight did not work. With a Refusal the model's requests and calls are to fail.

        None: they keep waiting, or there are none. Out of memory is tried once more after evicting what is idle.
        """
        account = self._landed(failure.move, failure.left)
        account.progress = ""
        if account.place == "absent":
            account.memory = Memory()
        if ARRIVES[failure.move.kind] != "resident":
            return None
        if failure.error.code == "insufficient_vram" and not account.retried and self.room.make():
            account.retried = True
            return None
        code: Literal["insufficient_vram", "model_unavailable"] = (
            "insufficient_vram" if failure.error.code == "insufficient_vram" else "model_unavailable"
        )
        return self._arrivals.refuse(account, code, failure.error.message, failure.error.retry_after_s or BUSY_RETRY_S)

    def _unload(self) -> Transition | None:
        """Drop what was asked to be dropped, and what is broken."""
        for account in self._ledger:
            if account.broken:
                return Transition(model=account.id, kind="drop")
            if account.asked == "unload" and account.place == "absent":
                account.asked = None
            elif account.asked == "unload":
                return Transition(model=account.id, kind="drop")
        return None

    # --- the books ---------------------------------------------------------------------------------------------------

    def _detail(self, account: ModelEntry) -> str:
        """For people to read: how far the model has come on its way, or why it cannot come."""
        problem = self.errands.problem(account.id) if account.place == "absent" else ""
        return account.progress or problem or account.trouble

    def _used(self, account: ModelEntry) -> None:
        account.last_used = self._clock()
        account.used_at = self._wall()

    def _landed(self, move: Transition, place: Place) -> ModelEntry:
        if move != self._ledger.moving:
            raise ValueError(f"{move} is not in flight, but {self._ledger.moving}")
        self._ledger.moving = None
        self._arrivals.figures_changed()
        account = self._ledger[move.model]
        account.place = place
        account.broken = account.broken and place != "absent"
        return account
