"""The policy, with plain data: precedence, examples of every rule, and properties over any set of models."""

import copy
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.engines.base import Memory
from gpu_worker.residency.models import CheckFiles, Download, FilesStatus, ModelEntry, ModelState, Transition
from gpu_worker.residency.policy import (
    BUSY_RETRY_S,
    FULL_RETRY_S,
    SHORTAGE_WAIT_S,
    IdleCheck,
    MemoryReading,
    Plan,
    evict,
    find_shortage,
    held_bytes,
    load_queue,
    next_transition,
    offloaded_bytes,
    pending_file_work,
)
from shared.protocol import DeviceMemory, HostMemory

NOW = 1_000.0
IDLE = IdleCheck(timeout_s=300.0, host_timeout_s=3_600.0)
RESIDENT, OFFLOADED, ABSENT = ModelState.RESIDENT, ModelState.OFFLOADED, ModelState.ABSENT


def an_entry(model: str, state: ModelState = RESIDENT, n_bytes: int = 100, **fields: Any) -> ModelEntry:
    """A model of `n_bytes` in `state`, whose files are there."""
    memory = Memory()
    if state is RESIDENT:
        memory = Memory(device={"weights": n_bytes})
    elif state is OFFLOADED:
        memory = Memory(host={"weights": n_bytes})
    files = FilesStatus(current=True, stamp="")
    return ModelEntry(
        **{"id": model, "estimated_bytes": n_bytes, "state": state, "memory": memory, "files": files, **fields}
    )


def a_reading(
    entries: list[ModelEntry],
    *,
    kind: Literal["cuda", "cpu"] = "cuda",
    total: int = 1_000,
    budget: int = 1_000,
    others: int = 0,
    host_free: int = 1_000,
    host_budget: int = 1_000,
) -> MemoryReading:
    """The reading of a device that holds `entries`, and `others` bytes of other processes."""
    on_device = sum(entry.device_bytes for entry in entries)
    on_host = sum(entry.host_bytes for entry in entries)
    ours = on_device + (on_host if kind == "cpu" else 0)
    total = max(total, ours + others)
    free = total - ours - others
    device = DeviceMemory(
        name="a fake",
        kind=kind,
        total_bytes=total,
        used_bytes=total - free,
        free_bytes=free,
        ours_bytes=ours,
        others_bytes=others,
        budget_bytes=budget,
    )
    host = HostMemory(
        total_bytes=1_000, free_bytes=host_free, ours_bytes=on_host, offloaded_bytes=on_host, budget_bytes=host_budget
    )
    return MemoryReading(device=device, host=host)


def a_plan(entries: list[ModelEntry], idle: IdleCheck = IDLE, now: float = NOW, **memory: Any) -> Plan:
    """The plan for `entries`."""
    return next_transition(entries, a_reading(entries, **memory), now, idle)


def checking(*models: str, **timeouts: float) -> IdleCheck:
    """A cleanup pass has yet to check `models`."""
    return IdleCheck(**{"models": models, "timeout_s": 300.0, "host_timeout_s": 3_600.0, **timeouts})


class TestPrecedence:
    """Which of several reasons goes first."""

    def test_order(self) -> None:
        """Cleanup, then drops, then marked models, then the load queue, then budgets."""
        idle = an_entry("idle", last_used=0.0)
        unloaded = an_entry("unloaded", requested="unload", last_used=NOW)
        marked = an_entry("marked", evict=True, last_used=NOW)
        wanted = an_entry("wanted", ABSENT, references=1)
        unkept = an_entry("unkept", keep_alive_s=0.0, last_used=NOW)
        entries = [unkept, wanted, marked, unloaded, idle]
        expected = [
            Transition("idle", "offload"),
            Transition("unloaded", "drop"),
            Transition("marked", "offload"),
            Transition("wanted", "load"),
            Transition("unkept", "offload"),
        ]
        for transition in expected:
            assert a_plan(entries, checking("idle")).transition == transition
            entries = [entry for entry in entries if entry.id != transition.model]
        assert a_plan(entries) == Plan()

    def test_nothing_to_do(self) -> None:
        """Models at rest stay where they are."""
        entries = [an_entry("a"), an_entry("b", OFFLOADED), an_entry("c", ABSENT)]
        assert a_plan(entries) == Plan()


class TestCleanup:
    """Idle models leave."""

    @pytest.mark.parametrize(("idle_s", "leaves"), [(299.0, False), (300.0, True)])
    def test_idle_time(self, idle_s: float, *, leaves: bool) -> None:
        """A resident model leaves at the second its idle time ends."""
        plan = a_plan([an_entry("a", last_used=NOW - idle_s)], checking("a"))
        assert plan.transition == (Transition("a", "offload") if leaves else None)
        assert plan.by_cleanup == leaves

    @pytest.mark.parametrize(("offloaded_s", "leaves"), [(3_599.0, False), (3_600.0, True)])
    def test_host_idle_time(self, offloaded_s: float, *, leaves: bool) -> None:
        """An offloaded model is dropped when its time in host RAM ends, however long ago it was used."""
        plan = a_plan([an_entry("a", OFFLOADED, offloaded_since=NOW - offloaded_s)], checking("a"))
        assert plan.transition == (Transition("a", "drop") if leaves else None)

    def test_keep_alive_counts_before_the_timeout(self) -> None:
        """The last request's keep_alive replaces the configured time; a negative one is for ever."""
        for keep_alive_s, leaves in ((10.0, True), (500.0, False), (-1.0, False)):
            entry = an_entry("a", last_used=NOW - 400.0, keep_alive_s=keep_alive_s)
            assert (a_plan([entry], checking("a")).transition is not None) == leaves

    def test_only_models_of_the_pass(self) -> None:
        """Without a pass, or outside it, idle models stay."""
        entries = [an_entry("a", last_used=0.0), an_entry("b", last_used=0.0)]
        assert a_plan(entries).transition is None
        assert a_plan(entries, checking("b")).transition == Transition("b", "offload")

    def test_room_in_host_ram_is_made_within_the_pass(self) -> None:
        """A drop that makes room in host RAM for an idle model belongs to the pass."""
        entries = [an_entry("old", OFFLOADED, last_used=1.0), an_entry("a", last_used=2.0)]
        plan = a_plan(entries, checking("a"), host_budget=150)
        assert (plan.transition, plan.by_cleanup) == (Transition("old", "drop"), True)


class TestEviction:
    """Who leaves, and for where."""

    def test_least_recently_used_leaves_first(self) -> None:
        """Of the idle models the least recently used leaves, one at a time, until the wanted one fits."""
        entries = [
            an_entry("recent", last_used=9.0),
            an_entry("old", last_used=1.0),
            an_entry("wanted", ABSENT, references=1),
        ]
        assert a_plan(entries, budget=250).transition == Transition("old", "offload")

    def test_least_recently_used_of_the_marked(self) -> None:
        """After out of memory, marked models leave in the order of their last use."""
        entries = [an_entry("b", evict=True, last_used=2.0), an_entry("a", evict=True, last_used=1.0)]
        assert a_plan(entries).transition == Transition("a", "offload")

    def test_to_host_ram_or_nowhere(self) -> None:
        """A victim goes to host RAM if it fits there; less recently used models there make room for it."""
        victim = an_entry("victim", last_used=5.0)
        older, newer = an_entry("older", OFFLOADED, last_used=1.0), an_entry("newer", OFFLOADED, last_used=9.0)
        assert evict(victim, [victim], a_reading([victim])) == Transition("victim", "offload")
        entries = [victim, older]
        assert evict(victim, entries, a_reading(entries, host_budget=150)) == Transition("older", "drop")
        entries = [victim, newer]
        assert evict(victim, entries, a_reading(entries, host_budget=150)) == Transition("victim", "drop")
        assert evict(victim, [victim], a_reading([victim], host_free=50)) == Transition("victim", "drop")

    def test_full_host_ram_in_cpu_mode(self) -> None:
        """Where the device is host RAM and full, offloading gives nothing back: offloaded models are dropped first."""
        entries = [an_entry("a"), an_entry("b", OFFLOADED), an_entry("wanted", ABSENT, references=1)]
        assert a_plan(entries, kind="cpu", total=250).transition == Transition("b", "drop")
        assert a_plan([entries[0], entries[2]], kind="cpu", total=150).transition == Transition("a", "drop")

    def test_over_budget(self) -> None:
        """A model for which a budget has no room leaves, on the device and in host RAM."""
        entries = [an_entry("a", last_used=2.0), an_entry("b", last_used=1.0)]
        assert a_plan(entries, budget=150).transition == Transition("b", "offload")
        entries = [an_entry("a", OFFLOADED, last_used=2.0), an_entry("b", OFFLOADED, last_used=1.0)]
        assert a_plan(entries, host_budget=150).transition == Transition("b", "drop")


class TestLoadQueue:
    """Who comes, who waits, who is refused."""

    def test_longest_waiting_first(self) -> None:
        """The queue number decides, not the catalogue's order."""
        entries = [
            an_entry("a", ABSENT, references=1, queue_number=2),
            an_entry("b", ABSENT, references=1, queue_number=1),
        ]
        assert [entry.id for entry in load_queue(entries)] == ["b", "a"]
        assert a_plan(entries).transition == Transition("b", "load")

    def test_offloaded_is_restored(self) -> None:
        """An offloaded model comes from host RAM, whose files nobody has to check."""
        entry = an_entry("a", OFFLOADED, requested="load", files=FilesStatus())
        assert a_plan([entry]).transition == Transition("a", "restore")

    @pytest.mark.parametrize(
        "files", [FilesStatus(), FilesStatus(current=True, downloading=True), FilesStatus(current=True, remote=True)]
    )
    def test_waits_for_files(self, files: FilesStatus) -> None:
        """A load waits for a check and a download; the next in the queue does not."""
        entries = [
            an_entry("a", ABSENT, references=1, queue_number=1, files=files),
            an_entry("b", ABSENT, references=1, queue_number=2),
        ]
        assert a_plan(entries).transition == Transition("b", "load")

    def test_missing_files_are_a_refusal(self) -> None:
        """A model whose files are not there is refused with the reason."""
        files = FilesStatus(current=True, problem="there are no weights")
        (refusal,) = a_plan([an_entry("a", ABSENT, references=1, files=files)]).refusals
        assert (refusal.code, refusal.message) == ("model_unavailable", "a: there are no weights")

    def test_waits_for_busy_models_for_a_time(self) -> None:
        """A model that fits once a busy one is idle waits SHORTAGE_WAIT_S, then it is refused for a short time."""
        busy = an_entry("busy", references=1)
        for waited_s, refused in ((None, False), (SHORTAGE_WAIT_S - 1, False), (SHORTAGE_WAIT_S, True)):
            since = None if waited_s is None else NOW - waited_s
            plan = a_plan([busy, an_entry("a", ABSENT, references=1, short_since=since)], budget=150)
            assert (plan.transition, plan.short) == (None, ["a"])
            assert [refusal.retry_after_s for refusal in plan.refusals] == [BUSY_RETRY_S] * refused

    def test_refused_at_once_where_waiting_is_in_vain(self) -> None:
        """A model that no idle model makes room for is refused at once, with the arithmetic."""
        for other in (an_entry("big", references=1, pinned=True), an_entry("big", pinned=True)):
            (refusal,) = a_plan([other, an_entry("a", ABSENT, references=1)], budget=150).refusals
            assert (refusal.code, refusal.retry_after_s) == ("insufficient_vram", FULL_RETRY_S)
            assert "a needs 1 MiB on the device" in refusal.message  # rounded up: a budget of this figure is enough
            for setting in ("TTS_MAX_CONCURRENCY", "TTS_QUANTIZATION=int8", "TTS_VRAM_BUDGET_MB"):
                assert setting in refusal.message

    def test_no_eviction_in_vain(self) -> None:
        """If evicting every idle model is not enough, none is evicted."""
        entries = [an_entry("busy", references=1), an_entry("idle"), an_entry("a", ABSENT, 200, references=1)]
        assert a_plan(entries, budget=250).transition is None

    def test_reload_where_no_restore_fits(self) -> None:
        """A model whose old size fits no more is dropped from host RAM, to be loaded with fewer slots."""
        entry = an_entry("a", OFFLOADED, 200, estimated_bytes=100, measured_bytes=200, references=1)
        assert a_plan([entry], budget=150).transition == Transition("a", "drop")
        assert a_plan([entry], budget=90).transition is None

    def test_models_of_the_start_stay_for_each_other(self) -> None:
        """A model that only the start wants evicts no other model of the start; a request does."""
        first = an_entry("first", preload=True)
        second = an_entry("second", ABSENT, requested="load", preload=True, preload_pending=True)
        assert a_plan([first, second], budget=150).transition is None
        second.references = 1
        assert a_plan([first, second], budget=150).transition == Transition("first", "offload")


class TestFileWork:
    """When files are checked and downloaded."""

    def test_checked_before_a_load_and_now_and_then(self) -> None:
        """An absent model's files are checked when it is wanted, and all of them when a check is overdue."""
        wanted = an_entry("wanted", ABSENT, references=1, files=FilesStatus())
        entries = [an_entry("absent", ABSENT), wanted, an_entry("resident", files=FilesStatus())]
        assert pending_file_work(entries, overdue=False) == [CheckFiles("wanted")]
        assert pending_file_work(entries, overdue=True) == [CheckFiles("wanted"), CheckFiles("absent")]
        wanted.files.checking = True
        assert pending_file_work(entries, overdue=False) == []

    def test_one_download_at_a_time(self) -> None:
        """The longest waiting remote model is downloaded; the next one follows."""
        first = an_entry("first", ABSENT, references=1, queue_number=1, files=FilesStatus(current=True, remote=True))
        second = an_entry("second", ABSENT, references=1, queue_number=2, files=FilesStatus(current=True, remote=True))
        assert pending_file_work([second, first], overdue=False) == [Download("first")]
        first.files.downloading = True
        assert pending_file_work([second, first], overdue=False) == []


@st.composite
def any_entries(draw: st.DrawFn) -> list[ModelEntry]:
    """Up to four models in any state that the manager can produce."""
    entries = []
    for model in "abcd"[: draw(st.integers(1, 4))]:
        state = draw(st.sampled_from([RESIDENT, OFFLOADED, ABSENT]))
        references = draw(st.integers(0, 1))
        entries.append(
            an_entry(
                model,
                state,
                draw(st.sampled_from([0, 40, 60, 100])),
                references=references,
                estimated_bytes=draw(st.sampled_from([40, 60, 100])),
                requested=draw(st.sampled_from([None, None, "load"] + ["unload"] * (not references))),
                queue_number=draw(st.integers(1, 9)),
                short_since=draw(st.sampled_from([None, NOW - 1, NOW - 60])),
                pinned=draw(st.booleans()) and draw(st.booleans()),
                evict=draw(st.booleans()) and state is RESIDENT,
                broken=state is RESIDENT and draw(st.sampled_from([False] * 5 + [True])),
                keep_alive_s=draw(st.sampled_from([None, 0.0, 50.0, -1.0])),
                last_used=draw(st.sampled_from([0.0, 900.0, 999.0])),
                preload=draw(st.booleans()),
            )
        )
    return entries


MEMORIES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["cuda", "cpu"]),
        "total": st.sampled_from([100, 200, 400, 1_000]),
        "budget": st.sampled_from([50, 100, 200, 1_000]),
        "others": st.sampled_from([0, 50]),
        "host_free": st.sampled_from([0, 80, 1_000]),
        "host_budget": st.sampled_from([0, 80, 1_000]),
    }
)


class TestProperties:
    """Properties of the policy for any models and any memory."""

    @given(entries=any_entries(), memory=MEMORIES, checked=st.sets(st.sampled_from("abcd")))
    def test_pure(self, entries: list[ModelEntry], memory: dict[str, Any], checked: set[str]) -> None:
        """The same input gives the same plan, and no entry is changed."""
        before = copy.deepcopy(entries)
        assert a_plan(entries, checking(*sorted(checked)), **memory) == a_plan(
            before, checking(*sorted(checked)), **memory
        )
        assert entries == before

    @given(entries=any_entries(), memory=MEMORIES, checked=st.sets(st.sampled_from("abcd")))
    def test_who_may_move(self, entries: list[ModelEntry], memory: dict[str, Any], checked: set[str]) -> None:
        """Only the wanted arrive. Models with requests, pinned ones and loads by an admin never leave for others."""
        transition = a_plan(entries, checking(*sorted(checked)), **memory).transition
        if transition is None:
            return
        entry = next(entry for entry in entries if entry.id == transition.model)
        match transition.kind:
            case "load":
                assert (entry.state, entry.wanted, entry.files.blocks_load) == (ABSENT, True, False)
            case "restore":
                assert (entry.state, entry.wanted) == (OFFLOADED, True)
            case "offload":
                assert entry.state is RESIDENT
                assert entry.evictable
            case "drop":
                reloads = entry.state is OFFLOADED and entry.wanted
                assert entry.state is not ABSENT
                assert entry.broken or entry.requested == "unload" or entry.evictable or reloads

    @given(entries=any_entries(), memory=MEMORIES)
    def test_arrivals_fit(self, entries: list[ModelEntry], memory: dict[str, Any]) -> None:
        """A model arrives only within the budget and what is free, and a refused one does not fit as things are."""
        plan, reading = a_plan(entries, **memory), a_reading(entries, **memory)

        def fits(entry: ModelEntry) -> bool:
            need = entry.arrival_bytes
            free = reading.device.free_bytes + (entry.host_bytes if reading.device.kind == "cpu" else 0)
            held = held_bytes(entries, reading.device)
            return need == 0 or (held + need <= reading.device.budget_bytes and need <= free)

        by_id = {entry.id: entry for entry in entries}
        if plan.transition is not None and plan.transition.kind in {"load", "restore"}:
            assert fits(by_id[plan.transition.model])
        for refusal in plan.refusals:
            assert by_id[refusal.model].wanted
            assert not fits(by_id[refusal.model])

    @given(entries=any_entries(), memory=MEMORIES)
    def test_evictions_help(self, entries: list[ModelEntry], memory: dict[str, Any]) -> None:
        """fits_after_eviction is true: with every victim gone, there is no shortage left."""
        device = a_reading(entries, **memory).device
        for entry in entries:
            shortage = find_shortage(entry, entries, device)
            if shortage is None or entry.state is RESIDENT:
                continue
            left = [other for other in entries if other not in [*shortage.victims, *shortage.host_victims]]
            rest = find_shortage(entry, left, a_reading(left, **{**memory, "total": device.total_bytes}).device)
            assert (rest is None) == shortage.fits_after_eviction

    @given(entries=any_entries(), memory=MEMORIES)
    def test_least_recently_used(self, entries: list[ModelEntry], memory: dict[str, Any]) -> None:
        """A victim of the load queue has not been used more recently than another that could have left."""
        shortages = [
            find_shortage(entry, entries, a_reading(entries, **memory).device) for entry in entries if entry.wanted
        ]
        for shortage in shortages:
            if shortage is not None:
                for victims in (shortage.victims, shortage.host_victims):
                    times = [victim.last_used for victim in victims]
                    assert times == sorted(times)
                    assert all(victim.evictable for victim in victims)

    @given(entries=any_entries(), memory=MEMORIES)
    def test_offloads_fit_the_host(self, entries: list[ModelEntry], memory: dict[str, Any]) -> None:
        """An offloaded model finds its place in host RAM within the budget."""
        transition = a_plan(entries, **memory).transition
        if transition is not None and transition.kind == "offload":
            entry = next(entry for entry in entries if entry.id == transition.model)
            held = offloaded_bytes(entries) + entry.offload_bytes
            assert entry.offload_bytes == 0 or held <= memory["host_budget"]
