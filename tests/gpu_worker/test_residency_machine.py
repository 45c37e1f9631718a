"""Which model is where, whatever happens in whatever order: the invariants of residency, on a fake clock."""

import math
from collections.abc import Collection
from typing import Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_worker.moves import ARRIVES, Move, Place
from gpu_worker.residency import ModelBusyError, Refusal
from tests.gpu_worker.fakes import Bench, FakeDevice, done, failed

SIZES = {"a": 100, "b": 70, "c": 40, "d": 0}
MODELS = st.sampled_from(sorted(SIZES))
WAITS = st.sampled_from([0.5, 5.0, 30.0, 90.0])
KEEP_ALIVES = st.sampled_from([None, None, -1.0, 0.0, 3.0, 60.0])
IDLE_S, HOST_IDLE_S, INTERVAL_S = 30.0, 90.0, 5.0


class ResidencyMachine(RuleBasedStateMachine):
    """Requests, time, hands and failures in any order, against a device that keeps the true count.

    What the machine knows of references, pins and use it notes itself; it never looks inside the residency.
    """

    @initialize(
        kind=st.sampled_from(["cuda", "cpu"]),
        budget=st.sampled_from([80, 110, 140, 170]),
        host_budget=st.sampled_from([0, 50, 120, 1_000, 1_000]),
        spare=st.sampled_from([0, 30, 1_000]),
        enabled=st.booleans(),
    )
    def begin(self, kind: Literal["cuda", "cpu"], budget: int, host_budget: int, spare: int, *, enabled: bool) -> None:
        """A device with room for some of the models, and a host with room for some of those that left."""
        device = FakeDevice(kind=kind, total_bytes=budget + spare, budget_bytes=budget, host_budget_bytes=host_budget)
        self.bench = Bench(
            SIZES,
            device,
            idle_timeout_s=IDLE_S,
            host_idle_timeout_s=HOST_IDLE_S,
            cleanup_interval_s=INTERVAL_S,
            cleanup_enabled=enabled,
        )
        self.enabled = enabled
        self.device = device
        self.residency = self.bench.residency
        self.references = dict.fromkeys(SIZES, 0)
        self.pinned: set[str] = set()
        self.used = dict.fromkeys(SIZES, -math.inf)
        self.keep: dict[str, float | None] = dict.fromkeys(SIZES)
        self.place: dict[str, Place] = dict.fromkeys(SIZES, "absent")
        self.moving: Move | None = None
        self.asked: set[str] = set()
        self.unloading: set[str] = set()
        self.arrivals = 0
        self.departures = 0

    # --- what happens from outside ---

    @rule(model=MODELS)
    def request(self, model: str) -> None:
        """A request arrives."""
        self.residency.acquire(model)
        self.references[model] += 1
        self.unloading.discard(model)
        self.used[model] = self.bench.clock.now

    @precondition(lambda self: any(self.references.values()))
    @rule(data=st.data(), keep_alive_s=KEEP_ALIVES)
    def end(self, data: st.DataObject, keep_alive_s: float | None) -> None:
        """A request ends, spoken or cancelled."""
        model = data.draw(st.sampled_from([model for model, count in self.references.items() if count]))
        self._release(model, keep_alive_s)

    @rule(seconds=WAITS)
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.bench.clock.advance(seconds)

    @rule(model=MODELS, pinned=st.booleans())
    def pin(self, model: str, *, pinned: bool) -> None:
        """Somebody pins a model, or lets it go."""
        self.residency.pin(model, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(model)

    @rule(model=MODELS)
    def load(self, model: str) -> None:
        """Somebody loads a model by hand."""
        self.residency.ask_load(model)
        leaving = self.moving is not None and self.moving.model == model
        if self.place[model] != "resident" or leaving:
            self.asked.add(model)
        self.unloading.discard(model)
        self.used[model] = self.bench.clock.now
        self.keep[model] = None

    @rule(model=MODELS)
    def unload(self, model: str) -> None:
        """Somebody unloads a model by hand, which is refused exactly while it has requests."""
        if self.references[model]:
            with pytest.raises(ModelBusyError):
                self.residency.ask_unload(model)
        else:
            self.residency.ask_unload(model)
            self.asked.discard(model)
            self.unloading.add(model)

    @rule()
    def cleanup(self) -> None:
        """Somebody asks for a pass."""
        self.residency.start_cleanup()

    @rule()
    def out_of_memory(self) -> None:
        """A step ran out of memory."""
        self.residency.make_room()

    @precondition(lambda self: self.moving is None)  # during a load it would run out of memory, which is a failed move
    @rule(taken=st.sampled_from([0, 20, 60]))
    def others(self, taken: int) -> None:
        """Another process takes device memory, or gives it back; never what is not free."""
        free_without = self.device.device().free_bytes + self.device.others_bytes
        self.device.others_bytes = min(taken, free_without)

    # --- what the worker and the loader do ---

    @precondition(lambda self: self.moving is None)
    @rule()
    def plan(self) -> None:
        """The loop asks what to do; it fails the requests of refused models, and hands the move to the loader."""
        self._plan()

    @rule(failing=st.sets(st.integers(0, 3), max_size=2), out_of_memory=st.booleans())
    def quiet(self, failing: set[int], *, out_of_memory: bool) -> None:
        """Nothing else happens until everything that was to be done is done; some of the moves do not work."""
        self._settle(failing, out_of_memory=out_of_memory)

    @rule(model=MODELS, keep_alive_s=KEEP_ALIVES)
    def speak(self, model: str, keep_alive_s: float | None) -> None:
        """A request comes, is spoken if it is not refused, and ends."""
        self.request(model)
        self._settle()
        if self.references[model]:
            self.bench.clock.advance(1)
            self._release(model, keep_alive_s)

    @rule(seconds=WAITS)
    def idle(self, seconds: float) -> None:
        """Time passes in which nothing happens but what the clock brings about."""
        self.bench.clock.advance(seconds)
        self._settle()

    @precondition(lambda self: self.moving is not None)
    @rule(works=st.sampled_from([True, True, True, False]), out_of_memory=st.booleans())
    def end_move(self, *, works: bool, out_of_memory: bool) -> None:
        """The loader reports."""
        assert self.residency.plan() == [], "a second move was started beside the one in flight"
        self._end_move(works=works, out_of_memory=out_of_memory)

    # --- what must hold ---

    @invariant()
    def within_budget(self) -> None:
        """Bytes are never over a budget, nor over what there is."""
        assert sum(self.device.on_device.values()) <= self.device.budget_bytes
        assert sum(self.device.on_host.values()) <= self.device.host_budget_bytes
        assert self.device.device().free_bytes >= 0

    @invariant()
    def figures_are_true(self) -> None:
        """What is told of each model is where it is, what it holds there and who uses it."""
        for state in self.residency.models():
            assert state.references == self.references[state.id] >= 0
            assert state.pinned == (state.id in self.pinned)
            if self.moving is None or self.moving.model != state.id:
                assert state.state == self.place[state.id]
                assert sum(state.bytes.values()) == self.device.on_device.get(state.id, 0)
                assert state.host_bytes == self.device.on_host.get(state.id, 0)
            elif ARRIVES[self.moving.kind] == "resident":
                assert state.state == "loading"
            else:
                assert state.state != "resident", "a request could start on a model that is leaving"

    @invariant()
    def loads_are_paired(self) -> None:
        """Every arrival is followed by one departure at most, and what is there is what arrived and did not leave."""
        there = sum(place == "resident" for place in self.place.values())
        leaving = self.moving is not None and self.place[self.moving.model] == "resident"
        assert self.arrivals - self.departures == there - leaving

    def teardown(self) -> None:
        """In the end nobody has starved, and everything that was loaded can leave."""
        if not hasattr(self, "bench"):
            return
        self._settle()
        for model in SIZES:
            while self.references[model]:
                self._release(model, None)
            self.residency.pin(model, False)
            self.residency.ask_unload(model)
            self.unloading.add(model)
        self.pinned.clear()
        self._settle()
        assert set(self.place.values()) == {"absent"}
        assert self.device.device().ours_bytes == 0
        assert self.arrivals == self.departures
        assert not self.residency.cleaning
        assert not self.residency.making_room

    # --- how the machine does it ---

    def _settle(self, failing: Collection[int] = (), *, out_of_memory: bool = False) -> None:
        """Carry everything out that is to be done: it comes to rest in a bounded number of moves."""
        for turn in range(6 * len(SIZES)):
            if self.moving is not None:
                self._end_move(works=turn not in failing, out_of_memory=out_of_memory)
            self._plan()
            if self.moving is None:
                break
        assert self.moving is None, "it does not come to rest"
        for model, count in self.references.items():
            assert not count or self.place[model] == "resident", f"{model} starved"

    def _plan(self) -> None:
        self.was_cleaning = self.residency.cleaning
        self.was_making_room = self.residency.making_room
        decisions = self.residency.plan()
        moves = [decision for decision in decisions if isinstance(decision, Move)]
        assert len(moves) <= 1
        for decision in decisions:
            if isinstance(decision, Refusal):
                self._check_refusal(decision)
        if moves:
            self._check_move(moves[0])
            self.moving = moves[0]
            self.departures += self.place[moves[0].model] == "resident"
        for decision in decisions:
            if isinstance(decision, Refusal):
                self._refused(decision.model)

    def _check_refusal(self, refusal: Refusal) -> None:
        """A model is refused only where it does not fit even without every idle model."""
        assert refusal.code == "insufficient_vram"
        assert self.place[refusal.model] != "resident"
        device = self.device.device()
        evictable = sum(n_bytes for model, n_bytes in self.device.on_device.items() if self._may_leave(model))
        in_host = 0
        if self.device.kind == "cpu":
            in_host = sum(
                n_bytes
                for model, n_bytes in self.device.on_host.items()
                if self._may_leave(model) or model == refusal.model
            )
        need = SIZES[refusal.model]
        fits_budget = sum(self.device.on_device.values()) - evictable + need <= device.budget_bytes
        fits_free = need <= device.free_bytes + evictable + in_host
        assert not (fits_budget and fits_free), f"{refusal.message} But it would fit."

    def _check_move(self, move: Move) -> None:
        """Nothing with a reference leaves, pinned models only by hand, the least recently used before others."""
        model, place = move.model, self.place[move.model]
        if ARRIVES[move.kind] == "resident":
            assert move.kind == {"absent": "load", "offloaded": "restore"}[place]
            return
        assert place == "resident" if move.kind == "offload" else place != "absent"
        assert not self.references[model], f"{move} takes a model with requests"
        if model in self.unloading:
            return
        assert self._may_leave(model), f"{move} takes a model that is pinned or asked for"
        keep_s = IDLE_S if self.keep[model] is None else self.keep[model]
        assert keep_s is not None
        checked = self.enabled or self.was_cleaning
        outlived = keep_s == 0 or (checked and 0 <= keep_s <= self.bench.clock.now - self.used[model])
        if place != "resident" or outlived or self.was_making_room:
            return
        wanted = (self.references[other] or other in self.asked for other in SIZES if self.place[other] != "resident")
        assert any(wanted), f"{move} had no reason"
        for other in self.device.on_device:
            if SIZES[other] and self._may_leave(other):
                assert self.used[model] <= self.used[other], f"{other} has not been used for longer than {model}"

    def _may_leave(self, model: str) -> bool:
        waiting = model in self.asked and self.place[model] != "resident"
        return not self.references[model] and model not in self.pinned and not waiting

    def _end_move(self, *, works: bool, out_of_memory: bool) -> None:
        move = self.moving
        assert move is not None
        self.moving = None
        works = works or move.kind == "drop"
        arrives = ARRIVES[move.kind]
        if works:
            self.place[move.model] = arrives
        elif move.kind == "offload":
            self.place[move.model] = "absent"  # a failed offload gives the model up
        if self.place[move.model] == "absent":
            self.unloading.discard(move.model)
        memory = self.device.place(move.model, self.place[move.model], SIZES[move.model])
        if works:
            self.residency.moved(done(move, memory))
            if arrives == "resident":
                self.asked.discard(move.model)
                self.arrivals += 1
                self.used[move.model] = self.bench.clock.now
            return
        code = "insufficient_vram" if out_of_memory else "model_unavailable"
        refusal = self.residency.failed(failed(move, self.place[move.model], code))
        if refusal is not None:
            assert refusal.model == move.model
            self._refused(move.model)

    def _refused(self, model: str) -> None:
        self.asked.discard(model)
        while self.references[model]:
            self._release(model, None)

    def _release(self, model: str, keep_alive_s: float | None) -> None:
        self.residency.release(model, keep_alive_s)
        self.references[model] -= 1
        self.used[model] = self.bench.clock.now
        self.keep[model] = keep_alive_s


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(
    max_examples=250,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
