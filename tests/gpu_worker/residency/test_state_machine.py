"""Residency under events in any order: invariants that hold at every step, and what holds at rest.

The machine knows what the outside knows: who asked for what, what the device holds, and which transition is in flight.
Which model ought to move is test_policy.py's business; here it only must not break anything.
"""

import math
from collections.abc import Collection
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_worker.engines.base import JobError
from gpu_worker.residency import ModelBusyError, Refusal, TransitionFailed
from gpu_worker.residency.manager import SHORTAGE_RECHECK_S
from gpu_worker.residency.models import ARRIVING, STATE_DURING, TARGET_STATE, ModelState, Transition
from gpu_worker.residency.policy import SHORTAGE_WAIT_S
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench

SIZES = {"a": 60, "b": 80, "c": 40, "tiny": 0}
MODELS = st.sampled_from(sorted(SIZES))
WAITS = st.sampled_from([0.5, 5.0, 30.0, 90.0])
KEEP_ALIVES = st.sampled_from([None, None, -1.0, 0.0, 3.0, 60.0])
IDLE_S, HOST_IDLE_S, INTERVAL_S = 40.0, 100.0, 10.0


class ResidencyMachine(RuleBasedStateMachine):
    """Requests, admin calls, broken engines, failing transitions, vanishing files and other processes, in any order."""

    @initialize(
        kind=st.sampled_from(["cuda", "cpu"]),
        budgets=st.tuples(st.sampled_from([80, 110, 140, 170, 300]), st.sampled_from([0, 50, 120, 150, 1_000])),
        spare=st.sampled_from([0, 30, 1_000]),
        error=st.sampled_from([0, 0, -10, 20]),
        enabled=st.booleans(),
        preload=st.lists(MODELS, unique=True, max_size=3),
    )
    def begin(
        self,
        kind: Literal["cuda", "cpu"],
        budgets: tuple[int, int],
        spare: int,
        error: int,
        preload: list[str],
        *,
        enabled: bool,
    ) -> None:
        """A device and a host with room for some of the models; a model takes `error` more than was estimated."""
        budget, host_budget = budgets
        self.device = FakeDevice(
            kind=kind, total_bytes=budget + spare, budget_bytes=budget, host_budget_bytes=host_budget
        )
        self.bench = Bench(
            SIZES,
            self.device,
            idle_timeout_s=IDLE_S,
            host_idle_timeout_s=HOST_IDLE_S,
            cleanup_interval_s=INTERVAL_S,
            cleanup_enabled=enabled,
        )
        self.residency = self.bench.residency
        self.enabled = enabled
        self.fresh = {model: n_bytes + error if n_bytes else 0 for model, n_bytes in SIZES.items()}
        self.bench.sizes = dict(self.fresh)
        self.state = dict.fromkeys(SIZES, ModelState.ABSENT)
        self.in_flight: Transition | None = None
        self.references = dict.fromkeys(SIZES, 0)
        self.pinned: set[str] = set()
        self.requested = set(preload)
        self.unloading: set[str] = set()
        self.broken: set[str] = set()
        self.used_at = dict.fromkeys(SIZES, -math.inf)
        self.keep_alive_s: dict[str, float | None] = dict.fromkeys(SIZES)
        self.wanted_since: dict[str, float] = {}
        self.residency.preload(preload)

    # --- events from outside -----------------------------------------------------------------------------------------

    @rule(model=MODELS)
    def request(self, model: str) -> None:
        """A request arrives."""
        self.residency.acquire(model)
        self.references[model] += 1
        self.unloading.discard(model)
        self._touch(model)

    @precondition(lambda self: any(self.references.values()))
    @rule(data=st.data(), keep_alive_s=KEEP_ALIVES, held_slot=st.booleans())
    def end(self, data: st.DataObject, keep_alive_s: float | None, *, held_slot: bool) -> None:
        """A request ends, after it held a slot or before."""
        model = data.draw(st.sampled_from([model for model, count in self.references.items() if count]))
        if held_slot and self.state[model] is ModelState.RESIDENT:
            self.residency.release(model, keep_alive_s)
            self.keep_alive_s[model] = keep_alive_s
        else:
            self.residency.abandon(model)
        self.references[model] -= 1
        self._touch(model)

    @rule(seconds=WAITS)
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.bench.clock.advance(seconds)

    @rule(model=MODELS, pinned=st.booleans())
    def pin(self, model: str, *, pinned: bool) -> None:
        """An admin pins a model or unpins it."""
        self.residency.pin(model, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(model)

    @rule(model=MODELS)
    def load(self, model: str) -> None:
        """An admin loads a model."""
        self.residency.load(model)
        if self.state[model] is not ModelState.RESIDENT or model in self.broken or self._moves(model):
            self.requested.add(model)
        self.unloading.discard(model)
        self.keep_alive_s[model] = None
        self._touch(model)

    @rule(model=MODELS)
    def unload(self, model: str) -> None:
        """An admin unloads a model, which is refused exactly while requests hold it."""
        if self.references[model]:
            with pytest.raises(ModelBusyError):
                self.residency.unload(model)
            return
        self.residency.unload(model)
        assert model not in self.residency.preloading
        self.requested.discard(model)
        if self.state[model] is not ModelState.ABSENT or self._moves(model):
            self.unloading.add(model)

    @rule()
    def cleanup(self) -> None:
        """An admin asks for a cleanup pass."""
        self.residency.start_cleanup()

    @rule()
    def out_of_memory(self) -> None:
        """A step ran out of device memory."""
        assert self.residency.evict_idle() or not self._evictable()

    @precondition(lambda self: self.in_flight is None)  # during a load it would run out of memory
    @rule(taken=st.sampled_from([0, 20, 60]))
    def others(self, taken: int) -> None:
        """Another process takes free device memory or gives it back; Residency notices within a moment."""
        self.device.others_bytes = min(taken, self.device.device().free_bytes + self.device.others_bytes)
        self.bench.clock.advance(2 * SHORTAGE_RECHECK_S)

    @rule(model=MODELS, more=st.sampled_from([-20, 10, 30]))
    def grow(self, model: str, more: int) -> None:
        """A resident model's caches grow or shrink with use."""
        size = self.bench.sizes[model]
        if self.state[model] is not ModelState.RESIDENT or self._moves(model) or not size:
            return
        self.bench.sizes[model] = size + max(-size // 2, min(more, self.device.device().free_bytes))
        self.residency.measured(model, self.device.put(model, ModelState.RESIDENT, self.bench.sizes[model]))

    @rule(model=MODELS)
    def break_engine(self, model: str) -> None:
        """A resident model's engine breaks."""
        if self.residency.status(model).state == "resident":
            self.residency.replace_engine(model)
            self.broken.add(model)

    @rule(model=MODELS, where=st.sampled_from(["here", "here", "remote", "missing"]))
    def files(self, model: str, where: str) -> None:
        """A model's files come or go."""
        self.bench.problems.pop(model, None)
        self.bench.remote.discard(model)
        if where == "missing":
            self.bench.problems[model] = "its weights are not there"
        elif where == "remote":
            self.bench.remote.add(model)

    @precondition(lambda self: self.bench.downloading)
    @rule(works=st.booleans())
    def end_download(self, *, works: bool) -> None:
        """A download ends."""
        (model,) = self.bench.downloading
        refusal = self.bench.downloaded(model, None if works else JobError("model_unavailable", "no hub"))
        assert (refusal is None) == works
        if refusal is not None:
            self._refused(refusal)

    # --- the worker and the mover ------------------------------------------------------------------------------------

    @rule()
    def advance(self) -> None:
        """The loop asks Residency to go on."""
        self._advance()

    @precondition(lambda self: self.in_flight is not None)
    @rule(works=st.sampled_from([True, True, True, False]), out_of_memory=st.booleans())
    def end_transition(self, *, works: bool, out_of_memory: bool) -> None:
        """The transition in flight ends."""
        self._end_transition(works=works, out_of_memory=out_of_memory)

    @rule(failing=st.sets(st.integers(0, 3), max_size=2), out_of_memory=st.booleans())
    def settle(self, failing: Collection[int], *, out_of_memory: bool) -> None:
        """Nothing else happens until Residency comes to rest; some of the transitions fail."""
        for turn in range(12 * len(SIZES)):
            if self.in_flight is not None:
                self._end_transition(works=turn not in failing, out_of_memory=out_of_memory)
            elif not self._advance() and not self.residency.cleanup_running:
                self._check_rest()
                return
        raise AssertionError("it does not come to rest")

    @rule(seconds=WAITS)
    def idle(self, seconds: float) -> None:
        """Time passes in which nothing happens but what the clock brings about."""
        self.bench.clock.advance(seconds)
        self.settle((), out_of_memory=False)
        if self.enabled and seconds >= INTERVAL_S:
            self._check_idle_models_left()

    # --- invariants --------------------------------------------------------------------------------------------------

    @invariant()
    def statuses_are_true(self) -> None:
        """The status of a model is where it is, what it holds there, and who uses it."""
        for status in self.residency.statuses():
            model, state = status.id, self.state[status.id]
            assert (status.references, status.pinned) == (self.references[model], model in self.pinned)
            assert status.keep_alive_s == self.keep_alive_s[model]
            ready = state is ModelState.RESIDENT and model not in self.broken and not self._moves(model)
            assert (status.state == "resident") == ready, "a request could start on a model that is not ready"
            if self._moves(model):
                arriving = self.in_flight is not None and STATE_DURING[self.in_flight.kind] in ARRIVING
                assert (status.state == "loading") == arriving
                continue
            assert sum(status.bytes.values()) == self.device.on_device.get(model, 0)
            assert status.host_bytes == self.device.on_host.get(model, 0)
            assert self.residency.is_settled(model) == (model not in self.broken)
        ready = {status.id for status in self.residency.statuses() if status.state == "resident"}
        assert self.residency.engines.keys() == ready, "only resident models have an engine to start on"
        assert self.residency.offloaded_bytes() == sum(status.host_bytes for status in self.residency.statuses())

    # --- steps and their checks --------------------------------------------------------------------------------------

    def _advance(self) -> list[Any]:
        decisions = self.bench.advance()
        for decision in decisions:
            if isinstance(decision, Refusal):
                self._check_refusal(decision)
                self._refused(decision)
            else:
                assert self.in_flight is None, "a second transition was started beside the one in flight"
                self._check_transition(decision)
                self.in_flight = decision
        now = self.bench.clock.now
        self.wanted_since = {
            model: self.wanted_since.get(model, now)
            for model in SIZES
            if self._wanted(model) and not self._waits_for_files(model) and self.in_flight is None
        }
        return decisions

    def _check_transition(self, transition: Transition) -> None:
        """Only the unused leave, only the wanted arrive, and only where there is room."""
        model, state = transition.model, self.state[transition.model]
        if TARGET_STATE[transition.kind] is ModelState.RESIDENT:
            assert transition.kind == {ModelState.ABSENT: "load", ModelState.OFFLOADED: "restore"}[state]
            assert self._wanted(model), "nobody wants it"
            assert not self._waits_for_files(model)
            return
        assert state is ModelState.RESIDENT or (transition.kind, state) == ("drop", ModelState.OFFLOADED)
        if model in self.broken or model in self.unloading:
            assert transition.kind == "drop"
        elif state is ModelState.OFFLOADED and self._wanted(model):
            pass  # dropped from host RAM, to be loaded with fewer slots
        else:
            assert not self.references[model], "a model with requests leaves"
            assert model not in self.pinned, "a pinned model leaves"
            assert model not in self.requested, "a model that an admin loads leaves"
        if transition.kind == "offload":
            held = sum(n_bytes for other, n_bytes in self.device.on_host.items() if other != model)
            assert held <= self.device.host_budget_bytes

    def _check_refusal(self, refusal: Refusal) -> None:
        """A model is refused only while it is wanted and not there, with the reason that is true."""
        model = refusal.model
        assert self._wanted(model)
        if refusal.code == "model_unavailable":
            assert self.state[model] is ModelState.ABSENT
            assert self.bench.found[model].problem
            return
        free = self.device.budget_bytes - sum(self.device.on_device.values()) if self.device.kind == "cuda" else 0
        needs = min(SIZES[model], self.bench.sizes[model])
        assert min(free, self.device.device().free_bytes) < needs, "it would have fitted as it is"

    def _check_rest(self) -> None:
        """At rest, nothing that was asked for is left undone without a reason."""
        assert not self.broken
        assert not self.residency.evicting
        assert not self.unloading, "an unload was forgotten"
        for model, since in self.wanted_since.items():
            assert self.bench.clock.now - since <= SHORTAGE_WAIT_S, f"{model} waits for ever"
        for model in SIZES:
            if self.state[model] is ModelState.RESIDENT and self._may_leave(model):
                assert self.keep_alive_s[model] != 0, f"{model} was not to stay"
        if sum(self.device.on_device.values()) > self.device.budget_bytes:
            assert not self._evictable(), "the device's budget is exceeded, but need not be"
        if sum(self.device.on_host.values()) > self.device.host_budget_bytes:
            assert not any(self._may_leave(model) for model, n_bytes in self.device.on_host.items() if n_bytes)

    def _check_idle_models_left(self) -> None:
        """After a cleanup pass no unused model is resident past its time."""
        for model in SIZES:
            keep_s = IDLE_S if self.keep_alive_s[model] is None else self.keep_alive_s[model]
            assert keep_s is not None
            if self.state[model] is ModelState.RESIDENT and keep_s >= 0 and self._may_leave(model):
                assert self.bench.clock.now - self.used_at[model] < keep_s + INTERVAL_S, f"{model} is idle"

    def _end_transition(self, *, works: bool, out_of_memory: bool) -> None:
        transition, self.in_flight = self.in_flight, None
        assert transition is not None
        model, target = transition.model, TARGET_STATE[transition.kind]
        if transition.kind == "load":
            self.bench.sizes[model] = self.fresh[model]
        own_host = self.device.on_host.get(model, 0) if self.device.kind == "cpu" else 0
        arrives = target is ModelState.RESIDENT
        if arrives and self.bench.sizes[model] > self.device.device().free_bytes + own_host:
            works, out_of_memory = False, True
        if works or transition.kind == "drop":
            self.state[model] = target
            self.bench.finish(transition)
            if arrives:
                self.requested.discard(model)
                self.used_at[model] = self.bench.clock.now
        else:
            if transition.kind == "offload":
                self.state[model] = ModelState.ABSENT  # a failed offload gives the model up
                self.device.put(model, ModelState.ABSENT, 0)
            code = "insufficient_vram" if out_of_memory else "model_unavailable"
            refusal = self.residency.handle(
                TransitionFailed(transition=transition, error=JobError(code, "it broke"), state=self.state[model])
            )
            assert arrives or refusal is None
            if refusal is not None:
                assert (refusal.model, refusal.code) == (model, code)
                self._refused(refusal)
            else:
                assert not arrives or out_of_memory, "a transition that will not work is tried again"
        if self.state[model] is ModelState.ABSENT:
            self.unloading.discard(model)
            self.broken.discard(model)

    def _refused(self, refusal: Refusal) -> None:
        """The worker ends the requests of a refused model."""
        model = refusal.model
        self.requested.discard(model)
        self.wanted_since.pop(model, None)
        while self.references[model]:
            self.residency.abandon(model)
            self.references[model] -= 1
            self._touch(model)

    # --- what the outside knows --------------------------------------------------------------------------------------

    def _moves(self, model: str) -> bool:
        return self.in_flight is not None and self.in_flight.model == model

    def _wanted(self, model: str) -> bool:
        return self.state[model] is not ModelState.RESIDENT and (self.references[model] > 0 or model in self.requested)

    def _may_leave(self, model: str) -> bool:
        return not self.references[model] and model not in self.pinned and model not in self.requested

    def _evictable(self) -> set[str]:
        return {model for model, n_bytes in self.device.on_device.items() if n_bytes and self._may_leave(model)}

    def _waits_for_files(self, model: str) -> bool:
        found = self.bench.found.get(model)
        absent = self.state[model] is ModelState.ABSENT
        return absent and (model in self.bench.downloading or found is None or found.remote or bool(found.problem))

    def _touch(self, model: str) -> None:
        self.used_at[model] = self.bench.clock.now


TestResidencyMachine = pytest.mark.slow(ResidencyMachine.TestCase)
TestResidencyMachine.settings = settings(
    stateful_step_count=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
