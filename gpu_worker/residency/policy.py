"""The next transition, the models to evict, and the loads to refuse: pure functions of (entries, memory, now).

No function here changes an entry, reads a clock or measures memory, so every rule is testable with plain data.
`entries` are all models in the catalogue's order, and none of them is in transition.

The order of precedence:
 1. the running cleanup pass: models idle past their time leave;
 2. drops: broken engines, and unloads that an admin asked for;
 3. models marked for eviction, after the device ran out of memory;
 4. the load queue: the longest waiting first; what does not fit evicts idle models, least recently used first;
 5. models not to be kept, and what a budget has no room for.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from gpu_worker.residency.models import (
    CheckFiles,
    Download,
    ModelEntry,
    ModelState,
    Refusal,
    Transition,
    TransitionKind,
)
from shared.protocol import DeviceMemory, HostMemory

BUSY_RETRY_S: Final = 5.0
"""Retry-After of a load that fits once busy models are idle: a request takes seconds.

At most this often the figures are read again for a model that was refused for lack of room.
"""

FULL_RETRY_S: Final = 60.0
"""Retry-After of a load that needs an admin: memory given back, a model unpinned, or a higher budget."""

SHORTAGE_WAIT_S: Final = 30.0
"""How long a model that fits once busy models are idle waits for that before its requests are refused."""


class MemoryReading(msgspec.Struct, frozen=True, kw_only=True):
    """Device and host memory at one moment."""

    device: DeviceMemory
    host: HostMemory


class IdleCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The question of a running cleanup pass: which of `models` leave.

    Idle for `timeout_s`, a model leaves the device for host RAM; there for `host_timeout_s`, it is dropped.
    """

    models: Sequence[str] = ()
    timeout_s: float
    host_timeout_s: float


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model does not fit on the device as things are.

    `victims`: models whose leaving the device helps; `host_victims`: those whose leaving host RAM helps;
    both least recently used first.
    `of_host_ram`: the device *is* host RAM (CPU mode) and it is full; offloading would not help, only dropping.
    `fits_after_eviction`: the model fits once all victims have left.
    `fits_when_idle`: the model fits once busy models are idle and have left as well.
    `message` holds the figures.
    """

    victims: list[ModelEntry]
    host_victims: list[ModelEntry]
    of_host_ram: bool
    fits_after_eviction: bool
    fits_when_idle: bool
    message: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The transition to start, if one is due, and the models to refuse.

    `short`: wanted models that found no room even with every idle model gone; those not refused keep waiting.
    `by_cleanup`: the transition is the cleanup pass's.
    """

    transition: Transition | None = None
    refusals: list[Refusal] = []
    short: list[str] = []
    by_cleanup: bool = False


def next_transition(entries: Sequence[ModelEntry], memory: MemoryReading, now: float, idle: IdleCheck) -> Plan:
    """The next transition, if any, and the requests to refuse; see the module's order of precedence."""
    for entry in entries:
        if entry.id in idle.models and (transition := leave_if_idle(entry, entries, memory, now, idle)):
            return Plan(transition=transition, by_cleanup=True)
    transition = next_drop(entries) or next_victim(entries, memory)
    if transition is not None:
        return Plan(transition=transition)
    transition, refusals, short = next_load(entries, memory, now)
    transition = transition or enforce_budgets(entries, memory)
    return Plan(transition=transition, refusals=refusals, short=short)


def leave_if_idle(
    entry: ModelEntry, entries: Sequence[ModelEntry], memory: MemoryReading, now: float, idle: IdleCheck
) -> Transition | None:
    """Evict `entry` if its idle time is over. A negative keep_alive_s keeps a model until others need the room."""
    keep_s = idle.timeout_s if entry.keep_alive_s is None else entry.keep_alive_s
    if not entry.evictable or keep_s < 0 or entry.broken or entry.requested == "unload":
        return None
    if entry.state is ModelState.OFFLOADED and now - entry.offloaded_since >= idle.host_timeout_s:
        return Transition(entry.id, "drop")
    if entry.state is ModelState.RESIDENT and now - entry.last_used >= keep_s:
        return evict(entry, entries, memory)
    return None


def next_drop(entries: Sequence[ModelEntry]) -> Transition | None:
    """Drop the first broken or unloaded model. A broken one goes even if requests wait for the model."""
    for entry in entries:
        if entry.broken or entry.requested == "unload":
            return Transition(entry.id, "drop")
    return None


def next_victim(entries: Sequence[ModelEntry], memory: MemoryReading) -> Transition | None:
    """Evict the least recently used of the models marked for eviction."""
    marked = [entry for entry in _lru(entries, ModelState.RESIDENT) if entry.evict]
    return evict(marked[0], entries, memory) if marked else None


def next_load(
    entries: Sequence[ModelEntry], memory: MemoryReading, now: float
) -> tuple[Transition | None, list[Refusal], list[str]]:
    """The next transition for the load queue, refusals, and the models that found no room."""
    refusals: list[Refusal] = []
    short: list[str] = []
    for entry in load_queue(entries):
        if entry.state is ModelState.ABSENT:
            if entry.files.blocks_load:
                continue
            if entry.files.problem:
                message = f"{entry.id}: {entry.files.problem}"
                refusals.append(Refusal(entry.id, "model_unavailable", message, FULL_RETRY_S))
                continue
        protected = [other.id for other in entries if other.preload] if entry.only_for_start else []
        shortage = find_shortage(entry, entries, memory.device, protected)
        if shortage is None:
            kind: TransitionKind = "load" if entry.state is ModelState.ABSENT else "restore"
            return Transition(entry.id, kind), refusals, short
        if shortage.fits_after_eviction and shortage.of_host_ram:
            return Transition([*shortage.host_victims, *shortage.victims][0].id, "drop"), refusals, short
        if shortage.fits_after_eviction:
            return evict(shortage.victims[0], entries, memory), refusals, short
        if reload_fits(entry, shortage, entries, memory.device, protected):
            return Transition(entry.id, "drop"), refusals, short
        short.append(entry.id)
        waited_s = 0.0 if entry.short_since is None else now - entry.short_since
        if shortage.fits_when_idle and waited_s < SHORTAGE_WAIT_S:
            continue
        retry_after_s = BUSY_RETRY_S if shortage.fits_when_idle else FULL_RETRY_S
        refusals.append(Refusal(entry.id, "insufficient_vram", shortage.message, retry_after_s))
    return None, refusals, short


def enforce_budgets(entries: Sequence[ModelEntry], memory: MemoryReading) -> Transition | None:
    """Evict models that are not to be kept (keep_alive_s 0), then what a budget has no room for."""
    resident = _lru(entries, ModelState.RESIDENT)
    victims = [entry for entry in resident if entry.keep_alive_s == 0]
    if not victims and held_bytes(entries, memory.device) > memory.device.budget_bytes:
        victims = [entry for entry in resident if entry.device_bytes]
    if victims:
        return evict(victims[0], entries, memory)
    if offloaded_bytes(entries) > memory.host.budget_bytes:
        for entry in _lru(entries, ModelState.OFFLOADED):
            if entry.host_bytes:
                return Transition(entry.id, "drop")
    return None


def evict(entry: ModelEntry, entries: Sequence[ModelEntry], memory: MemoryReading) -> Transition:
    """Take `entry` off the device: to host RAM if it fits there, if need be after dropping less recently used models.

    If nothing less recently used makes enough room in host RAM, the model itself is dropped.
    """
    more_bytes = entry.offload_bytes - entry.host_bytes
    short_bytes = offloaded_bytes(entries) + more_bytes - memory.host.budget_bytes
    if memory.device.kind != "cpu":
        short_bytes = max(short_bytes, more_bytes - memory.host.free_bytes)
    if more_bytes <= 0 or short_bytes <= 0:
        return Transition(entry.id, "offload")
    older = [
        other
        for other in _lru(entries, ModelState.OFFLOADED)
        if other.host_bytes and other.last_used <= entry.last_used
    ]
    makes_room = short_bytes <= sum(other.host_bytes for other in older)
    return Transition((older[0] if makes_room else entry).id, "drop")


def reload_fits(
    entry: ModelEntry,
    shortage: Shortage,
    entries: Sequence[ModelEntry],
    device: DeviceMemory,
    protected: Collection[str] = (),
) -> bool:
    """True if a fresh load would fit although a restore never will.

    A restore needs the old number of slots, a load can take fewer.
    """
    if entry.state is not ModelState.OFFLOADED or shortage.fits_after_eviction or shortage.fits_when_idle:
        return False
    as_load = find_shortage(entry, entries, device, protected, as_fresh_load=True)
    return as_load is None or as_load.fits_after_eviction or as_load.fits_when_idle


def fits_again(entry: ModelEntry, entries: Sequence[ModelEntry], device: DeviceMemory) -> bool:
    """True if a model that was refused for lack of room would find room now."""
    shortage = find_shortage(entry, entries, device)
    return shortage is None or shortage.fits_after_eviction or reload_fits(entry, shortage, entries, device)


def find_shortage(
    entry: ModelEntry,
    entries: Sequence[ModelEntry],
    device: DeviceMemory,
    protected: Collection[str] = (),
    *,
    as_fresh_load: bool = False,
) -> Shortage | None:
    """Why `entry` does not fit on the device; None if it fits. The `protected` models are no victims.

    `as_fresh_load`: count as if the model were dropped first and then loaded.
    """
    need = max(0, (entry.load_bytes if as_fresh_load else entry.arrival_bytes) - entry.device_bytes)
    over_budget = held_bytes(entries, device) + need - device.budget_bytes
    # In CPU mode, offloaded weights lie in the same memory already.
    short = need - (entry.host_bytes if device.kind == "cpu" else 0) - device.free_bytes
    if need == 0 or (over_budget <= 0 and short <= 0):
        return None
    victims = [
        other for other in _lru(entries, ModelState.RESIDENT) if other.device_bytes and other.id not in protected
    ]
    host_victims = [other for other in _lru(entries, ModelState.OFFLOADED) if other.host_bytes and device.kind == "cpu"]
    victim_bytes = sum(other.device_bytes for other in victims)
    host_victim_bytes = sum(other.host_bytes for other in host_victims)
    busy_bytes = sum(
        other.device_bytes for other in entries if other.references and not other.pinned and other.id not in protected
    )
    fits_after_eviction = over_budget <= victim_bytes and short <= victim_bytes + host_victim_bytes
    leaving = victim_bytes + busy_bytes
    fits_when_idle = not fits_after_eviction and over_budget <= leaving and short <= leaving + host_victim_bytes
    return Shortage(
        victims=victims,
        host_victims=host_victims,
        of_host_ram=device.kind == "cpu" and over_budget <= 0,
        fits_after_eviction=fits_after_eviction,
        fits_when_idle=fits_when_idle,
        message=_arithmetic(entry, need, victim_bytes, entries, device, protected=protected),
    )


def load_queue(entries: Sequence[ModelEntry]) -> list[ModelEntry]:
    """The wanted models, the longest waiting first."""
    return sorted((entry for entry in entries if entry.wanted), key=lambda entry: entry.queue_number)


def held_bytes(entries: Sequence[ModelEntry], device: DeviceMemory) -> int:
    """Bytes that count against the device's budget: on a GPU all that this process holds.

    In CPU mode what the models hold: the interpreter and its libraries are no part of the budget there.
    """
    return device.ours_bytes if device.kind == "cuda" else sum(entry.device_bytes for entry in entries)


def offloaded_bytes(entries: Sequence[ModelEntry]) -> int:
    """Bytes of host RAM that models hold."""
    return sum(entry.host_bytes for entry in entries)


def _lru(entries: Sequence[ModelEntry], state: ModelState) -> list[ModelEntry]:
    """The evictable models in `state`, least recently used first."""
    return sorted(
        (entry for entry in entries if entry.state is state and entry.evictable), key=lambda entry: entry.last_used
    )


def _arithmetic(
    entry: ModelEntry,
    need: int,
    victim_bytes: int,
    entries: Sequence[ModelEntry],
    device: DeviceMemory,
    *,
    protected: Collection[str],
) -> str:
    holders = []
    for other in entries:
        if other.device_bytes and other is not entry:
            idle = "preloaded" if other.id in protected else "idle"
            why = "busy" if other.references else "pinned" if other.pinned else idle
            holders.append(f"{other.id} {_mib(other.device_bytes)} ({why})")
    return (
        f"{entry.id} needs {math.ceil(need / 2**20):,} MiB on the device. "
        f"Of the budget of {_mib(device.budget_bytes)}, "
        f"{_mib(held_bytes(entries, device))} are held ({', '.join(holders) or 'by no model'}), "
        f"and {_mib(device.free_bytes)} of the device are free; "
        f"evicting every {'other' if protected else 'idle'} model would give back {_mib(victim_bytes)}, "
        "which is not enough. "
        "Fewer slots (TTS_MAX_CONCURRENCY) and TTS_QUANTIZATION=int8 need less; TTS_VRAM_BUDGET_MB is the budget."
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes >> 20:,} MiB"


def pending_file_work(entries: Sequence[ModelEntry], *, overdue: bool) -> list[CheckFiles | Download]:
    """File checks and downloads to start now, one download at a time.

    A model's files are checked before every load, and with `overdue` for every absent model:
    users copy weights in and delete them by hand. Wanted models come first, the longest waiting before the others.
    """
    absent = [entry for entry in entries if entry.state is ModelState.ABSENT]
    absent.sort(key=lambda entry: (not entry.wanted, entry.queue_number))
    work: list[CheckFiles | Download] = [
        CheckFiles(entry.id)
        for entry in absent
        if not (entry.files.checking or entry.files.downloading)
        and (overdue or (entry.wanted and not entry.files.current))
    ]
    if not any(entry.files.downloading for entry in entries):
        remote = (entry for entry in load_queue(absent) if entry.files.current and entry.files.remote)
        work += [Download(entry.id) for entry in itertools.islice(remote, 1)]
    return work
