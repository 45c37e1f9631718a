"""Residency: which model is where, and which moves next. Owned by the synthesis thread alone, so no locks.

`Residency` is the only writer of every ModelEntry. It decides nothing itself: policy.py says which transition is next.
It moves nothing itself: the mover and the checkpoint threads do, and their reports come back through `handle`.

One transition is in flight at a time, so each is decided on what was measured after the one before.
A model with a reference (a request queued or running) never leaves the device, unless its engine broke.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, assert_never

from gpu_worker.engines.base import Engine, Memory
from gpu_worker.residency import policy
from gpu_worker.residency.cleanup import Cleanup, ResidencyOptions
from gpu_worker.residency.memory import MemoryProbe
from gpu_worker.residency.models import (
    ARRIVING,
    MOVING,
    STATE_DURING,
    TARGET_STATE,
    CheckFiles,
    Download,
    Downloaded,
    FilesChecked,
    ModelEntry,
    ModelState,
    Progress,
    Refusal,
    Report,
    Transition,
    TransitionDone,
    TransitionFailed,
)
from gpu_worker.residency.statuses import status_of
from shared.catalog import ModelSpec
from shared.protocol import CleanupPass, ModelStatus

FILE_CHECK_S: Final = 5.0
"""How often the files of absent models are checked."""

SHORTAGE_RECHECK_S: Final = 0.2
"""How often the figures are read again while a model waits for room: NVML takes a millisecond."""

RECLAIM_S: Final = 5.0
"""How often at most caches are emptied for a model that finds no room."""


class ModelBusyError(Exception):
    """The model has requests, so it is not unloaded."""


class Residency:
    """The place of each of `specs`: on the device, in host RAM, or nowhere.

    `move` starts a transition, `see_to_files` a check or a download; both return at once.
    `clock` gives monotonic seconds, `wall` Unix seconds.
    The synthesis loop calls `advance` in every turn and passes every Report to `handle`.
    `engines` holds the engines of resident models: a request may start only on one of these.
    An unknown model is a KeyError everywhere.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        options: ResidencyOptions,
        *,
        probe: MemoryProbe,
        move: Callable[[Transition], None],
        see_to_files: Callable[[CheckFiles | Download], None],
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._entries = {spec.id: ModelEntry(id=spec.id, estimated_bytes=spec.estimated_bytes) for spec in specs}
        self._all = list(self._entries.values())
        self._engines: dict[str, Engine] = {}
        self._cleanup = Cleanup(options, probe, clock, wall)
        self._probe = probe
        self._move = move
        self._see_to_files = see_to_files
        self._clock = clock
        self._wall = wall
        self._queue_numbers = itertools.count(1)
        self._moving: Transition | None = None
        self._changed = True
        self._recheck_at = math.inf
        self._reclaimed_at = -math.inf
        self._files_checked_at = clock()

    # --- requests ----------------------------------------------------------------------------------------------------

    def acquire(self, model: str) -> None:
        """A request needs the model until `release` or `abandon`: load it if need be, and do not move it."""
        entry = self._entries[model]
        self._enqueue(entry)
        entry.references += 1
        if entry.requested == "unload":
            entry.requested = None
        self._changed = self._changed or entry.wanted
        self._touch(entry)

    def release(self, model: str, keep_alive_s: float | None) -> None:
        """A request that held a slot has ended; ValueError if the model has no reference.

        `keep_alive_s`: how long the model stays from now on; negative: until others need the room; 0: not at all;
        None: as configured.
        """
        self.abandon(model)
        self._entries[model].keep_alive_s = keep_alive_s

    def abandon(self, model: str) -> None:
        """A request has ended without a slot: it does not change how long the model stays."""
        entry = self._entries[model]
        if entry.references == 0:
            raise ValueError(f"{model} has no reference to release")
        entry.references -= 1
        self._changed = True
        self._touch(entry)

    def measured(self, model: str, memory: Memory) -> None:
        """Record what the model holds now, after a transition, or because its caches grew with use."""
        entry = self._entries[model]
        entry.memory = memory
        if entry.state is ModelState.RESIDENT:
            entry.measured_bytes = entry.device_bytes
        elif entry.state is ModelState.OFFLOADED:
            entry.measured_host_bytes = entry.host_bytes
            entry.offloaded_since = self._clock()
        self._changed = True

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines of resident models, without broken ones."""
        return self._engines

    # --- admin calls -------------------------------------------------------------------------------------------------

    def load(self, model: str, keep_alive_s: float | None = None) -> None:
        """Make the model resident; done when its status says "resident", or with a Refusal.

        `keep_alive_s` is as in `release`.
        """
        entry = self._entries[model]
        self._enqueue(entry)
        entry.requested = None if entry.state is ModelState.RESIDENT and not entry.broken else "load"
        entry.keep_alive_s = keep_alive_s
        self._changed = self._changed or entry.wanted
        self._touch(entry)

    def unload(self, model: str) -> None:
        """Drop the model from the device and host RAM; done when its status says "absent".

        ModelBusyError if the model has requests; a request that comes before the drop begins prevents it.
        """
        entry = self._entries[model]
        if entry.references:
            raise ModelBusyError(f"{model} has {entry.references} request(s), queued or running")
        entry.requested = None if entry.state is ModelState.ABSENT else "unload"
        entry.preload_pending = False
        self._changed = True

    def pin(self, model: str, pinned: bool) -> None:  # noqa: FBT001 -- pin(model, True) reads as it says
        """Keep the model from being evicted, or allow it again. An admin's unload stays possible."""
        self._entries[model].pinned = pinned
        self._changed = True

    def preload(self, models: Sequence[str]) -> None:
        """Load the models of the start in this order; none of them is evicted for another of them."""
        for model in models:
            entry = self._entries[model]
            entry.preload = entry.preload_pending = True
            self.load(model)

    def use(self, options: ResidencyOptions) -> None:
        """Work by other options, and by budgets of the probe that have changed, from the next turn on."""
        self._cleanup.use(options)
        self._changed = True

    def start_cleanup(self) -> None:
        """Run a cleanup pass now, also if `cleanup_enabled` is false."""
        self._cleanup.request()

    @property
    def cleanup_running(self) -> bool:
        """True if a cleanup pass is requested or under way."""
        return self._cleanup.running

    @property
    def last_cleanup(self) -> CleanupPass | None:
        """The result of the cleanup pass that ended last."""
        return self._cleanup.last

    # --- faults ------------------------------------------------------------------------------------------------------

    def replace_engine(self, model: str) -> None:
        """Drop the broken engine even if requests wait for the model; reload it if any do."""
        entry = self._entries[model]
        entry.broken = True
        entry.files.current = False
        self._engines.pop(model, None)
        self._changed = True

    def evict_idle(self) -> bool:
        """Evict every idle model, as the device ran out of memory; False if there is none.

        The caller tries once more when `evicting` is False again.
        """
        on_device = {ModelState.RESIDENT, ModelState.OFFLOADING, ModelState.DROPPING}
        victims = [entry for entry in self._all if entry.state in on_device and entry.evictable and entry.device_bytes]
        for entry in victims:
            entry.evict = True
        self._changed = True
        return bool(victims)

    @property
    def evicting(self) -> bool:
        """True if models marked by `evict_idle` are still on the device.

        False while another model arrives: an arrival takes seconds, and running streams must not wait for it.
        """
        arriving = self._moving is not None and STATE_DURING[self._moving.kind] in ARRIVING
        return not arriving and any(entry.evict for entry in self._all)

    # --- what dashboards and the loop read ---------------------------------------------------------------------------

    def status(self, model: str) -> ModelStatus:
        """The state of one model, and what it holds."""
        return status_of(self._entries[model], self._clock())

    def statuses(self) -> list[ModelStatus]:
        """The status of every model, in the catalogue's order."""
        return [self.status(model) for model in self._entries]

    def is_settled(self, model: str) -> bool:
        """True if the model's status will stay: no transition under way, and no broken engine about to be dropped."""
        entry = self._entries[model]
        return not entry.broken and entry.state not in MOVING

    @property
    def preloading(self) -> list[str]:
        """The models of the start that are still to come: neither resident yet, nor refused, nor unloaded by hand."""
        pending = (entry for entry in self._all if entry.preload_pending)
        return [entry.id for entry in sorted(pending, key=lambda entry: entry.queue_number)]

    def offloaded_bytes(self) -> int:
        """Bytes of host RAM that models hold."""
        return policy.offloaded_bytes(self._all)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def advance(self) -> list[Refusal]:
        """Start the file checks, the download and the one transition that are due; return the models to refuse.

        Cheap while nothing has changed: memory is read only after a change, and now and then while a model waits.
        """
        now = self._clock()
        overdue = now - self._files_checked_at >= FILE_CHECK_S
        if overdue:
            self._files_checked_at = now
        if overdue or self._changed:
            self._start_file_work(overdue=overdue)
        if self._moving is not None:
            return []
        if not (self._cleanup.begin_if_due(self._all) or self._changed or now >= self._recheck_at):
            return []
        return self._carry_out(self._plan(now), now)

    def handle(self, report: Report) -> Refusal | None:
        """Record what a thread reports. With a Refusal the model's requests and admin calls fail."""
        match report:
            case TransitionFailed():
                return self._transition_failed(report)
            case Downloaded():
                return self._downloaded(report)
            case TransitionDone():
                self._transition_done(report)
            case FilesChecked():
                self._files_checked(report)
            case Progress(model=model, detail=detail):
                self._entries[model].progress = detail
            case _:
                assert_never(report)
        return None

    def _start_file_work(self, *, overdue: bool) -> None:
        while pending := policy.pending_file_work(self._all, overdue=overdue):
            for work in pending:
                files = self._entries[work.model].files
                if isinstance(work, Download):
                    files.downloading = True
                else:
                    files.checking = True
                self._see_to_files(work)
            overdue = False

    def _plan(self, now: float) -> policy.Plan:
        """The plan for this turn. Caches are emptied before a model is refused, or waits, for lack of room."""
        self._clear_shortages(now)
        for entry in self._all:
            entry.evict = entry.evict and entry.state is ModelState.RESIDENT and entry.evictable
        plan = self._next_transition(now)
        if plan.short and now - self._reclaimed_at >= RECLAIM_S:
            self._reclaimed_at = now
            self._probe.reclaim(collect=False)
            plan = self._next_transition(now)
        return plan

    def _next_transition(self, now: float) -> policy.Plan:
        memory = policy.MemoryReading(device=self._probe.device(), host=self._probe.host())
        return policy.next_transition(self._all, memory, now, self._cleanup.idle_check())

    def _carry_out(self, plan: policy.Plan, now: float) -> list[Refusal]:
        for model in plan.short:
            entry = self._entries[model]
            entry.short_since = now if entry.short_since is None else entry.short_since
        for refusal in plan.refusals:
            self._refuse(refusal)
        self._cleanup.record(plan, self._all)
        self._changed = bool(plan.refusals)
        rechecks = [now + SHORTAGE_RECHECK_S] if plan.short else []
        rechecks += [
            entry.shortage_checked_at + policy.BUSY_RETRY_S
            for entry in self._all
            if entry.shortage_checked_at is not None
        ]
        self._recheck_at = min(rechecks, default=math.inf)
        if plan.transition is not None:
            self._start(plan.transition)
        return list(plan.refusals)

    def _start(self, transition: Transition) -> None:
        entry = self._entries[transition.model]
        entry.state = STATE_DURING[transition.kind]
        entry.progress = ""
        self._engines.pop(entry.id, None)
        self._moving = transition
        self._move(transition)

    # --- reports -----------------------------------------------------------------------------------------------------

    def _transition_done(self, done: TransitionDone) -> None:
        entry = self._end_transition(done.transition, TARGET_STATE[done.transition.kind])
        self.measured(entry.id, done.memory)
        if entry.state is not ModelState.RESIDENT:
            return
        if done.engine is not None:
            self._engines[entry.id] = done.engine
        # Ready, not used: but an idle time that began before the load would end before the first request.
        entry.last_used = self._clock()
        entry.requested = None if entry.requested == "load" else entry.requested
        entry.last_error, entry.shortage_checked_at = "", None
        device = self._probe.device()
        if entry.only_for_start and policy.held_bytes(self._all, device) > device.budget_bytes:
            entry.evict = True  # larger than estimated: this model leaves, not those that came before it
        entry.preload_pending = False

    def _transition_failed(self, failure: TransitionFailed) -> Refusal | None:
        """Out of memory is tried once more after evicting what is idle."""
        entry = self._end_transition(failure.transition, failure.state)
        if entry.state is ModelState.ABSENT:
            entry.memory = Memory()
        if TARGET_STATE[failure.transition.kind] is not ModelState.RESIDENT:
            return None
        out_of_memory = failure.error.code == "insufficient_vram"
        if out_of_memory and not entry.retried and self.evict_idle():
            entry.retried = True
            return None
        return self._refuse(
            Refusal(
                entry.id,
                "insufficient_vram" if out_of_memory else "model_unavailable",
                failure.error.message,
                failure.error.retry_after_s or policy.BUSY_RETRY_S,
            )
        )

    def _end_transition(self, transition: Transition, state: ModelState) -> ModelEntry:
        if transition != self._moving:
            raise ValueError(f"{transition} is not in flight, but {self._moving}")
        self._moving = None
        self._changed = True
        entry = self._entries[transition.model]
        entry.state = state
        entry.progress = ""
        if state is ModelState.ABSENT:
            entry.broken = False
            entry.requested = None if entry.requested == "unload" else entry.requested
        return entry

    def _files_checked(self, found: FilesChecked) -> None:
        self._changed = True
        entry = self._entries[found.model]
        files = entry.files
        if files.stamp not in {None, found.stamp} and entry.shortage_checked_at is None:
            entry.last_error = ""  # the error was about other files
        files.checking, files.current = False, True
        files.problem, files.remote, files.stamp = found.problem, found.remote, found.stamp

    def _downloaded(self, downloaded: Downloaded) -> Refusal | None:
        self._changed = True
        entry = self._entries[downloaded.model]
        entry.files.downloading = False
        entry.progress = ""
        error = downloaded.error
        if error is None:
            entry.files.remote = False
            return None
        entry.files.stamp = None  # a partial download has changed the files, and mends nothing
        return self._refuse(
            Refusal(entry.id, "model_unavailable", error.message, error.retry_after_s or policy.FULL_RETRY_S)
        )

    # --- entries -----------------------------------------------------------------------------------------------------

    def _enqueue(self, entry: ModelEntry) -> None:
        """Put the model at the end of the load queue, unless it is in the queue."""
        if not entry.wanted:
            entry.queue_number = next(self._queue_numbers)
            entry.short_since = None
            entry.retried = False
            entry.files.current = False

    def _refuse(self, refusal: Refusal) -> Refusal:
        """Forget that the model was wanted; its requests are ended by the caller."""
        entry = self._entries[refusal.model]
        entry.requested = None if entry.requested == "load" else entry.requested
        entry.retried = False
        entry.short_since = None
        entry.last_error = "" if entry.files.problem else refusal.message
        entry.shortage_checked_at = self._clock() if refusal.code == "insufficient_vram" else None
        entry.files.current = False
        entry.preload_pending = False
        self._changed = True
        return refusal

    def _clear_shortages(self, now: float) -> None:
        """Forget that a model found no room once it would find some."""
        for entry in self._all:
            if entry.shortage_checked_at is None or now - entry.shortage_checked_at < policy.BUSY_RETRY_S:
                continue
            entry.shortage_checked_at = now
            if policy.fits_again(entry, self._all, self._probe.device()):
                entry.last_error, entry.shortage_checked_at = "", None

    def _touch(self, entry: ModelEntry) -> None:
        entry.last_used = self._clock()
        entry.used_at = self._wall()
