"""Cleanup passes: when one runs, which models it has yet to check, and what came of it.

policy.py decides which idle models leave, manager.py starts the transitions; Cleanup writes no ModelEntry.
"""

from collections.abc import Callable, Sequence

import msgspec

from gpu_worker.residency.memory import MemoryProbe
from gpu_worker.residency.models import ModelEntry, ModelState, Transition
from gpu_worker.residency.policy import IdleCheck, Plan
from shared.protocol import CleanupPass


class ResidencyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The times after which idle models leave; byte budgets belong to the probe.

    Idle for `idle_timeout_s`, a model leaves the device for host RAM; there for `host_idle_timeout_s`, it is dropped.
    A cleanup pass checks both every `cleanup_interval_s`, unless `cleanup_enabled` is false.
    """

    idle_timeout_s: float = 300.0
    host_idle_timeout_s: float = 3600.0
    cleanup_interval_s: float = 30.0
    cleanup_enabled: bool = True


class Cleanup:
    """One pass at a time, every interval or on request. `clock` gives monotonic seconds, `wall` Unix seconds.

    `last` is the result of the pass that ended last.
    """

    def __init__(
        self,
        options: ResidencyOptions,
        probe: MemoryProbe,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._options = options
        self._probe = probe
        self._clock = clock
        self._wall = wall
        self._requested = False  # by an admin
        self._pass: CleanupPass | None = None
        self._transitions: list[Transition] = []
        self._next_at = clock() + options.cleanup_interval_s
        self.last: CleanupPass | None = None

    def use(self, options: ResidencyOptions) -> None:
        """Work by other options from now on; the next pass comes no later than they say."""
        self._options = options
        self._next_at = min(self._next_at, self._clock() + options.cleanup_interval_s)

    def request(self) -> None:
        """Run a pass now, also if `cleanup_enabled` is false. A pass under way serves this request as well."""
        self._requested = True

    @property
    def running(self) -> bool:
        """True if a pass is requested or under way."""
        return self._requested or self._pass is not None

    def begin_if_due(self, entries: Sequence[ModelEntry]) -> bool:
        """Begin a pass over every model that is not absent, if one is due; returns whether one is under way."""
        due = self._options.cleanup_enabled and self._clock() >= self._next_at
        if self._pass is None and (due or self._requested):
            checked = [entry.id for entry in entries if entry.state is not ModelState.ABSENT]
            self._pass = CleanupPass(
                timestamp=self._wall(),
                vram_before_bytes=self._probe.device().ours_bytes,
                vram_after_bytes=0,
                models_checked=checked,
                models_unloaded=[],
            )
            self._transitions = []
            self._next_at = self._clock() + self._options.cleanup_interval_s
        return self._pass is not None

    def idle_check(self) -> IdleCheck:
        """The models that the pass under way may still move, each at most once, and how long a model may be idle."""
        moved = {transition.model for transition in self._transitions}
        checked = self._pass.models_checked if self._pass is not None else []
        return IdleCheck(
            models=[model for model in checked if model not in moved],
            timeout_s=self._options.idle_timeout_s,
            host_timeout_s=self._options.host_idle_timeout_s,
        )

    def record(self, plan: Plan, entries: Sequence[ModelEntry]) -> None:
        """Note what `plan` does for the pass. A plan with no transition of the pass ends the pass."""
        if self._pass is None:
            return
        if plan.by_cleanup and plan.transition is not None:
            self._transitions.append(plan.transition)
            return
        busy = any(entry.references for entry in entries)
        if not self._transitions and (self._requested or not busy):
            # Every transition empties caches, but there was none; running streams would have to allocate them again.
            self._probe.reclaim(collect=False)
        self.last = msgspec.structs.replace(
            self._pass,
            vram_after_bytes=self._probe.device().ours_bytes,
            models_unloaded=list(dict.fromkeys(transition.model for transition in self._transitions)),
            models_dropped=[transition.model for transition in self._transitions if transition.kind == "drop"],
        )
        self._pass, self._requested = None, False
