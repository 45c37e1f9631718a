"""Which model is where, whatever happens in whatever order: the invariants of residency, on a fake clock."""

import itertools
import math
from collections.abc import Collection
from typing import Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_worker.engines.base import JobError
from gpu_worker.residency.arrivals import ROOM_LOOK_S, ROOM_WAIT_S, Refusal
from gpu_worker.residency.manager import ModelBusyError
from gpu_worker.residency.moves import ARRIVES, Place, Transition
from tests.gpu_worker.fakes import WALL, Bench, FakeDevice, done, failed

SIZES = {"a": 100, "b": 70, "c": 40, "d": 0}
"""What the catalogue thinks of each model."""

MODELS = st.sampled_from(sorted(SIZES))
WAITS = st.sampled_from([0.5, 5.0, 30.0, 90.0])
KEEP_ALIVES = st.sampled_from([None, None, -1.0, 0.0, 3.0, 60.0])
IDLE_S, HOST_IDLE_S, INTERVAL_S = 30.0, 90.0, 5.0


class ResidencyMachine(RuleBasedStateMachine):
    """Requests, time, hands and failures in any order, against a device that keeps the true count.

    What the machine knows of references, pins, sizes and use it notes itself; it never looks inside the residency.
    It knows what must not happen at each move, and what must have happened when everything has come to rest.
    """

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
        """A device with room for some of the models, and a host with room for some of those that left.

        The models take `error` more than the catalogue thinks.
        """
        budget, host_budget = budgets
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
        self.fresh = {model: n_bytes + error if n_bytes else 0 for model, n_bytes in SIZES.items()}
        self.size = dict(self.fresh)
        self.measured: dict[str, int] = {}
        self.in_host: dict[str, int] = {}
        self.references = dict.fromkeys(SIZES, 0)
        self.pinned: set[str] = set()
        self.used = dict.fromkeys(SIZES, -math.inf)
        self.offloaded_at = dict.fromkeys(SIZES, -math.inf)
        self.keep: dict[str, float | None] = dict.fromkeys(SIZES)
        self.place: dict[str, Place] = dict.fromkeys(SIZES, "absent")
        self.moving: Transition | None = None
        self.asked: set[str] = set()
        self.unloading: set[str] = set()
        self.broken: set[str] = set()
        self.room: set[str] = set()
        self.retried: set[str] = set()
        self.turns = itertools.count()
        self.turn = dict.fromkeys(SIZES, 0)
        self.wanted_at = dict.fromkeys(SIZES, 0.0)
        self.short_since: dict[str, float] = {}
        self.last_pass = self.bench.clock.now
        self.start = preload
        for model in preload:
            self._ask_load(model)
        self.residency.preload(preload)

    # --- what happens from outside ---

    @rule(model=MODELS)
    def request(self, model: str) -> None:
        """A request arrives."""
        self._want(model)
        self.residency.acquire(model)
        self.references[model] += 1
        self.unloading.discard(model)
        self.room.discard(model)
        self.used[model] = self.bench.clock.now

    @precondition(lambda self: any(self.references.values()))
    @rule(data=st.data(), keep_alive_s=KEEP_ALIVES, spoke=st.booleans())
    def end(self, data: st.DataObject, keep_alive_s: float | None, *, spoke: bool) -> None:
        """A request ends: it has spoken, or was given up before it could."""
        model = data.draw(st.sampled_from([model for model, count in self.references.items() if count]))
        if spoke and self.place[model] == "resident":
            self._release(model, keep_alive_s)
        else:
            self._abandon(model)

    @rule(seconds=WAITS)
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.bench.clock.advance(seconds)

    @rule(model=MODELS, pinned=st.booleans())
    def pin(self, model: str, *, pinned: bool) -> None:
        """Somebody pins a model, or lets it go."""
        self.residency.pin(model, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(model)
        self.room.discard(model)

    @rule(model=MODELS)
    def load(self, model: str) -> None:
        """Somebody loads a model by hand."""
        self._ask_load(model)
        self.residency.ask_load(model)

    @rule(model=MODELS)
    def unload(self, model: str) -> None:
        """Somebody unloads a model by hand, which is refused exactly while it has requests."""
        preloading = self.residency.preloading
        if self.references[model]:
            with pytest.raises(ModelBusyError):
                self.residency.ask_unload(model)
            assert self.residency.preloading == preloading
        else:
            self.residency.ask_unload(model)
            assert model not in self.residency.preloading
            self.asked.discard(model)
            self.unloading.add(model)

    @rule()
    def cleanup(self) -> None:
        """Somebody asks for a pass."""
        self.residency.cleanup.start()

    @rule()
    def out_of_memory(self) -> None:
        """A step ran out of memory."""
        assert self.residency.room.make() or not self._evictable()
        self.room |= self._evictable()

    @precondition(lambda self: self.moving is None)
    @rule(models=st.permutations("abc"), gives_up=st.booleans())
    def run_out_twice(self, models: list[str], *, gives_up: bool) -> None:
        """A load runs out of memory whatever leaves for it; between two tries another model has become idle.

        Or whoever wanted it gives up after the first, and somebody else comes.
        """
        idle, busy, model = models
        self.load(idle)
        self.request(busy)
        self._settle()
        self.request(model)
        for _ in range(4 * len(SIZES)):
            self._plan()
            if self.moving is None:
                break
            tried = self.moving.model == model and ARRIVES[self.moving.kind] == "resident"
            self._end_move(works=not tried, out_of_memory=True)
            if tried and self.references[busy]:
                self._abandon(busy)
                if gives_up and self.references[model]:
                    while self.references[model]:
                        self._abandon(model)
                    self.request(model)
        assert self.moving is None

    @precondition(lambda self: self.moving is None)  # during a load it would run out of memory, which is a failed move
    @rule(taken=st.sampled_from([0, 20, 60]))
    def others(self, taken: int) -> None:
        """Another process takes device memory, or gives it back; never what is not free. It shows in a moment."""
        free_without = self.device.device().free_bytes + self.device.others_bytes
        self.device.others_bytes = min(taken, free_without)
        self.bench.clock.advance(2 * ROOM_LOOK_S)

    @rule(model=MODELS, more=st.sampled_from([-20, 10, 30]))
    def grow(self, model: str, more: int) -> None:
        """A model that is there holds more than before, or less: its caches went with a request."""
        moves = self.moving is not None and self.moving.model == model
        if self.place[model] != "resident" or moves or not self.size[model]:
            return
        self.size[model] += max(-self.size[model] // 2, min(more, self.device.device().free_bytes))
        self.measured[model] = self.size[model]
        self.residency.measured(model, self.device.place(model, "resident", self.size[model]))

    @rule(model=MODELS, running=st.integers(0, 2), keep_alive_s=KEEP_ALIVES)
    def break_engine(self, model: str, running: int, keep_alive_s: float | None) -> None:
        """A model's engine breaks: what runs on it fails, and what waits for it goes on waiting."""
        if self.residency.state(model) != "resident":
            return
        for _ in range(min(running, self.references[model])):
            self._release(model, keep_alive_s)
        self.residency.replace(model)
        self.broken.add(model)

    @rule(model=MODELS, state=st.sampled_from(["here", "here", "remote", "missing"]))
    def files(self, model: str, state: str) -> None:
        """A model's files come or go."""
        self.bench.problems.pop(model, None)
        self.bench.remote.discard(model)
        if state == "missing":
            self.bench.problems[model] = "its weights are not there"
        elif state == "remote":
            self.bench.remote.add(model)

    @precondition(lambda self: self.bench.fetching)
    @rule(works=st.booleans())
    def end_fetch(self, *, works: bool) -> None:
        """A download ends."""
        (model,) = self.bench.fetching
        refusal = self.bench.fetched(model, None if works else JobError("model_unavailable", "no hub"))
        assert (refusal is None) == works
        if refusal is not None:
            self._refused(model)

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
        """A request comes, is spoken if it need not wait, and ends."""
        self.request(model)
        self._settle()
        if self.references[model] and self.place[model] == "resident":
            self.bench.clock.advance(1)
            self._release(model, keep_alive_s)

    @rule(models=st.permutations("abc"))
    def come_and_go(self, models: list[str]) -> None:
        """One model after the other is used once and leaves the device: host RAM fills up."""
        for model in models:
            self.speak(model, 0.0)
        self._settle()

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
    def figures_are_true(self) -> None:
        """What is told of each model is where it is, what it holds there and who uses it."""
        for state in self.residency.models():
            model = state.id
            assert state.references == self.references[model] >= 0
            assert state.pinned == (model in self.pinned)
            assert state.keep_alive_s == self.keep[model]
            if self.moving is not None and self.moving.model == model:
                loading = ARRIVES[self.moving.kind] == "resident"
                assert (state.state == "loading") == loading, "a request could start on a model that is leaving"
                assert loading or state.state != "resident"
                continue
            assert sum(state.bytes.values()) == self.device.on_device.get(model, 0)
            assert state.host_bytes == self.device.on_host.get(model, 0)
            if model in self.broken:
                assert state.state == ("loading" if self.references[model] else "absent")
            elif self.place[model] == "absent":
                fetched = model in self.bench.fetching and self._is_wanted(model)
                problem = model in self.bench.found and self.bench.found[model].problem
                assert state.state == ("unavailable" if problem else "loading" if fetched else "absent")
            else:
                assert state.state == self.place[model]
                assert self.place[model] != "resident" or state.detail == ""

    @invariant()
    def one_fetch_at_a_time(self) -> None:
        """Downloads come one after the other."""
        assert len(self.bench.fetching) <= 1

    def teardown(self) -> None:
        """In the end nobody has starved, and everything that was loaded can leave."""
        if not hasattr(self, "bench"):
            return
        self._settle()
        for model in SIZES:
            while self.references[model]:
                self._abandon(model)
            self.residency.pin(model, False)
            self.residency.ask_unload(model)
            self.asked.discard(model)
            self.unloading.add(model)
        self.pinned.clear()
        self._settle()
        assert set(self.place.values()) == {"absent"}
        assert self.device.device().ours_bytes == 0
        assert self.residency.preloading == []
        assert not self.residency.cleanup.under_way
        assert not self.residency.room.making

    # --- what must have happened ---

    def _check_rest(self) -> None:
        """Whoever is wanted is there or waits with a reason, and nobody stays who should have left."""
        now = self.bench.clock.now
        for model in SIZES:
            if self._is_wanted(model):
                assert self._waits_for_files(model) or self._fits(model, busy=True), f"{model} starved"
            assert model not in self.unloading or self.place[model] == "absent", f"{model} was to be unloaded"
            if self.place[model] == "resident" and self._may_leave(model):
                assert self.keep[model] != 0, f"{model} was not to stay"
                assert model not in self.room, f"{model} should have made room"
        assert not self.broken
        for model, since in self.short_since.items():
            assert now - since < ROOM_WAIT_S, f"{model} waits for ever"
        if sum(self.device.on_device.values()) > self.device.budget_bytes:
            assert not self._evictable(), "the device's budget is overstepped, but not by need"
        if sum(self.device.on_host.values()) > self.device.host_budget_bytes:
            assert not any(self._may_leave(model) for model, n_bytes in self.device.on_host.items() if n_bytes)

    def _check_outlived(self, leavable: Collection[str]) -> None:
        """A pass has ended: of `leavable`, which nobody needed, nobody is there whose time is over."""
        now = self.bench.clock.now
        for model in leavable:
            keep_s = IDLE_S if self.keep[model] is None else self.keep[model]
            assert keep_s is not None
            if keep_s < 0 or not self._may_leave(model):
                continue
            assert self.place[model] != "resident" or now - self.used[model] < keep_s, f"{model} is idle"
            assert self.place[model] != "offloaded" or now - self.offloaded_at[model] < HOST_IDLE_S, f"{model} is old"

    def _check_refusal(self, refusal: Refusal) -> None:
        """A model is refused only where it does not fit without every idle model, and has waited for the busy ones."""
        model = refusal.model
        assert self.place[model] != "resident"
        if refusal.code == "model_unavailable":
            assert self.place[model] == "absent"
            assert self.bench.found[model].problem
            return
        assert not self._fits(model), f"{refusal.message} But it would fit."
        assert not self._loads_anew(model), f"{refusal.message} But it could be loaded."
        if self._fits(model, busy=True):
            assert self.bench.clock.now - self.wanted_at[model] >= ROOM_WAIT_S, "it might have waited"

    def _check_move(self, move: Transition) -> None:
        """Nothing with a reference leaves, pinned models only by hand, the least recently used before others."""
        model, place = move.model, self.place[move.model]
        if ARRIVES[move.kind] == "resident":
            assert move.kind == {"absent": "load", "offloaded": "restore"}[place]
            self._check_arrival(model)
            return
        if self._loads_anew(model):
            assert move.kind == "drop"
            return
        assert place == "resident" if move.kind == "offload" else place != "absent"
        expected = self.in_host.get(model, self.size[model]) if move.kind == "offload" else 0
        assert not expected or sum(self.device.on_host.values()) + expected <= self.device.host_budget_bytes
        if model in self.broken:
            assert move.kind == "drop"
            return
        assert not self.references[model], f"{move} takes a model with requests"
        if model in self.unloading:
            return
        assert self._may_leave(model), f"{move} takes a model that is pinned or asked for"
        if place == "offloaded":
            self._check_drop(model)
            return
        keep_s = IDLE_S if self.keep[model] is None else self.keep[model]
        assert keep_s is not None
        checked = self.enabled or self.was_cleaning
        outlived = keep_s == 0 or (checked and 0 <= keep_s <= self.bench.clock.now - self.used[model])
        if outlived or self.was_making_room:
            return
        over = sum(self.device.on_device.values()) > self.device.budget_bytes
        assert over or any(
            self._is_wanted(other) and not (model in self.start and self._is_preload(other)) for other in SIZES
        ), f"{move} had no reason"
        for other in self._evictable() - (set(self.start) if model not in self.start else set()):
            assert self.used[model] <= self.used[other], f"{other} has not been used for longer than {model}"

    def _check_arrival(self, model: str) -> None:
        """What comes is wanted and fits as it is; who has waited longer could not come, whoever left."""
        device = self.device.device()
        need = self._need(model)
        own_host = self.device.on_host.get(model, 0) if self.device.kind == "cpu" else 0
        assert self._is_wanted(model)
        assert not self._waits_for_files(model)
        assert not need or sum(self.device.on_device.values()) + need <= device.budget_bytes
        assert not need or need <= device.free_bytes + own_host
        for other in SIZES:
            if self._is_wanted(other) and self.turn[other] < self.turn[model] and not self._waits_for_files(other):
                assert not self._fits(other), f"{other} has waited for longer than {model}"
                assert not self._loads_anew(other), f"{other} has waited for longer than {model}, and could be loaded"

    def _check_drop(self, model: str) -> None:
        """A model leaves host RAM when its time is over, or as the least recently used one there."""
        checked = self.enabled or self.was_cleaning
        if checked and self.bench.clock.now - self.offloaded_at[model] >= HOST_IDLE_S:
            return
        for other, n_bytes in self.device.on_host.items():
            if n_bytes and self._may_leave(other):
                assert self.used[model] <= self.used[other], f"{other} has not been used for longer than {model}"

    # --- what the machine knows ---

    def _is_wanted(self, model: str) -> bool:
        return self.place[model] != "resident" and (self.references[model] > 0 or model in self.asked)

    def _is_preload(self, model: str) -> bool:
        return model in self.was_preloading and not self.references[model]

    def _may_leave(self, model: str) -> bool:
        return not self.references[model] and model not in self.pinned and model not in self.asked

    def _evictable(self) -> set[str]:
        """The models on the device that may leave it and whose leaving helps."""
        return {model for model, n_bytes in self.device.on_device.items() if n_bytes and self._may_leave(model)}

    def _waits_for_files(self, model: str) -> bool:
        found = self.bench.found.get(model)
        away = self.place[model] == "absent"
        return away and (model in self.bench.fetching or found is None or found.remote or bool(found.problem))

    def _need(self, model: str, *, anew: bool = False) -> int:
        """What a model is expected to take: restored, what was measured; loaded, no more than the catalogue thinks."""
        measured = self.measured.get(model, SIZES[model])
        return measured if self.place[model] == "offloaded" and not anew else min(measured, SIZES[model])

    def _loads_anew(self, model: str) -> bool:
        """Whether the model is wanted and fits whoever leaves only if it is loaded, not restored."""
        if not self._is_wanted(model) or self.place[model] != "offloaded":
            return False
        return not self._fits(model, busy=True) and self._fits(model, busy=True, anew=True)

    def _fits(self, model: str, *, busy: bool = False, anew: bool = False) -> bool:
        """Whether the model could come if all idle models left, with `busy` the busy ones too; `anew`: by a load."""
        device, need = self.device.device(), self._need(model, anew=anew)
        spared = self.start if self._is_preload(model) else ()
        leaving = sum(
            n_bytes
            for other, n_bytes in self.device.on_device.items()
            if other not in spared
            and (self._may_leave(other) or (busy and self.references[other] and other not in self.pinned))
        )
        in_host = 0
        if self.device.kind == "cpu":
            in_host = sum(
                n_bytes for other, n_bytes in self.device.on_host.items() if self._may_leave(other) or other == model
            )
        held = sum(self.device.on_device.values()) - leaving
        return not need or (held + need <= device.budget_bytes and need <= device.free_bytes + leaving + in_host)

    # --- how the machine does it ---

    def _settle(self, failing: Collection[int] = (), *, out_of_memory: bool = False) -> None:
        """Carry everything out that is to be done but downloads: it comes to rest in a bounded number of moves."""
        now = self.bench.clock.now
        before = self.residency.cleanup.last
        # A pass that is under way already has looked at some models before they were as they are now.
        leavable = {model for model in SIZES if self._may_leave(model) and self.moving is None}
        works, rest = True, 0
        for turn in range(10 * len(SIZES)):
            if self.moving is not None:
                works &= self._end_move(works=turn not in failing, out_of_memory=out_of_memory)
            self._plan()
            rest = 0 if self.decided else rest + 1
            if rest == 2:  # a pass that was under way may have ended in the first, and the next be due
                break
        assert rest == 2, "it does not come to rest"
        self._check_rest()
        last = self.residency.cleanup.last
        if last is not None:
            self.last_pass = max(
                self.last_pass, round(last.timestamp - WALL, 3)
            )  # Unix seconds have no finer fractions
        assert not self.enabled or now - self.last_pass < INTERVAL_S + 0.01, "no pass was run"
        if last is not before and now - self.last_pass < 0.01 and works:
            self._check_outlived(leavable)
        self.room.clear()

    def _plan(self) -> None:
        self.was_cleaning = self.residency.cleanup.under_way
        self.was_making_room = self.residency.room.making
        self.was_preloading = self.residency.preloading
        self.decided = self.bench.plan()
        moves = [decision for decision in self.decided if isinstance(decision, Transition)]
        refusals = [decision for decision in self.decided if isinstance(decision, Refusal)]
        assert len(moves) <= 1
        for refusal in refusals:
            self._check_refusal(refusal)
        if moves:
            self._check_move(moves[0])
            self.moving = moves[0]
            self.room.discard(moves[0].model)
        for refusal in refusals:
            self._refused(refusal.model)
        for model in SIZES:
            if not self._is_wanted(model) or moves or self._waits_for_files(model):
                self.short_since.pop(model, None)
            else:
                self.short_since.setdefault(model, self.bench.clock.now)

    def _end_move(self, *, works: bool, out_of_memory: bool) -> bool:
        """The move in flight ends; whether it worked."""
        move = self.moving
        assert move is not None
        model, arrives = move.model, ARRIVES[move.kind]
        if move.kind == "load":
            self.size[model] = self.fresh[model]
            if model in self.bench.problems or model in self.bench.remote:
                works, out_of_memory = False, False
        in_host = self.device.on_host.get(model, 0) if self.device.kind == "cpu" else 0
        if arrives == "resident" and self.size[model] > self.device.device().free_bytes + in_host:
            works, out_of_memory = False, True
        works = works or move.kind == "drop"
        could_make_room = bool(self._evictable() - {model})
        self.moving = None
        if works:
            self.place[model] = arrives
        elif move.kind == "offload":
            self.place[model] = "absent"  # a failed offload gives the model up
        if self.place[model] == "absent":
            self.unloading.discard(model)
            self.broken.discard(model)
        memory = self.device.place(model, self.place[model], self.size[model])
        if works:
            self._landed(model, arrives)
            self.residency.moved(done(move, memory))
            return True
        code = "insufficient_vram" if out_of_memory else "model_unavailable"
        refusal = self.residency.failed(failed(move, self.place[model], code))
        if arrives != "resident":
            assert refusal is None
        elif refusal is None:
            assert out_of_memory, "what will not work is tried again"
            assert model not in self.retried, "it is tried for ever"
            assert could_make_room, "it is tried again though nothing has changed"
            self.retried.add(model)
            self.room |= self._evictable()
        else:
            assert not (out_of_memory and could_make_room) or model in self.retried, "it is not tried again"
            assert refusal.model == model
            self._refused(model)
        return False

    def _landed(self, model: str, arrives: Place) -> None:
        now = self.bench.clock.now
        if arrives == "resident":
            self.asked.discard(model)
            self.measured[model] = self.size[model]
            self.used[model] = now
        elif arrives == "offloaded":
            self.offloaded_at[model] = now
            self.in_host[model] = self.size[model]

    def _want(self, model: str) -> None:
        if not self._is_wanted(model):
            # It makes room for nobody any more, which shows in a moment to those that wait for some.
            self.bench.clock.advance(2 * ROOM_LOOK_S)
            self.turn[model] = next(self.turns)
            self.wanted_at[model] = self.bench.clock.now
            self.short_since.pop(model, None)
            self.retried.discard(model)

    def _ask_load(self, model: str) -> None:
        self._want(model)
        moves = self.moving is not None and self.moving.model == model
        if self.place[model] != "resident" or moves or model in self.broken:
            self.asked.add(model)
        self.unloading.discard(model)
        self.used[model] = self.bench.clock.now
        self.keep[model] = None

    def _refused(self, model: str) -> None:
        self.asked.discard(model)
        self.retried.discard(model)
        while self.references[model]:
            self._abandon(model)

    def _release(self, model: str, keep_alive_s: float | None) -> None:
        self.residency.release(model, keep_alive_s)
        self.keep[model] = keep_alive_s
        self._forget(model)

    def _abandon(self, model: str) -> None:
        self.residency.abandon(model)
        self._forget(model)

    def _forget(self, model: str) -> None:
        self.references[model] -= 1
        self.used[model] = self.bench.clock.now


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(
    max_examples=250,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
